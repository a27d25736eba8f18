"""How long calls take on a GPU; part of `gpu.py`."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.kernels.dispatch import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # to see that this script runs; times mean nothing then
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
ROTATED = 1 << 12 if INTERPRETED else 1 << 28  # bytes that calls go through
STICKY: Any = getattr(torch, "AcceleratorError", ())  # after which nothing that this process does is worth anything
Call = Callable[[int], Any]  # of a number, which picks a copy of the weights


def microseconds(call: Call, copies: int) -> float:
    """Of a call, the median of some replays of a graph of one call for each copy."""
    if INTERPRETED:
        start = time.perf_counter()
        call(0)
        return 1e6 * (time.perf_counter() - start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(copies):
            call(number)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / copies)
    return statistics.median(times[2:])


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy, read and written, and products per second of a large bf16 GEMM."""
    room = torch.randn(1 << (10 if INTERPRETED else 29), device=DEVICE)
    target = torch.empty_like(room)
    copy = microseconds(lambda number: target.copy_(room), 4)
    size = 64 if INTERPRETED else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = microseconds(lambda number: a @ b, 4)
    return {"bytes": 2 * room.nbytes / copy * 1e6, "flops": 2 * size**3 / product * 1e6}


def copies_for(size: float) -> int:
    return max(1, min(64, int(ROTATED // size) + 1))


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def fastest(candidates: Sequence[Launch], run: Callable[[Launch], Call], copies: int) -> tuple[Launch, float]:
    """The best of some configurations; those that do not compile or fit are left out."""
    found = []
    for launch in candidates:
        try:
            found.append((microseconds(run(launch), copies), launch))
        except STICKY:
            raise
        except Exception as problem:  # a compiler's, of any type
            print(f"    {launch}: {type(problem).__name__}", file=sys.stderr)
    elapsed, best = min(found, key=lambda one: one[0])
    return best, elapsed
