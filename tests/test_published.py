"""Models of families that were found, as they are published, which is not always as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import benchmark
from safetensors.torch import load_file, save_file

from compressor.compress.output import stock
from compressor.compress.output.verify import export_dense, verify
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError, VerifyError
from compressor.runtime.model import probe
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import Derived, changed
from compressor.runtime.schemes import Dense
from compressor.runtime.stored import open_model

families = benchmark("families")


def named(model: Path, other: Callable[[str], str]) -> Path:
    """The same folder with other names of tensors, which stock transformers reads alike."""
    plain, tensors = families.stock_logits(model), load_file(model / "model.safetensors")
    save_file({other(name): tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    assert torch.equal(families.stock_logits(model), plain)
    return model


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_decoder_that_is_stored_alone(name: str, tmp_path: Path) -> None:
    model = named(families.build(name, tmp_path / "model"), lambda name: name.removeprefix("transformer."))
    families.check(model, tmp_path)
    assert "h.0.ln_1.weight" in open_model(model).tensors or name != "gpt2"
    assert all(
        name.startswith(("h.", "w", "ln_f", "lm_head")) for name in load_file(tmp_path / "rtn/model.safetensors")
    )


def test_matrices_that_lie_transposed_do_so_in_a_plain_output(tmp_path: Path) -> None:
    model = families.build("gpt2", tmp_path / "model")
    families.compress(model, tmp_path / "out", families.PASSES["rtn"])
    assert not verify(tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "plain")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "plain"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    own = load(tmp_path / "out", dtype=torch.float32)(input_ids=families.IDS, use_cache=False).logits
    assert (families.stock_logits(tmp_path / "plain") - own).norm() / own.norm() < 1e-5


def test_dense_layers_that_are_named_as_in_memory(tmp_path: Path) -> None:
    """As those of Kimi Linear, which transformers writes under the names of its mixtures."""
    model = families.build("kimi_linear", tmp_path / "model")
    dense = [f"block_sparse_moe.{part}_proj" for part in ("gate", "up", "down")]

    def other(name: str) -> str:
        return name.replace("block_sparse_moe", "mlp") if any(f"0.{part}." in name for part in dense) else name

    families.check(named(model, other), tmp_path)


def test_parts_that_lie_below_one_another_in_memory(tmp_path: Path) -> None:
    found = open_model(families.build("olmo_hybrid", tmp_path / "model")).family
    assert found.joined == {
        "linear_attn.conv1d.weight": tuple(f"linear_attn.{one}_conv1d.weight" for one in ("q", "k", "v"))
    }
    tensors = load_file(tmp_path / "model/model.safetensors")
    lost = next(name for name in tensors if "k_conv1d" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model/model.safetensors")
    with pytest.raises(ModelError, match=f"{lost} is missing, which olmo_hybrid needs"):
        families.compress(tmp_path / "model", tmp_path / "out", families.PASSES["rtn"])


@pytest.mark.parametrize("name", ["falcon", "gpt_bigcode", "mamba"])
def test_transformers_is_not_named_where_it_asks_linears_for_weights(name: str, tmp_path: Path) -> None:
    plan = families.compress(families.build(name, tmp_path / "model"), tmp_path / "out", families.PASSES["rtn"])
    assert plan.readers == ("compressor",)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        families.stock_logits(tmp_path / "out")


def test_blocks_that_get_more_than_hidden_states_are_calibrated_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of Gemma 4 with what is looked up for it, and the keys and values that an earlier one made."""
    model = families.build("gemma4_text", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    assert config["num_kv_shared_layers"] == 2
    assert config["hidden_size_per_layer_input"] == 16
    checkpoint = open_model(model)
    skeleton = probe._skeleton(checkpoint.family, model)
    shared = [layer for layer in skeleton.layers if layer.self_attn.is_kv_shared_layer]
    assert len(shared) == 2
    row = skeleton.embed(families.IDS)
    assert torch.equal(row[..., skeleton.config.hidden_size].long(), families.IDS)
    ids = skeleton.config.hidden_size
    assert torch.equal(skeleton.stream(row), row[..., :ids])
    assert skeleton.stream(row).shape[-1] == ids  # what drift is measured of
    monkeypatch.setattr("compressor.compress.plan._MUCH", 0.001)
    near = {}
    for name, step in families.PASSES.items():
        plan = families.compress(model, tmp_path / name, step.replace("bits: 8", "bits: 3"))
        [told] = (line for line in plan.warnings if "no pass rewrites them" in line)
        assert told.split("% of the weights stay as they are")[0].isdigit()
        assert "model.embed_tokens_per_layer.weight, model.per_layer_model_projection.weight" in told
        own = load(tmp_path / name, dtype=torch.float32)(input_ids=families.IDS, use_cache=False).logits
        near[name] = float((own - families.stock_logits(model)).norm())
    assert near["gptq"] < near["rtn"]


def test_a_result_that_transformers_would_fill_up_with_chance_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where config.json says something else than the tensors do."""
    model = families.build("qwen3_moe", tmp_path / "model")
    for number, (fault, told) in enumerate(
        (
            ({"num_local_experts": 3}, r"model\.layers\.0\.mlp\.experts\.\w+ would be initialised at random"),
            ({"attention_bias": True}, r"model\.layers\.0\.self_attn\.k_proj\.bias would be .*, for it is missing"),
            ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ would be left out, for no module has it"),
        )
    ):
        right = stock.model_config

        def wrong(checkpoint: Checkpoint, fault: dict[str, Any] = fault, right: Any = right) -> Any:
            config = right(checkpoint)
            if checkpoint.path != model:
                config = type(config).from_dict({**config.to_dict(), **fault})
            return config

        monkeypatch.setattr(stock, "model_config", wrong)
        with pytest.raises(VerifyError, match=told):
            families.compress(model, tmp_path / str(number), families.PASSES["rtn"])
        monkeypatch.setattr(stock, "model_config", right)


def test_ids_that_a_table_of_every_block_does_not_have(tmp_path: Path) -> None:
    """Those of images and sounds, of which Gemma 3n looks up the first row."""
    config, _ = families.small_config(families.config_of("gemma3n_text"))
    config.vocab_size_per_layer_input = 100
    families.small_model(config).save_pretrained(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model")
    skeleton = probe._skeleton(checkpoint.family, checkpoint.path)
    assert int(families.IDS.max()) >= 100
    torch.testing.assert_close(
        probe.walked(skeleton, families.IDS), families.stock_logits(tmp_path / "model"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("step", ["{kind: expert_prune, ratio: 0.25}", "{kind: expert_width, width: 16}"])
def test_layers_that_draft_and_are_named_apart(step: str, sparse: bool, tmp_path: Path) -> None:
    """Qwen3-Next's: with experts they would have another number than config.json says."""
    model = families.build("qwen3_next", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    place = "model.layers.3." if any(name.startswith("model.layers.3.") for name in tensors) else "model.layers.1."
    own = {name.replace(place, "mtp.layers.0."): tensor for name, tensor in tensors.items() if name.startswith(place)}
    own = {name: tensor.clone() for name, tensor in own.items() if sparse or "experts" not in name}
    own["mtp.fc.weight"] = torch.randn(64, 128)
    save_file(tensors | own, model / "model.safetensors", {"format": "pt"})
    families.compress(model, tmp_path / "out", step)
    left = {name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith("mtp.")}
    assert left == (set() if sparse else set(own))


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_what_blocks_look_up_goes_by_the_embedding_of_the_chain(name: str, tmp_path: Path) -> None:
    checkpoint = open_model(families.build(name, tmp_path / "model"))
    table = "model.embed_tokens.weight"
    other = Dense(checkpoint.tensor(table) * 2 + 0.3)
    skeleton = Skeleton(checkpoint)
    whole = Skeleton(changed(checkpoint, {table: Derived((table,), lambda tensor: tensor * 2 + 0.3)}))
    assert skeleton.wide is not None
    skeleton.wide.changed = other
    row, expected = skeleton.embed(families.IDS, other), whole.embed(families.IDS)
    for index in range(skeleton.blocks):
        block = skeleton.block(index)
        plain = skeleton.run(skeleton.runner(index, block), row)
        row = skeleton.run(skeleton.runner(index, block, compressed=True), row)
        assert not torch.allclose(plain, row)
        expected = whole.run(whole.runner(index, whole.block(index)), expected)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_experts_are_not_fitted_to_more_than_they_add_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
    monkeypatch.setitem(families.SAID, "gemma4_text", {"num_kv_shared_layers": 12, **sparse})
    model = families.build("gemma4_text", tmp_path / "model")
    for step, more in (
        ("{kind: expert_prune, keep: 3}", "; set refit: false"),
        ("{kind: expert_width, width: 16}", "$"),
    ):
        with pytest.raises(RecipeError, match=f"blocks of this model hand on more than that{more}"):
            families.compress(model, tmp_path / "out", step)
    families.compress(model, tmp_path / "out", "{kind: expert_prune, keep: 3, refit: false}")
    own = load(tmp_path / "out", dtype=torch.float32)(input_ids=families.IDS, use_cache=False).logits
    torch.testing.assert_close(own, families.stock_logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
