"""The loop over the blocks of a model, and over the calibration text inside a block.

Every survey of a whole model goes through `drive`, and every chain is carried over a block by `carry`, that of the walk
(which has a journal and so a loop of its own) too. Of several processes at work together each carries its own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Operator
from .chains import Chains, Spill, delete


def carry(chains: Chains, chain: str, generation: int, run: Callable[[slice], Tensor]) -> Spill:
    """Fill a generation of a chain, one micro-batch of samples after the other.

    Args:
        run: samples → what leaves the block for them, `[samples, tokens, hidden_size]`.
    """
    target = chains.create(generation, chain)
    for rows in chains.batches():
        target[rows] = run(rows)
    return target


def start_chains(
    skeleton: Skeleton, windows: Tensor, folder: Path, names: tuple[str, ...], embedding: Operator | None = None
) -> Chains:
    """Generation 0: the embedded calibration windows `[samples, tokens]`, in every chain.

    Args:
        embedding: what the compressed chain has in place of the checkpoint's.
    """
    chains = Chains(folder, names, (*windows.shape, skeleton.width))
    for name in names:
        stored = embedding if name == "compressed" else None
        carry(chains, name, 0, partial(_embedded, skeleton, windows, stored))
    chains.commit(0)
    return chains


def _embedded(skeleton: Skeleton, windows: Tensor, stored: Operator | None, rows: slice) -> Tensor:
    return skeleton.embed(windows[rows], stored)


@dataclass(frozen=True)
class BlockRun:
    """A block that the text is at, in one chain.

    Attributes:
        layer: the block with its weights; runner: the decoder with this block alone.
    """

    skeleton: Skeleton
    index: int
    chain: str
    chains: Chains
    layer: Any
    runner: Any

    def run(self, rows: slice) -> Tensor:
        """Some samples through the block, `[samples, tokens, hidden_size]`."""
        return self.skeleton.run(self.runner, self.chains.read(self.index, self.chain)[rows])

    def carry(self) -> Spill:
        """All samples through the block, into the chain's next generation."""
        return carry(self.chains, self.chain, self.index + 1, self.run)


def drive(
    skeletons: Mapping[str, Skeleton], windows: Tensor, folder: Path
) -> Iterator[tuple[int, dict[str, BlockRun], Chains]]:
    """Every block of some models of one shape side by side, each model a chain of its own.

    Whoever takes a block carries each chain over it (`BlockRun.carry`) before asking for the next.

    Args:
        skeletons: chain → model.
        windows: token ids `[samples, tokens]`.
        folder: for activations; the drive goes on where an earlier one was interrupted. Deleted at the end.
    """
    first = next(iter(skeletons.values()))
    chains = Chains(folder, tuple(skeletons), (*windows.shape, first.width))
    if (start := chains.reached) < 0:
        start_chains(first, windows, folder, tuple(skeletons))
        chains.advanced(start := 0)
    for index in range(start, first.blocks):
        blocks = {}
        for chain, skeleton in skeletons.items():
            skeleton.checkpoint.expect(index, index + 1)
            layer = skeleton.block(index)
            blocks[chain] = BlockRun(skeleton, index, chain, chains, layer, skeleton.runner(index, layer))
        yield index, blocks, chains
        chains.advanced(index + 1)
        for skeleton in skeletons.values():
            skeleton.checkpoint.release()
    delete(folder)
