"""Models that are stored in few bits already: they are decoded as their readers do, and compressed like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.calibrate.walk import walk
from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, Warned
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import StoredModel, open_model

Pico = Callable[..., Path]
IDS = torch.arange(40)[None]


def compress(model: Path, out: Path, *passes: str, extra: str = "", heard: list[Event] | None = None) -> Plan:
    text = extra + "passes:\n" + "".join(f"  - {step}\n" for step in passes)
    listener = (lambda event: None) if heard is None else heard.append
    return apply(Job(parse_recipe(text), text, (), model, out, str(model)), listener)


def stored(pico: Pico, folder: Path, *passes: str, extra: str = "", family: str = "llama", wide: int = 64) -> Path:
    options = {"hidden_size": wide, "intermediate_size": 2 * wide} if wide != 64 else {}
    compress(pico(family, **options), folder / "source", *passes, extra=extra)
    return folder / "source"


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    model = open_model(folder)
    return {name: model.tensor(name) for name in model.tensors}


FORMS = {
    "int4": ("{kind: rtn, bits: 4, group_size: 32}", ""),
    "int8 and inputs": ("{kind: rtn, scheme: int8}", ""),
    "fp8 and inputs": ("{kind: rtn, scheme: fp8}", ""),
    "nvfp4": ("{kind: rtn, scheme: nvfp4a16}", ""),
    "gptq": ("{kind: rtn, bits: 4, group_size: 32}", "output: {format: gptq}\n"),
    "awq": ("{kind: rtn, bits: 4, group_size: 32}", "output: {format: awq}\n"),
    "2:4": ("{kind: sparse24, method: magnitude}", ""),
    "low rank": ("{kind: lorc, ratio: 0.5, calibrated: false, latent_bits: 16}", ""),
}
ROUND = "{kind: rtn, bits: 3, group_size: 32, targets: ['*.mlp.*']}"


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_model_is_compressed_as_what_it_decodes_to(pico: Pico, tmp_path: Path, form: str) -> None:
    step, extra = FORMS[form]
    source = stored(pico, tmp_path, step, extra=extra)
    export_dense(source, tmp_path / "plain")
    heard: list[Event] = []
    plan = compress(source, tmp_path / "out", ROUND, heard=heard)
    assert sum("is not stored as plain weights" in event.text for event in heard if isinstance(event, Warned)) == 1
    compress(tmp_path / "plain", tmp_path / "other", ROUND)
    ours, other = decoded(tmp_path / "out"), decoded(tmp_path / "other")
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert plan.bytes_before == open_model(source).nbytes < open_model(tmp_path / "plain").nbytes
    assert plan.bytes_after == open_model(tmp_path / "out").nbytes
    assert verify(tmp_path / "out") == []
    assert bool(load(tmp_path / "out", dtype=torch.float32)(IDS).logits.isfinite().all())


@pytest.mark.parametrize("form", ["int4", "2:4"])
def test_solvers_see_what_a_stored_model_decodes_to(
    pico: Pico, tmp_path: Path, calibration_text: Path, form: str
) -> None:
    source = stored(pico, tmp_path, FORMS[form][0])
    export_dense(source, tmp_path / "plain")
    data = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\n"
    steps = ("{kind: awq, targets: ['*.mlp.*']}", "{kind: gptq, bits: 3, group_size: 32, targets: ['*.mlp.*']}")
    for model, out in ((source, "out"), (tmp_path / "plain", "other")):
        compress(model, tmp_path / out, *steps, extra=data)
    ours, other = decoded(tmp_path / "out"), decoded(tmp_path / "other")
    assert all(torch.equal(ours[name], other[name]) for name in other)


def test_what_no_pass_rewrites_keeps_its_form_where_the_format_can_say_it(pico: Pico, tmp_path: Path) -> None:
    source = stored(pico, tmp_path, "{kind: rtn, bits: 4, group_size: 32}")
    before = {name: StoredModel(source).operator(name) for name in StoredModel(source).schemes}
    compress(source, tmp_path / "out", ROUND)
    after = StoredModel(tmp_path / "out")
    assert after.format.name == "compressed-tensors"
    kept = [name for name in before if ".self_attn." in name]
    assert len(kept) == 8
    for name in kept:
        found = after.operator(name)
        assert found.description == before[name].description == "int4 g32"
        assert torch.equal(found.dense(), before[name].dense())
    assert {after.operator(name).description for name in before if ".mlp." in name} == {"int3 g32"}
    # GPTQ's has no 8-bit floats, so what is kept of these is decoded; no outside reader takes 3 bits in two layouts.
    eights = stored(pico, tmp_path / "eights", "{kind: rtn, scheme: fp8}")
    plan = compress(eights, tmp_path / "gptq", ROUND, extra="output: {format: gptq}\n")
    assert {plan.linears[name].operator.description for name in kept} == {"dense"}
    assert set(StoredModel(tmp_path / "gptq").schemes) == {name for name in before if ".mlp." in name}
    with pytest.raises(RecipeError, match="whose readers cannot take"):
        compress(eights, tmp_path / "no", "{kind: rtn, scheme: nvfp4}", extra="output: {format: gptq}\n")


def test_a_form_that_only_we_read_is_kept_where_nothing_else_is_rewritten(pico: Pico, tmp_path: Path) -> None:
    source = stored(pico, tmp_path, "{kind: sparse24, method: magnitude}", family="mixtral")
    data = "data: {samples: 4, sequence_length: 32}\n"
    compress(source, tmp_path / "out", "{kind: expert_prune, ratio: 0.25, refit: false}", extra=data)
    before, after = StoredModel(source), StoredModel(tmp_path / "out")
    assert after.format.name == before.format.name == "compressor"
    assert {after.operator(name).kind for name in after.schemes} == {"sparse24"}
    assert len(after.schemes) == len(before.schemes) - 2 * 3  # an expert of each of two blocks
    assert verify(tmp_path / "out") == []


def test_an_embedding_that_is_stored_in_few_bits_stays(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    both = "{kind: rtn, bits: 8, group_size: 32, targets: ['*', model.embed_tokens, lm_head]}"
    source = stored(pico, tmp_path, both)
    data = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\n"
    compress(source, tmp_path / "out", "{kind: gptq, bits: 4, group_size: 32}", extra=data)
    before, after = StoredModel(source), StoredModel(tmp_path / "out")
    for name in ("model.embed_tokens", "lm_head"):
        assert after.operator(name).description == "int8 g32"
        assert torch.equal(after.operator(name).dense(), before.operator(name).dense())
    assert verify(tmp_path / "out") == []


def test_scales_are_not_moved_into_what_stays(pico: Pico, tmp_path: Path) -> None:
    source = stored(pico, tmp_path, "{kind: rtn, bits: 4, group_size: 32, targets: '*.up_proj'}")
    skeleton = Skeleton(open_model(source))
    for stays in (frozenset[str](), frozenset(f"model.layers.{index}.mlp.up_proj" for index in range(2))):
        offered = {
            name for block in walk(skeleton, None, {}, stays=stays) for work in block.stages() for name in work.seams
        }
        assert "input_layernorm" in offered
        assert ("post_attention_layernorm" in offered) == (not stays)


def test_later_layers_see_what_stays_round_its_inputs(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    """As they do where a pass in front makes the same of plain weights."""
    eights, rest = (
        "{kind: rtn, scheme: int8, targets: '*.self_attn.*'}",
        "{kind: gptq, bits: 3, group_size: 32, targets: '*.mlp.*'}",
    )
    compress(pico("llama", dtype=torch.float32), tmp_path / "source", eights)
    export_dense(tmp_path / "source", tmp_path / "plain")
    data = f"data: {{source: {calibration_text}, samples: 8, sequence_length: 32}}\n"
    compress(tmp_path / "source", tmp_path / "kept", rest, extra=data)
    compress(tmp_path / "plain", tmp_path / "rounded", eights, rest, extra=data)
    compress(tmp_path / "plain", tmp_path / "exact", rest, extra=data)
    kept, rounded, exact = (decoded(tmp_path / name) for name in ("kept", "rounded", "exact"))
    last = "model.layers.1.mlp.down_proj.weight"
    assert (kept[last] - rounded[last]).norm() < 0.1 * (kept[last] - exact[last]).norm()
