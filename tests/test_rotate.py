"""Rotations of the residual stream and of values leave the function as it is, in every family that can have them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import FAMILIES, stock_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.compress.apply import Job, apply
from compressor.compress.quality import Quality
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ModelError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.rotations import Rotation, rotated, spread, stream_width, value_width
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]
NORMS_BEHIND = {"gemma2", "gemma3_text", "glm4"}
NO_NORM = {"olmo2", "exaone4"}
BESIDE = {"llava", "gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl"}
MLA = {"deepseek_v2", "deepseek_v3"}


def uneven(model: Path, folder: Path) -> Path:
    """A copy of a model whose norms' gains and biases are not all alike."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name and tensor.dim() == 1:
            tensor += torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits_of(skeleton: Skeleton, ids: Tensor) -> Tensor:
    hidden = skeleton.embed(ids)
    for index in range(skeleton.blocks):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
    return skeleton.logits(hidden)


@given(st.integers(1, 700), st.one_of(st.none(), st.integers(0, 5)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_rotation_is_orthogonal_spreads_and_keeps_the_mean_where_it_has_to(
    size: int, seed: int | None, keeps: bool
) -> None:
    factors = spread(size)
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        torch.testing.assert_close(factor, factor.T)
        assert float(factor.abs().max()) <= (2.0 / len(factor)) ** 0.5 + 1e-6
        whole = torch.kron(whole, factor.double())
    assert whole.shape == (size, size)
    assert float((whole[0] - size**-0.5).abs().max()) < 1e-6
    matrix = Rotation(size, seed, keeps)(torch.eye(size)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    if keeps:
        torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    else:
        signs = torch.diag((matrix @ whole.T).round())
        torch.testing.assert_close(matrix, signs.diag() @ whole, rtol=1e-5, atol=1e-5)
        assert set(signs.tolist()) <= ({1.0} if seed is None else {1.0, -1.0})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_model_is_the_same(pico: Pico, tmp_path: Path, family: str) -> None:
    skeleton = Skeleton(Checkpoint(uneven(pico(family, dtype=torch.float32), tmp_path / "uneven")))
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = logits_of(skeleton, ids)
    head = value_width(skeleton)
    assert (head == 0) == (family in MLA)
    wholes = [None]
    if family in NORMS_BEHIND | NO_NORM | BESIDE:
        message = {"glm4": "weighs channels", "gemma2": "weighs channels", "gemma3_text": "weighs channels"}
        default = "no norm before it" if family in NO_NORM else "sees or hears"
        with pytest.raises(ModelError, match=message.get(family, default)):
            stream_width(skeleton)
    else:
        wholes.append(Rotation(stream_width(skeleton), 0, skeleton.family.centered))
    for whole in wholes:
        for values in (None, Rotation(head, 3)) if head else (None,):
            turned = Skeleton(rotated(skeleton, whole, values))
            changed = {
                name
                for name in skeleton.checkpoint.tensors
                if not torch.equal(skeleton.checkpoint.tensor(name), turned.checkpoint.tensor(name))
            }
            wanted = {name for name in skeleton.checkpoint.tensors if whole is not None and "embed_tokens" in name}
            assert wanted <= changed
            assert bool(changed) == bool(whole or values)
            assert float((logits_of(turned, ids) - expected).abs().max()) < 2e-4 * float(expected.abs().max())


def test_norms_that_multiply_by_one_more_and_rows_looked_up_alone(pico: Pico) -> None:
    """Readers take the whole gain; rows of a turned embedding are those of the whole, rounded as these are stored."""
    skeleton = Skeleton(Checkpoint(pico("llama")))
    skeleton.family = replace(skeleton.family, offset_norms=True)
    turn = Rotation(64)
    turned = rotated(skeleton, turn, None)
    norm, reader = (f"model.layers.1.{name}.weight" for name in ("post_attention_layernorm", "mlp.up_proj"))
    assert not turned.tensor(norm).any()
    gain, weight = (skeleton.checkpoint.tensor(name).float() for name in (norm, reader))
    torch.testing.assert_close(turned.tensor(reader), turn(weight * (gain + 1)).bfloat16())
    which = torch.tensor([5, 0, 127])
    assert turned.by_rows("model.embed_tokens.weight")
    found = turned.rows("model.embed_tokens.weight", which)
    assert torch.equal(found, turned.tensor("model.embed_tokens.weight")[which].float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "starcoder2", "granitemoe"])
def test_rotate_in_a_recipe(pico: Pico, tmp_path: Path, family: str, tied: bool) -> None:
    """The output is the original's function to stock transformers, and what blocks lose is told as without it."""
    model = pico(family, dtype=torch.float32, tie_word_embeddings=tied)
    found = {}
    for name, passes in {"turned": "{kind: rotate}, ", "plain": ""}.items():
        rest = "{kind: rtn, bits: 8, targets: '*q_proj'}"
        text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{passes}{rest}]\n"
        told: list[Quality] = []
        apply(
            Job(parse_recipe(text), text, (), model, tmp_path / name, "x"),
            lambda event, told=told: told.append(event.quality) if hasattr(event, "quality") else None,
        )
        found[name] = told[0]
    config = Checkpoint(tmp_path / "turned").config
    assert not config["tie_word_embeddings"]
    assert Checkpoint(tmp_path / "plain").config["tie_word_embeddings"] == tied
    for quality in found.values():
        assert quality.main is not None
        assert quality.main[2].kl_mean < 1e-3
        assert max(quality.drift) < 1e-3


def test_rotate_alone_changes_nothing_for_stock_transformers(pico: Pico, tmp_path: Path) -> None:
    model = pico("qwen3_moe", dtype=torch.float32, tie_word_embeddings=True)
    text = "passes: [{kind: rotate, seed: 4}]\noutput: {format: dense}\n"
    apply(Job(parse_recipe(text), text, (), model, tmp_path / "out", "x"), lambda event: None)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = stock_logits(model, ids)
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), expected, rtol=1e-4, atol=1e-4)
