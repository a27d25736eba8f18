"""Seconds of the 2:4 and ARMOR solvers on one random layer, as it grows.

    python benchmarks/solvers.py --sizes 256 512 1024 2048 4096

Iterative solvers are timed over a few iterations and told per iteration; `total` extrapolates to the iterations that
recipes ask for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.compress.solvers.armor import Factors, alternate
from compressor.compress.solvers.armor_adam import adam
from compressor.compress.solvers.lowrank import best_low_rank
from compressor.compress.solvers.sparse24 import sparsegpt, sweep_pairs
from compressor.compress.solvers.system import damped_system
from compressor.kernels.dispatch import cpu_capability, products_dtype


def layer(size: int) -> tuple[Tensor, Tensor]:
    """A weight, columns first, and a correlated second moment."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    mix = torch.randn(size, size // 4, generator=generator) / size**0.5
    x = torch.randn(2 * size, size // 4, generator=generator) @ mix.T + 0.3 * torch.randn(
        2 * size, size, generator=generator
    )
    return weight, x.T @ x


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: int, block: int) -> Iterator[tuple[str, float, int]]:
    """Solver, seconds an iteration, and iterations that recipes ask for."""
    weight, moment = layer(size)
    diagonal = moment.diagonal().clone()
    exact = damped_system(moment, act_order=True, together=4)
    system = exact.to(products_dtype(cpu_capability()))
    yield "factoring H", seconds(lambda: damped_system(moment)), 1
    values = sparsegpt(weight, system)
    yield "sparsegpt", seconds(lambda: sparsegpt(weight, system)), 1
    delta = values - weight
    yield "sparsegpt_sweep, a sweep", seconds(lambda: sweep_pairs(values, delta, system.moment)), 10
    yield "eora", seconds(lambda: best_low_rank(delta.T, exact.moment, block)), 1
    start = Factors.start(weight, diagonal, block, block)
    yield "armor, als", seconds(lambda: alternate(start.copy(), weight, diagonal, 3)) / 3, 60
    yield "armor, als + full", seconds(lambda: alternate(start.copy(), weight, exact.moment, 3)) / 3, 60
    adam(start.copy(), weight, diagonal, 2)  # what is compiled once is not timed
    yield "armor, adam", seconds(lambda: adam(start.copy(), weight, diagonal, 5)) / 5, 20000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--block", type=int, default=128, help="of ARMOR; at most an eighth of the layer")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print("| size | solver | seconds an iteration | iterations | total, s |\n|---|---|---|---|---|")
    for size in options.sizes:
        for name, each, count in measure(size, min(options.block, size // 8)):
            print(f"| {size} | {name} | {each:.3f} | {count} | {each * count:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
