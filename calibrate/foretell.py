"""What changes of single linears will cost the model, before any is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..runtime.model.families import Group
from ..runtime.model.skeleton import Skeleton
from .capture import Capture
from .drive import BlockRun, carry, drive
from .folders import CurvatureFolder
from .statistics import Statistics


def foretold(
    skeleton: Skeleton,
    windows: Tensor,
    scratch: Path,
    kept: CurvatureFolder,
    losses: Callable[[Sequence[str], Statistics], Mapping[str, Sequence[float]]],
    done: Callable[[int], None],
) -> dict[str, list[float]]:
    """Disk name → KL per token in nats that each of some changes of a linear's weight is expected to cost.

    It is `½ tr(M Δ H Δᵀ)` with the mean of M's diagonal in the place of M (`curvature`): of errors that have no
    direction of their own, as those of rounding, it foretells as much as M itself does.

    Args:
        windows: token ids `[samples, tokens]`.
        scratch: a folder to be made and deleted again.
        losses: disk names of linears that read the same input, and statistics of it → `tr(Δ H Δᵀ)` of each change of
            those that may be changed.
        done: told each block that is behind.
    """
    shutil.rmtree(scratch, ignore_errors=True)  # what was interrupted found nothing that is kept
    found: dict[str, list[float]] = {}
    for index, statistics in _moments(skeleton, windows, scratch):
        curvatures, inside = kept.load(index), skeleton.linears(index)
        for names, own in statistics:
            for name, lost in losses(names, own).items():
                weight = curvatures[name].trace / inside[name].out_features / windows.numel() / 2
                found[name] = [weight * loss for loss in lost]
        done(index)
    return found


def _moments(
    skeleton: Skeleton, windows: Tensor, folder: Path
) -> Iterator[tuple[int, list[tuple[list[str], Statistics]]]]:
    """Second moments of what enters the linears of each block, and the disk names of those that read it."""
    for index, blocks, _ in drive({"original": skeleton}, windows, folder):
        sums = _entering(skeleton, blocks["original"])
        yield (
            index,
            [([skeleton.disk_name(index, name) for name in group.linears], own) for group, own in sums.items()],
        )


def _entering(skeleton: Skeleton, block: BlockRun) -> dict[Group, Statistics]:
    """The same of a block, over which the text is carried."""
    groups = [group for stage in skeleton.stages(block.index) for group in stage]
    capture, sums = Capture(block.layer, groups, skeleton.dtype, stop=False), dict[Group, Statistics]()

    def run(rows: slice) -> Tensor:
        entering = block.chains.read(block.index, block.chain)[rows]
        for group, (x, weights) in capture.run(skeleton, block.runner, entering).items():
            if group not in sums:
                sums[group] = Statistics.empty(x.shape[-1], ("moment",), x.device)
            sums[group].add(x, weights)
        assert capture.output is not None
        return capture.output

    carry(block.chains, block.chain, block.index + 1, run)
    capture.close()
    return sums
