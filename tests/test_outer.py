"""The embedding and the output head, stored otherwise where a pass names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import same_folders, stock_logits
from safetensors.torch import load_file
from torch import nn

from compressor.calibrate.drive import start_chains
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, LayerDone
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.plan import Plan, make_plan, rows
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.schemes import IntQuantized, StoredEmbedding, StoredLinear
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def run(passes: str, model: Path, out: Path, extra: str = "") -> Plan:
    text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{passes}]\n{extra}"
    return apply(Job(parse_recipe(text), text, (), model, out, "x"), lambda event: None)


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text", "cohere2", "llava"])
def test_both_ends_run_as_they_are_stored(pico: Pico, tmp_path: Path, family: str, tied: bool, symmetric: str) -> None:
    """Families that scale what is looked up, or the logits; a model with other parts; a head of its own, or none."""
    changes = {"dtype": torch.float32, "tie_word_embeddings": tied}
    if family == "llava":
        changes = {"dtype": torch.float32}
    model = pico(family, **changes)
    outer = Skeleton(Checkpoint(model)).outer()
    names = ", ".join(outer)
    plan = run(
        f"{{kind: rtn, bits: 8, group_size: 32, symmetric: {symmetric}, targets: [{names}]}}", model, tmp_path / "out"
    )
    assert plan.rewritten.keys() == outer.keys()
    assert not verify(tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "plain")
    loaded = load(tmp_path / "out", "cpu", torch.float32)
    assert isinstance(loaded.get_input_embeddings(), StoredEmbedding)
    assert isinstance(loaded.get_output_embeddings(), StoredLinear)
    found, expected = loaded(input_ids=IDS).logits, stock_logits(tmp_path / "plain", IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0 < float((found - stock_logits(model, IDS)).norm() / found.norm()) < 0.02
    assert load(tmp_path / "out", "cpu").dtype == torch.float32
    generated = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    plain = load(tmp_path / "plain", "cpu", torch.float32).generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain)


def test_globs_leave_both_ends_alone(pico: Pico, tmp_path: Path) -> None:
    plan = run("{kind: rtn}", pico(), tmp_path / "out")
    assert not plan.rewritten.keys() & Skeleton(Checkpoint(pico())).outer().keys()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} < tensors.keys()


def test_a_stored_head_is_read_by_transformers(pico: Pico, tmp_path: Path) -> None:
    passes = "{kind: rtn, bits: 4, group_size: 32}, {kind: rtn, bits: 8, group_size: 32, targets: [lm_head]}"
    plan = run(passes, pico(dtype=torch.float32), tmp_path / "out")
    assert plan.format.name == "compressed-tensors"
    assert plan.readers == ("compressor", "transformers")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert hasattr(theirs.lm_head, "weight_packed")
    ours = load(tmp_path / "out", "cpu", torch.float32)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_the_compressed_chain_starts_from_what_is_stored(pico: Pico, tmp_path: Path) -> None:
    passes = "{kind: rtn, bits: 2, group_size: 32, targets: [model.embed_tokens]}, {kind: gptq, group_size: 32}"
    run(passes, pico(dtype=torch.float32), tmp_path / "out")
    skeleton, stored = Skeleton(Checkpoint(pico(dtype=torch.float32))), StoredModel(tmp_path / "out")
    embedding = stored.operator("model.embed_tokens")
    assert isinstance(embedding, IntQuantized)
    chains = start_chains(skeleton, IDS, tmp_path / "chains", ("compressed", "reference"), embedding)
    for chain, table in (
        ("compressed", embedding.dense()),
        ("reference", skeleton.checkpoint.tensor("model.embed_tokens.weight")),
    ):
        torch.testing.assert_close(chains.read(0, chain)[:], nn.functional.embedding(IDS, table.float()))


@pytest.mark.parametrize("stored", [True, False])
def test_later_passes_make_up_for_a_rounded_embedding(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """The very layers that follow see it: without it in the chain they would come out otherwise."""
    if not stored:
        plain = Skeleton.embed
        monkeypatch.setattr(Skeleton, "embed", lambda self, ids, stored=None: plain(self, ids))
    passes = "{kind: rtn, bits: 2, group_size: 32, targets: [model.embed_tokens]}, {kind: gptq, group_size: 32}"
    run(passes, pico(dtype=torch.float32), tmp_path / "out")
    run("{kind: gptq, group_size: 32}", pico(dtype=torch.float32), tmp_path / "alone")
    both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(both[name], alone[name]) == (not stored)


@pytest.mark.parametrize(
    ("passes", "tied", "message"),
    [
        (
            "{kind: sparse24, targets: [lm_head]}",
            False,
            r"passes\.0: sparse24 cannot take lm_head, for it solves on what enters",
        ),
        (
            "{kind: gptq, scheme: int8, input_scales: tensor, targets: [lm_head]}",
            False,
            r"gptq cannot take lm_head with scales for its inputs, which are measured inside blocks; name it in",
        ),
        (
            "{kind: rtn, scheme: nvfp4, targets: [lm_head]}",
            False,
            r"rtn cannot take lm_head with scales for its inputs",
        ),
        (
            "{kind: sparse24, method: magnitude, targets: [model.embed_tokens]}",
            False,
            "cannot become 2:4, for its rows are",
        ),
        ("{kind: rtn, scheme: int8, targets: [model.embed_tokens]}", False, "cannot become w8a8 int8"),
        ("{kind: rtn, targets: [lm_head]}", True, "and outside the blocks are model.embed_tokens$"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pico: Pico, passes: str, tied: bool, message: str) -> None:
    model = pico(tie_word_embeddings=tied)
    with pytest.raises(RecipeError, match=message):
        make_plan(parse_recipe(f"passes: [{passes}]\n"), Skeleton(Checkpoint(model)))


@pytest.mark.parametrize(
    "kind", ["{kind: rtn, scheme: int8, targets: [lm_head]}", "{kind: sparse24, method: magnitude, targets: [lm_head]}"]
)
def test_a_head_takes_any_pass_without_data(pico: Pico, tmp_path: Path, kind: str) -> None:
    run(kind, pico(dtype=torch.float32), tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "plain")
    found = load(tmp_path / "out", "cpu", torch.float32)(input_ids=IDS).logits
    expected = stock_logits(tmp_path / "plain", IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.02  # w8a8 rounds the head's inputs too


def test_the_plan_tells_them(pico: Pico) -> None:
    passes = "{kind: rtn, bits: 8, targets: [model.embed_tokens, lm_head]}"
    plan = make_plan(parse_recipe(f"passes: [{passes}]\n"), Skeleton(Checkpoint(pico())))
    told = {row.name: row for row in rows(plan)}
    assert told["lm_head"].becomes == told["model.embed_tokens"].becomes == "int8 g-1".replace("g-1", "per row")
    assert told["lm_head"].steps == ("rtn",)


def test_rows_of_a_large_matrix_are_rounded_some_at_a_time(pico: Pico) -> None:
    """As they would be all at once; the plan counts on it."""
    from compressor.compress.passes.linear import rtn
    from compressor.compress.solvers.grid import Steps
    from compressor.runtime.schemes import Dense, identical

    torch.manual_seed(0)
    weight = Dense(torch.randn(200, 64).to(torch.bfloat16))
    [step] = parse_recipe("passes: [{kind: rtn, group_size: 32}]\n").passes
    [bytewise] = parse_recipe("passes: [{kind: rtn, scheme: int8}]\n").passes
    whole = [one._rounded("x", weight, None, Steps(torch.bfloat16)) for one in (step, bytewise)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtn, "ROWS", 48)
        parts = [one._rounded("x", weight, None, Steps(torch.bfloat16)) for one in (step, bytewise)]
    for (one, error), (other, its) in zip(whole, parts, strict=True):
        assert identical(one, other)
        assert error == pytest.approx(its)
    shape = [Dense(torch.empty(131072, 4096, device="meta"))]
    assert step.memory(shape) < 6 * 131072 * 4096
    assert bytewise.memory(shape) < 2 * 131072 * 4096


def test_a_run_that_stopped_in_its_first_block_goes_on_from_the_stored_embedding(pico: Pico, tmp_path: Path) -> None:
    passes = "{kind: rtn, bits: 2, group_size: 32, targets: [model.embed_tokens]}, {kind: gptq, group_size: 32}"
    text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{passes}]\n"
    job = Job(parse_recipe(text), text, (), pico(dtype=torch.float32), tmp_path / "out", "x")

    def stop(event: Event) -> None:
        if isinstance(event, LayerDone) and ".layers." in event.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(job, stop)
    apply(job, lambda event: None, resume=True)
    apply(replace(job, out=tmp_path / "whole"), lambda event: None)
    same_folders(tmp_path / "out", tmp_path / "whole")


def test_a_tied_head_keeps_its_own_bias(pico: Pico, tmp_path: Path) -> None:
    model = pico("phimoe", dtype=torch.float32, tie_word_embeddings=True, lm_head_bias=True)
    run("{kind: rtn, bits: 8, group_size: 32, targets: [model.embed_tokens]}", model, tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "plain")
    loaded = load(tmp_path / "out", "cpu", torch.float32)
    assert loaded.lm_head.bias.abs().max() > 0
    torch.testing.assert_close(
        loaded(input_ids=IDS).logits, stock_logits(tmp_path / "plain", IDS), rtol=1e-4, atol=1e-4
    )


def test_a_head_that_the_config_ties_is_for_compressor_alone(pico: Pico, tmp_path: Path) -> None:
    """transformers would look for the embedding's weight in it."""
    model = Path(shutil.copytree(pico(dtype=torch.float32), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    plan = run("{kind: rtn, bits: 8, group_size: 32, targets: [lm_head]}", model, tmp_path / "out")
    assert plan.format.name == "compressor"
    assert "ties" in plan.obstacle


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_schemes_that_differ_are_told_by_names_on_disk_and_in_memory(pico: Pico, tmp_path: Path, family: str) -> None:
    passes = "{kind: rtn, group_size: 32, targets: '*.mlp.*'}, {kind: rtn, bits: 8, group_size: 32, targets: '*_attn*'}"
    run(passes, pico(family, dtype=torch.float32), tmp_path / "out")
    ours = load(tmp_path / "out", "cpu", torch.float32)(input_ids=IDS).logits
    torch.testing.assert_close(stock_logits(tmp_path / "out", IDS), ours, rtol=1e-3, atol=1e-3)


def test_a_stored_embedding_follows_the_model_in_its_dtype_and_its_place(pico: Pico, tmp_path: Path) -> None:
    run("{kind: rtn, bits: 8, group_size: 32, targets: [model.embed_tokens, lm_head]}", pico(), tmp_path / "out")
    model = load(tmp_path / "out", "cpu")
    exact = load(tmp_path / "out", "cpu", torch.float32)(input_ids=IDS).logits
    assert model.half()(input_ids=IDS).logits.dtype == torch.float16
    torch.testing.assert_close(load(tmp_path / "out", "cpu").float()(input_ids=IDS).logits, exact, rtol=1e-2, atol=1e-2)
    rows = model.get_input_embeddings().rows.to("meta")  # as on a GPU
    assert StoredEmbedding(nn.Embedding(4, 64), rows, torch.float16).plain.weight.is_meta


def test_their_work_is_counted_without_calibration(pico: Pico) -> None:
    alone, both = (
        sum(make_plan(parse_recipe(f"passes: [{passes}]\n"), Skeleton(Checkpoint(pico()))).work.values())
        for passes in ("{kind: gptq}", "{kind: gptq}, {kind: rtn, targets: [model.embed_tokens, lm_head]}")
    )
    assert alone < both < 1.01 * alone
