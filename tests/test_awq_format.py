"""AWQ's checkpoints: bits where AutoAWQ put them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import refuser
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.formats import FORMATS, Around, choose_format
from compressor.runtime.schemes import Dense, IntQuantized, from_tensors
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
AWQ = FORMATS["awq"]


def compress(model: Path, out: Path, *passes: str) -> Path:
    text = "output: {format: awq}\npasses:\n" + "".join(f"  - {step}\n" for step in passes)
    apply(Job(parse_recipe(text), text, (), model, out, "pico"), lambda event: None)
    return out


def codes_of(words: Tensor) -> Tensor:
    """Unsigned codes of words, whose `k`-th four bits are of row `[0, 2, 4, 6, 1, 3, 5, 7][k]` of eight."""
    found = torch.zeros(words.shape[0], 8 * words.shape[1], dtype=torch.int64)
    for k, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        found[:, row::8] = words.long() >> 4 * k & 15
    return found


def by_the_book(tensors: dict[str, Tensor], size: int) -> Tensor:
    """What a reader decodes: `scale * (code - zero)`."""
    codes, zeros = codes_of(tensors["qweight"]), codes_of(tensors["qzeros"]).repeat_interleave(size, 0)
    return (tensors["scales"].double().repeat_interleave(size, 0) * (codes - zeros)).T


def made(rows: int, columns: int, size: int, symmetric: bool, seed: int = 0) -> IntQuantized:
    generator = torch.Generator().manual_seed(seed)
    codes, zeros = (
        torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
        for shape in ((rows, columns), (rows, columns // size))
    )
    scales = torch.randn(zeros.shape, generator=generator)
    return IntQuantized(codes, scales, None if symmetric else zeros, 4, size)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_what_is_packed_is_what_a_reader_decodes(
    words: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    operator = made(32 * words, groups * size, size, symmetric, seed)
    tensors = AWQ.tensors(operator)
    assert torch.equal(by_the_book(tensors, size), operator.dense(torch.float64))
    scheme = {"kind": "int", "bits": 4, "group_size": size, "symmetric": False}
    again = from_tensors(AWQ.operator_tensors(tensors, scheme), scheme)
    assert torch.equal(again.dense(torch.float64), operator.dense(torch.float64))


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_bits_are_where_readers_look(pico: Pico, tmp_path: Path, symmetric: str) -> None:
    step = f"{{kind: rtn, bits: 4, group_size: 32, symmetric: {symmetric}, ignore: '*.0.*.up_proj'}}"
    out = compress(pico("llama", **WIDE), tmp_path / "out", step)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    kept = told.pop("modules_to_not_convert")
    assert kept == ["model.layers.0.mlp.up_proj"]
    assert told == {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    stored, model = load_file(out / "model.safetensors"), StoredModel(out)
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == 13
    for name in names:
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        assert torch.equal(by_the_book(parts, 32), model.operator(name).dense(torch.float64)), name
    with torch.no_grad():
        assert load(out)(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (["{kind: rtn, bits: 3, group_size: 32}"], "no such width"),
        (["{kind: rtn, scheme: mxfp4a16}"], "mxfp4"),
        (["{kind: rtn, scheme: int-a8, group_size: 32}"], "inputs int8"),
        (["{kind: rtn, bits: 4, group_size: 64, targets: '*.down_proj'}"], "not of whole groups"),
        (["{kind: rtn, bits: 4, group_size: -1}"], "not of whole groups"),
        (["{kind: rtn, bits: 4, group_size: 32, targets: [lm_head]}"], "an embedding or a head"),
        (
            [f"{{kind: rtn, bits: 4, group_size: {n}, targets: '*.{n}_proj'}}".replace("64_", "k_") for n in (64,)]
            + ["{kind: rtn, bits: 4, group_size: 32, targets: '*.q_proj'}"],
            "groups of 32 beside others of 64",
        ),
    ],
)
def test_what_it_does_not_hold(pico: Pico, tmp_path: Path, steps: list[str], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        compress(pico("llama", **WIDE), tmp_path / "out", *steps)


def test_what_would_decode_to_other_weights_is_refused(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico("llama", **WIDE), tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32}")
    whole = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"

    refuses = refuser(out)
    scales = whole[f"{name}.scales"]
    refuses("up_proj is not whole", {key: tensor for key, tensor in whole.items() if key != f"{name}.scales"})
    refuses("its scales is", whole | {f"{name}.scales": scales[:1].contiguous()})
    refuses("scales are no floats", whole | {f"{name}.scales": scales.int()})
    refuses("but config.json says", whole, group_size=64)
    refuses("config.json says that it is not", whole, modules_to_not_convert=["mlp.up_proj"])
    for told in ({"version": "gemv"}, {"bits": 3}, {"group_size": -1}, {"zero_point": False}):
        refuses("is not read here", whole, **told)


def test_who_reads_what_differs() -> None:
    around = Around(fused=[["q", "k"]])
    everyone = ("GPTQModel", "compressor", "vLLM on CPUs", "vLLM on GPUs")
    operator = made(32, 32, 32, True)
    assert choose_format("awq", {"q": operator, "k": operator}, around)[1] == everyone
    assert choose_format("awq", {"q": operator, "k": Dense(torch.zeros(32, 32))}, around)[1] == everyone[:2]
