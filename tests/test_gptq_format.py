"""GPTQ's checkpoints: bits where AutoGPTQ put them, both forms, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import refuser
from safetensors.torch import load_file
from torch import Tensor

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.formats import Around, choose_format
from compressor.runtime.schemes import Dense, IntQuantized
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}


def compress(model: Path, out: Path, *passes: str) -> Path:
    text = "output: {format: gptq}\npasses:\n" + "".join(f"  - {step}\n" for step in passes)
    apply(Job(parse_recipe(text), text, (), model, out, "pico"), lambda event: None)
    return out


def stream(words: Tensor, bits: int) -> Tensor:
    """The unsigned codes that lie along the first dimension, bit by bit."""
    lines = (words.long()[:, None] >> torch.arange(32)[:, None] & 1).flatten(0, 1)
    return (lines.unflatten(0, (-1, bits)) << torch.arange(bits)[:, None]).sum(1)


def by_the_book(tensors: dict[str, Tensor], bits: int, newer: bool) -> Tensor:
    """What a reader decodes: `scale * (code - zero)`, of the group that `g_idx` says."""
    codes, groups = stream(tensors["qweight"], bits), tensors["g_idx"].long()
    zeros = stream(tensors["qzeros"].T, bits).T + (not newer)
    scales = tensors["scales"].double()
    return (scales[groups] * (codes - zeros[groups])).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_bits_are_where_readers_look(pico: Pico, tmp_path: Path, bits: int, symmetric: str) -> None:
    step = f"{{kind: rtn, bits: {bits}, group_size: 32, symmetric: {symmetric}}}"
    out = compress(pico("llama", **WIDE), tmp_path / "out", step)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    newer = symmetric == "false"
    assert (told["checkpoint_format"], told["sym"]) == (("gptq_v2", False) if newer else ("gptq", True))
    stored, model = load_file(out / "model.safetensors"), StoredModel(out)
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == 14
    for name in names:
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(by_the_book(parts, bits, newer), model.operator(name).dense(torch.float64)), name


def test_rules_for_what_differs(pico: Pico, tmp_path: Path) -> None:
    first = "{kind: rtn, bits: 8, group_size: 32, targets: '*.v_proj'}"
    second = "{kind: rtn, bits: 4, group_size: 64, targets: '*.k_proj'}"
    out = compress(pico("llama", **WIDE), tmp_path / "out", first, second)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (told["bits"], told["group_size"]) == (4, 64)

    def rule(name: str) -> dict[str, int] | None:
        return next((what for key, what in told["dynamic"].items() if re.match(key[2:], name)), None)

    for block in (0, 1):
        assert rule(f"model.layers.{block}.self_attn.v_proj") == {"bits": 8, "group_size": 32}
        assert rule(f"model.layers.{block}.self_attn.k_proj") is None
        assert rule(f"model.layers.{block}.mlp.down_proj") == {}
        assert f"-:^model\\.layers\\.{block}\\.mlp\\.down_proj$" in told["dynamic"]
    model = StoredModel(out)
    assert model.operator("model.layers.1.self_attn.k_proj").description == "int4 g64"
    assert model.operator("model.layers.1.self_attn.v_proj").description == "int8 g32"
    with torch.no_grad():
        assert load(out)(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ("{kind: rtn, bits: 5, group_size: 32}", "int5"),
        ("{kind: rtn, scheme: mxfp4a16}", "mxfp4"),
        ("{kind: rtn, bits: 4, group_size: 64, targets: '*.down_proj'}", "not of whole groups and words"),
        ("{kind: rtn, bits: 4, group_size: 32, targets: [lm_head]}", "an embedding or a head"),
    ],
)
def test_what_it_does_not_hold(pico: Pico, tmp_path: Path, step: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        compress(pico("llama", **WIDE), tmp_path / "out", step)


def test_experts_are_none_of_it(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="experts that are stored otherwise"):
        compress(pico("mixtral"), tmp_path / "out", "{kind: rtn, bits: 4, group_size: -1}")


def test_the_older_form_with_zero_points_is_read_as_plain_weights(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico("llama", **WIDE), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    name = "model.layers.1.mlp.up_proj"
    before = StoredModel(out).tensor(f"{name}.weight")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["sym"] = False
    (out / "config.json").write_text(json.dumps(config))
    after = StoredModel(out)
    assert isinstance(after.operator(name), Dense)
    assert torch.equal(after.tensor(f"{name}.weight"), before)


def test_what_would_decode_to_other_weights_is_refused(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico("llama", **WIDE), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    whole = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"

    refuses = refuser(out)

    def part(suffix: str, changed: Tensor) -> dict[str, Tensor]:
        return whole | {f"{name}.{suffix}": changed.contiguous()}

    scales, zeros = whole[f"{name}.scales"], whole[f"{name}.qzeros"]
    refuses("an order of their own", part("g_idx", whole[f"{name}.g_idx"].flip(0)))
    refuses("it has zero points", part("qzeros", zeros + 1))
    refuses("it has zero points", whole, checkpoint_format="gptq_v2")  # whose middle is one more
    refuses("up_proj is not whole", {key: tensor for key, tensor in whole.items() if key != f"{name}.scales"})
    refuses(r"its scales is \[1, 96\]", part("scales", scales[:1]))
    refuses("scales are no floats", part("scales", scales.int()))
    refuses("'marlin' is not read here", whole, checkpoint_format="marlin")
    for told in (
        {"group_size": 64},
        {"group_size": 16},
        {"group_size": -1},
        {"dynamic": {".*up_proj": {"group_size": 64}}},
    ):
        refuses("but config.json says", whole, **told)
    for told in ({"bits": "4"}, {"bits": 0}, {"bits": None}, {"group_size": 0}, {"pack_dtype": "int16"}):
        refuses("is of .* in a way that is not read here", whole, **told)
    refuses("config.json says that it is not", whole, dynamic={"-:.*up_proj": {}})


def test_who_reads_what_differs() -> None:
    def made(bits: int, symmetric: bool = True) -> IntQuantized:
        zeros = None if symmetric else torch.zeros(32, 1, dtype=torch.int8)
        return IntQuantized(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32, 1), zeros, bits, 32)

    around = Around(fused=[["q", "k"]])
    everyone = ("GPTQModel", "compressor", "vLLM on GPUs")
    assert choose_format("gptq", {"q": made(4), "k": made(4), "o": made(8)}, around)[1] == everyone
    four = ("GPTQModel", "compressor", "vLLM on CPUs", "vLLM on GPUs")
    assert choose_format("gptq", {"q": made(4), "k": made(4)}, around)[1] == four
    for unknown in (made(3), made(4, False)):  # vLLM 0.32 has a name for neither
        assert choose_format("gptq", {"q": unknown, "k": unknown}, around)[1] == everyone[:2]
    for others in ({"k": made(8)}, {"k": Dense(torch.zeros(32, 32))}):
        assert choose_format("gptq", {"q": made(4), **others}, around)[1] == everyone[:2]
    with pytest.raises(RecipeError, match="zero points beside others without"):
        choose_format("gptq", {"q": made(4), "k": made(4, False)}, around)
    with pytest.raises(RecipeError, match="no linear is stored otherwise"):
        choose_format("gptq", {"q": Dense(torch.zeros(32, 32))}, around)
