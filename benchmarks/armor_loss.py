"""ARMOR's proxy loss on every linear of a model's block: NoWag-P, closed-form steps, and Adam as published.

    python benchmarks/armor_loss.py examples/tiny-llama --block-index 1 --blocks 16 32

Losses are shares of what pruning everything would lose.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from compressor.calibrate.corpus import builtin_corpus, load_tokenizer, token_windows
from compressor.calibrate.drive import start_chains
from compressor.calibrate.walk import walk
from compressor.compress.passes.linear.armor import fitting_block
from compressor.compress.solvers.armor import Factors, alternate, total_loss
from compressor.compress.solvers.armor_adam import adam
from compressor.compress.solvers.sparse24 import nowag_scales
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton


def problems(model: Path, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each linear's weight, columns first, and the diagonal of its moment."""
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint)
    tokens = token_windows(
        builtin_corpus("calibration"), load_tokenizer(model), samples=32, sequence_length=512, seed=0
    )
    found = {}
    with tempfile.TemporaryDirectory() as room:
        chains = start_chains(skeleton, tokens, Path(room), ("reference",))
        wanted = {name: ("moment",) for i in range(skeleton.blocks) for name in skeleton.linears(i)}
        for block in walk(skeleton, chains, wanted):
            for work in block.stages():
                for name, weight in work.originals.items():
                    energy = work.statistics[name].moment.diagonal().clone()
                    found[name] = weight.float().T.contiguous(), energy
            if block.index == index:
                return {name: found[name] for name in skeleton.linears(index)}
            block.advance()
    raise ValueError(f"the model has {skeleton.blocks} blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--block-index", type=int, default=1)
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--als", type=int, default=60)
    parser.add_argument("--adam", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(
        "| linear | block | NoWag-P | als | adam | als / adam | seconds, als | adam | time ratio |\n" + "|---" * 9 + "|"
    )
    for name, (weight, energy) in problems(options.model, options.block_index).items():
        inputs, outputs = nowag_scales(weight)
        target = weight / inputs / outputs
        scale = total_loss(target, energy)
        for size in options.blocks:
            start = Factors.start(target, energy, *(fitting_block([n], size) for n in weight.T.shape))
            before = time.perf_counter()
            _, closed, initial = alternate(start.copy(), target, energy, options.als)
            between = time.perf_counter()
            _, published, _ = adam(start, target, energy, options.adam)
            spent = between - before, time.perf_counter() - between
            print(
                f"| {name} | {size} | {initial / scale:.5f} | {closed / scale:.5f} | {published / scale:.5f} | "
                f"{closed / published:.3f} | {spent[0]:.1f} | {spent[1]:.1f} | 1 / {spent[1] / spent[0]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
