"""Seconds of the 2:4 and ARMOR solvers on one random layer, as it grows.

    python benchmarks/solvers.py --sizes 256 512 1024 2048 4096

Iterative solvers are timed over a few iterations and told per iteration; `total` extrapolates to the iterations that
recipes ask for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compressor.compress.solvers.armor import Factors, alternate
from compressor.compress.solvers.armor_adam import adam
from compressor.compress.solvers.lowrank import best_low_rank
from compressor.compress.solvers.pairs import sparsegpt, sweep_pairs
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--block", type=int, default=128, help="of ARMOR; at most an eighth of the layer")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print("| size | solver | seconds an iteration | iterations | total, s |\n|---|---|---|---|---|")
    for size in options.sizes:
        weight, moment = layer(size)
        block = min(options.block, size // 8)
        exact = damped_system(moment, act_order=True, together=4)
        system = exact.to(products_dtype(cpu_capability()))
        rows: list[tuple[str, float, int]] = []
        rows.append(("factoring H", seconds(lambda m=moment: damped_system(m)), 1))  # type: ignore[misc]
        values = sparsegpt(weight, system)
        rows.append(("sparsegpt", seconds(lambda: sparsegpt(weight, system)), 1))  # noqa: B023
        delta = values - weight
        rows.append(("sparsegpt_sweep, a sweep", seconds(lambda: sweep_pairs(values, delta, system.moment)), 10))  # noqa: B023
        rows.append(("eora", seconds(lambda: best_low_rank(delta.T, exact.moment, block)), 1))  # noqa: B023
        diagonal = moment.diagonal().clone()
        for name, metric, iterations in (("armor, als", diagonal, 60), ("armor, als + full", exact.moment, 60)):
            start = Factors.start(weight, diagonal, block, block)
            rows.append((name, seconds(lambda: alternate(start, weight, metric, 3)) / 3, iterations))  # noqa: B023
        start = Factors.start(weight, diagonal, block, block)
        adam(start, weight, diagonal, 2)  # what is compiled once is not timed
        rows.append(("armor, adam", seconds(lambda: adam(start, weight, diagonal, 5)) / 5, 20000))  # noqa: B023
        for name, each, count in rows:
            print(f"| {size} | {name} | {each:.3f} | {count} | {each * count:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
