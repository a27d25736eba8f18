"""GGUF files: every number of an output in the types of ggml, in the place and order that llama.cpp wants."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.compress.apply import Job, apply
from compressor.compress.output.ggml import fitting, packed, rounded_scales
from compressor.compress.output.gguf import export_gguf
from compressor.compress.output.verify import export_dense
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ModelError, RecipeError, ResourceError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.schemes import Dense, Operator
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3_moe": "qwen3moe"}


def compress(model: Path, out: Path, passes: str, more: str = "") -> Path:
    text = f"{more}passes: [{passes}]\n"
    apply(Job(parse_recipe(text), text, (), model, out, str(model)), lambda event: None)
    return out


def nearest(step: Rtn, weight: Tensor) -> Operator:
    steps = step.steps([weight], step.rounding(weight.shape[1], "x"), weight.dtype)
    return step._rounded("x", Dense(weight), None, steps)[0]


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's converter puts those of queries and keys of a Llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def plain(folder: Path, path: Path, kind: str = "F32", plus: float = 0.0, without: str = "") -> Path:
    """A plain folder as llama.cpp's converter makes it: what counts here of it."""
    model = Checkpoint(folder)
    config = model.config
    arch = ARCHITECTURES[config["model_type"]]
    blocks = config["num_hidden_layers"]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, blocks)
    writer = GGUFWriter(path, arch)
    writer.add_block_count(blocks)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_token_list(["a", "b"])
    writer.add_file_type(0)
    experts: dict[str, list[Tensor]] = {}
    for name in sorted(model.tensors, key=lambda name: [int(n) if n.isdigit() else 0 for n in re.split(r"[.]", name)]):
        weight = model.tensor(name).float()
        there = names.get_name(re.sub(r"experts\.\d+", "experts", name), try_suffixes=(".weight", ".bias"))
        assert there is not None
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = turned(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if weight.dim() == 1 and "norm" in name:
            weight = weight + plus
        if there == without:
            continue
        if ".experts." in name:
            experts.setdefault(there, []).append(weight)
            continue
        held = GGMLQuantizationType["F32" if weight.dim() == 1 else kind]
        writer.add_tensor(there, gguf.quantize(weight.numpy(), held), raw_dtype=held)
    for there, weights in experts.items():
        writer.add_tensor(there, torch.stack(weights).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(path: Path) -> dict[str, Tensor]:
    return {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in GGUFReader(path).tensors}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9), blocks=st.integers(1, 6), bits=st.sampled_from([2, 3, 4, 5, 6, 8]), symmetric=st.booleans(),
    group=st.sampled_from([32, 64, 128, -1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_integers_are_held_as_they_are(
    rows: int, blocks: int, bits: Any, symmetric: bool, group: int, seed: int
) -> None:
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)).to(torch.float16)
    step = Rtn(kind="rtn", bits=bits, symmetric=symmetric, group_size=group)
    made = nearest(step, weight)
    kind = fitting(made)
    if not symmetric and bits > 5:
        assert kind is None
        return
    assert kind == {True: {5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}, False: {5: "Q5_1"}}[symmetric].get(
        bits, "Q4_0" if symmetric else "Q4_1"
    )
    found = dequantize(packed(made).numpy(), GGMLQuantizationType[kind])
    exact = made.dense()
    assert rounded_scales(made) == 0
    close = 0.0 if symmetric else 2.0**-11 * 32 * float(made.scales.abs().max())  # of `min`, which is half precision
    assert float((torch.from_numpy(found) - exact).abs().max()) <= close


@pytest.mark.parametrize("scheme", ["int8", "mxfp4a16", "nvfp4a16"])
def test_blocks_are_held_as_they_are(scheme: Any) -> None:
    weight = torch.randn(12, 192, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    step = Rtn(kind="rtn", scheme=scheme)
    made = nearest(step, weight)
    kind = fitting(made)
    assert kind == {"int8": "Q8_0", "mxfp4a16": "MXFP4", "nvfp4a16": "NVFP4"}[scheme]
    found = torch.from_numpy(dequantize(packed(made).numpy(), GGMLQuantizationType[kind]))
    whole = getattr(made, "global_scale", None)
    assert torch.equal(found if whole is None else found / whole, made.dense())


def test_what_no_type_holds() -> None:
    for columns, options in (
        (48, {}),
        (64, {"group_size": 16}),
        (64, {"bits": 8, "symmetric": False}),
        (64, {"scheme": "fp8"}),
    ):
        weight = torch.randn(4, columns)
        step = Rtn(kind="rtn", **options)  # type: ignore[arg-type]
        made = nearest(step, weight)
        assert fitting(made) is None


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["bits: 4", "scheme: nvfp4a16", "bits: 8, symmetric: false"])
def test_matrices_are_where_they_belong(family: str, scheme: str, pico: Pico, tmp_path: Path) -> None:
    model = pico(
        family, **WIDE, **({"moe_intermediate_size": 64} if family == "qwen3_moe" else {}), dtype=torch.float16
    )
    out = compress(
        model,
        tmp_path / "out",
        f"{{kind: rtn, {scheme}, group_size: 32}}" if "bits" in scheme else f"{{kind: rtn, {scheme}}}",
    )
    like = plain(model, tmp_path / "like.gguf")
    told = export_gguf(out, tmp_path / "out.gguf", like)
    assert told.size == (tmp_path / "out.gguf").stat().st_size
    kind = {"bits: 4": "Q4_0", "scheme: nvfp4a16": "NVFP4"}.get(scheme, "F32")
    assert told.kinds[kind] > 6
    assert told.rounded == 0
    export_dense(out, tmp_path / "dense")
    expected, found = decoded(plain(tmp_path / "dense", tmp_path / "dense.gguf")), decoded(tmp_path / "out.gguf")
    extra = {name for name in found if name.endswith(".scale")}
    assert set(found) - extra == set(expected)
    for name, weight in expected.items():
        scale = found.get(name.removesuffix("weight") + "scale", torch.ones(1))
        got = found[name] * (scale if weight.dim() < 3 else scale[:, None, None])
        torch.testing.assert_close(got, weight, rtol=2e-3, atol=1e-6)  # the dense folder is float16
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    if kind != "F32":
        assert fields["general.file_type"].contents() == getattr(gguf.LlamaFileType, f"MOSTLY_{kind}")


def test_other_files_are_refused(pico: Pico, tmp_path: Path) -> None:
    model, out = pico("llama", **WIDE), tmp_path / "out"
    compress(model, out, "{kind: rtn, bits: 4, group_size: 32}")
    target, like = tmp_path / "out.gguf", plain(model, tmp_path / "like.gguf")
    with pytest.raises(RecipeError, match=r"\S+ is not what it is in .*; if the two are of one model"):
        export_gguf(out, target, plain(pico("llama", **WIDE, vocab_size=600), tmp_path / "wide.gguf"))
    with pytest.raises(RecipeError, match=r"norm\.weight is not what it is"):
        export_gguf(out, target, plain(model, tmp_path / "moved.gguf", plus=0.5))
    export_gguf(out, target, plain(model, tmp_path / "gemma.gguf", plus=1.0), overwrite=True)  # as it is stored there
    with pytest.raises(RecipeError, match=r"is Q8_0; --like wants a file of 16 or 32 bits"):
        export_gguf(out, target, plain(model, tmp_path / "q8.gguf", kind="Q8_0"), overwrite=True)
    with pytest.raises(ResourceError, match="exists"):
        export_gguf(out, target, like)
    with pytest.raises(ResourceError, match="is the file that --like names"):
        export_gguf(out, like, like, overwrite=True)
    tied = plain(model, tmp_path / "tied.gguf", without="output.weight")
    with pytest.raises(RecipeError, match=r"has no output\.weight, which lm_head\.weight would be"):
        export_gguf(out, target, tied, overwrite=True)
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match="not readable as a GGUF file"):
        export_gguf(out, target, tmp_path / "no.gguf", overwrite=True)
    with pytest.raises(ModelError, match="nothing in it is compressed"):
        export_gguf(model, target, like, overwrite=True)
    before, (soft, hard) = target.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # as where a disk is full
    try:
        with pytest.raises(ResourceError, match=r"cannot be written \(.*\); free some space"):
            export_gguf(out, target, like, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []
    assert isinstance(StoredModel(out), StoredModel)


def test_experts_that_went_are_missed(pico: Pico, tmp_path: Path) -> None:
    many, few = (pico("qwen3_moe", **WIDE, moe_intermediate_size=64, num_experts=count) for count in (8, 4))
    out = compress(few, tmp_path / "out", "{kind: rtn, bits: 4, group_size: 32, targets: '*.experts.*'}")
    with pytest.raises(RecipeError, match=r"has 8 experts, .* 4|is not what it is"):
        export_gguf(out, tmp_path / "out.gguf", plain(many, tmp_path / "like.gguf"))
    assert not (tmp_path / "out.gguf").exists()
