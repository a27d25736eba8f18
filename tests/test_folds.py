"""Scales that move between norms and what reads them leave the function as it is, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, stock_logits

from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.folds import folded, norms
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.model.view import Part, changed

Pico = Callable[..., Path]
NOTHING_TO_MOVE = {"olmo2", "exaone4"}  # attention and MLP read the residual stream itself


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fold_changes_nothing(pico: Pico, family: str) -> None:
    skeleton = Skeleton(Checkpoint(pico(family, dtype=torch.float32)))
    generator, parts = torch.Generator().manual_seed(0), dict[str, Part]()
    for index in range(skeleton.blocks):
        for norm in norms(skeleton, index):
            width = skeleton.layers[index].get_submodule(norm).weight.shape[0]
            parts |= folded(skeleton, index, norm, torch.rand(width, generator=generator) + 0.5)
    assert bool(parts) == (family not in NOTHING_TO_MOVE)
    moved = Skeleton(changed(skeleton.checkpoint, parts))
    assert all(not torch.equal(moved.checkpoint.tensor(n), skeleton.checkpoint.tensor(n)) for n in parts)
    ids = torch.randint(0, 128, (2, 24), generator=generator)
    hidden = moved.embed(ids)
    for index in range(moved.blocks):
        hidden = moved.run(moved.runner(index, moved.block(index)), hidden)
    torch.testing.assert_close(
        moved.logits(hidden), stock_logits(pico(family, dtype=torch.float32), ids), rtol=1e-4, atol=1e-4
    )
