"""Types of llama.cpp with nested scales: their bytes, the solver on their grids, and the whole way to a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_gguf import compress, decoded, plain
from torch import Tensor

from compressor.compress.output.gguf import export_gguf
from compressor.compress.output.verify import export_dense, verify
from compressor.compress.passes.linear.quantizer import K_QUANTS
from compressor.compress.solvers.grid import Grid, Steps, nested_grid, range_grid
from compressor.compress.solvers.refine import differences, refine, refine_chunk, row_losses
from compressor.compress.solvers.sweep import gptq_codes
from compressor.compress.solvers.system import damped_system
from compressor.kernels.k_quants import BYTES, Parts, packed, unpacked
from compressor.kernels.k_quants import decoded as values_of
from compressor.kernels.numbers import ROUNDINGS, SUPER
from compressor.runtime import load
from compressor.runtime.errors import ModelError, RecipeError
from compressor.runtime.schemes import KQuantized, bits_per_weight, from_tensors, identical
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
HALF = Steps(torch.float16)


def anything(name: str, rows: int, blocks: int, seed: int) -> Parts:
    """Parts of every value that a type can hold."""
    rounding, draw = ROUNDINGS[name], torch.Generator().manual_seed(seed)
    columns, low = blocks * SUPER, int(rounding.numbers.low)
    codes = torch.randint(low, -low, (rows, columns), generator=draw, dtype=torch.int8)
    shape, top = (rows, columns // rounding.columns), 2**rounding.levels
    bottom = -top // 2 if rounding.symmetric else 0
    scales = torch.randint(bottom, bottom + top, shape, generator=draw, dtype=torch.int16)
    mins = None if rounding.symmetric else torch.randint(0, top, shape, generator=draw, dtype=torch.int16)
    units = torch.randn(rows, blocks, 2 - rounding.symmetric, generator=draw).half()
    return Parts(codes, scales, mins, units)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(K_QUANTS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_bytes_are_those_of_ggml(name: str, rows: int, blocks: int, seed: int) -> None:
    parts = anything(name, rows, blocks, seed)
    found = packed(parts, name)
    assert found.shape == (rows, blocks * BYTES[name])
    for one, other in zip(parts, unpacked(found, name), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    theirs = dequantize(found.numpy(), GGMLQuantizationType[name.upper()])
    torch.testing.assert_close(values_of(parts, name, torch.float32), torch.from_numpy(theirs), rtol=1e-6, atol=1e-6)
    operator = KQuantized(*parts, name)
    assert identical(from_tensors(operator.to_tensors(), operator.scheme()), operator)
    assert operator.nbytes == found.numel()
    which = torch.tensor([rows - 1, 0])
    assert torch.equal(operator.rows(which).dense(), operator.dense()[which])
    twice = operator.rows_times(torch.full((rows,), 2.0))
    assert torch.equal(twice.dense(), 2 * operator.dense())


def stored(grid: Grid, codes: Tensor, name: str) -> Tensor:
    """What a grid's codes are on disk, decoded."""
    assert grid.units is not None
    return values_of(Parts(codes.to(torch.int8), *grid.levels(), grid.units.half()), name, torch.float32)


def drawn(rows: int, blocks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with rows and groups of all sizes, not centred; and a second moment."""
    draw = torch.Generator().manual_seed(seed)
    columns = blocks * SUPER
    sizes = torch.exp(torch.randn(rows, columns // 16, generator=draw)).repeat_interleave(16, 1)
    x = torch.randn(3 * columns, columns, generator=draw) @ (torch.eye(columns) + torch.randn(columns, columns) * 0.02)
    return (torch.randn(rows, columns, generator=draw) + 0.3) * sizes, x.T @ x / len(x)


@pytest.mark.parametrize("name", K_QUANTS)
def test_what_the_solver_sees_is_what_is_stored(name: str) -> None:
    """Grids say what bytes decode to, and refinement lowers the loss of every row, and stays on what can be stored."""
    weight, moment = drawn(6, 2)
    grid = range_grid(weight, ROUNDINGS[name], HALF)
    codes = grid.codes(weight)
    torch.testing.assert_close(stored(grid, codes, name), grid.values(codes), rtol=1e-5, atol=1e-6)
    share = float((grid.values(codes) - weight).norm() / weight.norm())
    assert share < 1.2 * {2: 0.4, 3: 0.22, 4: 0.1, 5: 0.05, 6: 0.02}[grid.rounding.bits]
    target = weight.T.contiguous()
    swept, losses = gptq_codes(target, grid, damped_system(moment, 0.01))
    delta = differences(swept, grid, target)
    before = row_losses(delta, moment)
    assert float(before.sum()) < float(row_losses(grid.values(codes).T - target, moment).sum())
    for _ in range(3):
        grid = refine(swept, delta, grid, moment)
        after = row_losses(delta, moment)
        assert bool((after <= before * (1 + 1e-4)).all())
        torch.testing.assert_close(delta, differences(swept, grid, target), rtol=1e-3, atol=1e-4)
        before = after
    assert float(after.sum()) < 0.97 * float(losses.sum())
    torch.testing.assert_close(stored(grid, swept.T, name), grid.values(swept.T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q2_k", "q4_k"])
def test_scales_and_what_is_taken_away_become_the_best_there_are(name: str) -> None:
    """Of all levels of one group's scale, and then of its min, brute force finds none that is better by itself."""
    weight, moment = drawn(3, 1, seed=3)
    rounding = ROUNDINGS[name]
    grid = range_grid(weight, rounding, HALF)
    assert grid.zeros is not None
    assert grid.units is not None
    # Mins four levels from those of the range.
    moved = grid.units.repeat_interleave(grid.scales.shape[1], 1)[..., 1] * torch.where(grid.levels()[1] > 7, -4, 4)
    grid = grid.moved(grid.scales, grid.zeros + moved / grid.scales)
    target, size = weight.T.contiguous(), rounding.columns
    codes = grid.codes(weight).T.contiguous()
    kept = torch.zeros_like(codes, dtype=torch.bool)  # no code moves
    delta = differences(codes, grid, target)
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
    # One group alone: gradients of the others are not asked for.
    own = slice(0, size)
    refine_chunk(own, codes, delta[own], (moment @ delta)[own], (scales, zeros), grid, moment[own, own], kept[own])
    found = grid.moved(scales.T.contiguous(), zeros.T.contiguous())
    least, (levels, mins) = row_losses(differences(codes, found, target), moment), found.levels()
    assert mins is not None
    top, units = 2**rounding.levels, grid.units[:, 0]
    old = grid.levels()[1]
    assert old is not None
    for row in range(3):
        tried = []
        for level in range(1, top):  # with the min as it was
            step, offset = level * units[row, 0], old[row, 0] * units[row, 1]
            tried.append(_loss(found, codes, target, moment, row, step, offset))
        assert abs(torch.stack(tried).argmin() + 1 - levels[row, 0]) <= 1
        tried = []
        for level in range(top):  # with the new scale
            step, offset = levels[row, 0] * units[row, 0], level * units[row, 1]
            tried.append(_loss(found, codes, target, moment, row, step, offset))
        torch.testing.assert_close(torch.stack(tried).min(), least[row], rtol=1e-3, atol=1e-3)


def _loss(grid: Grid, codes: Tensor, target: Tensor, moment: Tensor, row: int, step: Tensor, offset: Tensor) -> Tensor:
    scales, zeros = grid.scales.clone(), grid.zeros
    assert zeros is not None
    zeros = zeros.clone()
    scales[row, 0], zeros[row, 0] = step, offset / step + grid.rounding.numbers.low
    return row_losses(differences(codes, grid.moved(scales, zeros), target), moment)[row]


def test_units_are_stored_and_nothing_is_lost_at_the_ends() -> None:
    rounding = ROUNDINGS["q4_k"]
    zero = torch.zeros(2, 8)
    grid = nested_grid(zero, zero, rounding, HALF)
    assert bool((grid.scales > 0).all())
    assert bool((grid.values(grid.codes(torch.zeros(2, 256))) == 0).all())
    scales = torch.tensor([[1e-3, 1.0, 0.5, 0.25, 0.125, 0.1, 0.9, 0.0]])
    grid = nested_grid(scales, scales / 2, rounding, HALF)
    assert grid.units is not None
    assert torch.equal(grid.units.half().float(), grid.units)
    torch.testing.assert_close(grid.scales[0, 1:7], scales[0, 1:7], rtol=0, atol=1 / 126 + 1e-3)
    assert float(grid.scales[0, 0]) == float(grid.units[0, 0, 0])  # none is zero


@pytest.mark.parametrize("name", K_QUANTS)
def test_from_recipe_to_gguf(pico: Pico, tmp_path: Path, name: str) -> None:
    model = pico("llama", **WIDE)
    passes = f"{{kind: gptq, scheme: {name}}}, {{kind: rtn, scheme: q6_k, targets: [model.embed_tokens, lm_head]}}"
    out = compress(model, tmp_path / "out", passes, "data: {samples: 4, sequence_length: 64}\n")
    found = StoredModel(out)
    assert found.operator("model.layers.1.mlp.down_proj").description == name
    assert abs(bits_per_weight(found.operator("lm_head")) - 6.5625) < 1e-6
    loaded, ids = load(out, "cpu", torch.float32), torch.arange(1, 60)[None]
    reference = load(model, "cpu", torch.float32)
    weights = {n: found.operator(n.removesuffix(".weight")).dense() for n in found.tensors}
    missing = reference.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
    export_dense(out, tmp_path / "dense")
    verify(out)
    written = export_gguf(out, tmp_path / "out.gguf", plain(tmp_path / "dense", tmp_path / "plain.gguf"))
    assert written.kinds == ({name.upper(): 14, "Q6_K": 2, "F32": 5} if name != "q6_k" else {"Q6_K": 16, "F32": 5})
    numbers = decoded(tmp_path / "out.gguf")
    torch.testing.assert_close(
        numbers["blk.1.ffn_down.weight"], found.operator("model.layers.1.mlp.down_proj").dense(), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(numbers["output.weight"], found.operator("lm_head").dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("passes", "what"),
    [
        ("{kind: rtn, scheme: q4_k}", "its 64 columns are not blocks of 256"),
        ("{kind: rtn, scheme: q4_k, bits: 3}", "bits does nothing with scheme: q4_k"),
        ("{kind: sparse24}, {kind: gptq, scheme: q6_k}", "a 2:4 pattern holds integers"),
    ],
)
def test_what_they_cannot_hold(pico: Pico, tmp_path: Path, passes: str, what: str) -> None:
    more: dict[str, Any] = WIDE if "sparse24" in passes else {}
    with pytest.raises(RecipeError, match=what):
        compress(pico("llama", **more), tmp_path / "out", passes)


def test_apply_says_how_llama_cpp_gets_it(pico: Pico, tmp_path: Path) -> None:
    recipe, model = tmp_path / "r.yaml", pico("llama", **WIDE)
    recipe.write_text("passes: [{kind: rtn, scheme: q5_k}]\n")
    said = " ".join(run("apply", recipe, model, "out", cwd=tmp_path).stdout.split())
    assert "for llama.cpp: compressor export out out.gguf --format gguf --like PLAIN" in said


def test_what_would_decode_to_other_weights_is_refused(pico: Pico, tmp_path: Path) -> None:
    out = compress(pico("llama", **WIDE), tmp_path / "out", "{kind: rtn, scheme: q4_k}")
    name = "model.layers.1.mlp.up_proj.weight_blocks"
    whole, said = load_file(out / "model.safetensors"), (out / "config.json").read_text()
    blocks = whole[name]
    for changed in (blocks[:, :-1], blocks.repeat(1, 2), blocks[:64], blocks.to(torch.int16)):
        save_file(whole | {name: changed.contiguous()}, out / "model.safetensors")
        with pytest.raises(ModelError):
            load(out)
    save_file(whole, out / "model.safetensors")
    for kind in ("q6_k", "q9_k"):
        (out / "config.json").write_text(said.replace("q4_k", kind))
        with pytest.raises(ModelError):
            load(out)
