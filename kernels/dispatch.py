"""Which path runs an operator: pure functions of shapes and capabilities, so they are tested without the hardware.

On a GPU a configuration comes from the device's file in `configs/`, which `benchmarks/gpu.py` writes, else from the
tables below, all of whose entries `tests/test_aot.py` compiles. Nothing is tuned while a model loads or runs.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class CpuCapability:
    """What of the processor the choice depends on."""

    bf16_matrix: bool  # AMX tiles: bf16 GEMMs far ahead of everything else at many rows
    bf16: bool  # instructions for bf16 products at all; without them bf16 is emulated
    int8: bool  # for sums of products of bytes, and oneDNN, which uses them


@cache
def cpu_capability() -> CpuCapability:
    matrix = bool(torch.cpu._is_amx_tile_supported())
    half = matrix or bool(torch.cpu._is_avx512_bf16_supported())
    return CpuCapability(matrix, half, bool(torch.cpu._is_vnni_supported()) and torch.backends.mkldnn.is_available())


def products_dtype(capability: CpuCapability) -> torch.dtype:
    """What GEMMs that tolerate rounded inputs multiply in: bfloat16 where the processor is fast at it."""
    return torch.bfloat16 if capability.bf16 else torch.float32


def int4_path(tokens: int, dtype: torch.dtype) -> str:
    """`int4pack` or `dequantize` for a batch of `tokens` on a CPU.

    The native kernel multiplies few tokens at the speed of memory; decoding once and multiplying in bf16 wins when many
    share the work (crossover: `benchmarks/cpu_decode.py`). It computes in bf16 only.
    """
    return "int4pack" if dtype == torch.bfloat16 and tokens <= 64 else "dequantize"


@dataclass(frozen=True)
class GpuCapability:
    """What of a GPU the choice depends on."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int  # 80, 90, 100, ...
    processors: int

    @property
    def assembly(self) -> bool:
        """Whether it takes NVIDIA's instructions."""
        return self.backend == "cuda"

    @property
    def family(self) -> str:
        """Of the tables below: Hopper's matrix instructions, or those since Ampere."""
        return "hopper" if self.backend == "cuda" and self.arch == 90 else "ampere"


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels run activations of a dtype on a device: a GPU, or the CPU in Triton's interpreter."""
    here = device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return here and dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def has_int_linear(bits: int, group_size: int, columns: int) -> bool:
    """Whether `int_linear` takes groups of a size: whole tiles share a scale, or whole planes that fill a tile."""
    if group_size >= columns:
        return True
    return group_size % 128 == 0 or (128 % group_size == 0 and group_size >= (16 if bits in (2, 3) else 32))


def has_sparse_linear(group_size: int, kept: int) -> bool:
    """Whether `sparse_linear` takes groups of so many of a row's `kept` entries: a quarter of a tile shares one."""
    return group_size >= kept or group_size % 32 == 0


def has_w8a8(codes: torch.dtype, dtype: torch.dtype, rows: int, columns: int, capability: GpuCapability) -> bool:
    """Whether a GPU multiplies 8-bit numbers: torch's products want multiples of 16; those of fp8 with a scale for each
    row want bf16 beside them, and Ada or Hopper."""
    if rows % 16 or columns % 16:
        return False
    fp8 = capability.backend == "cuda" and capability.arch >= 89 and dtype == torch.bfloat16
    return codes == torch.int8 or fp8


INTERPRETER = GpuCapability("interpreter", "cpu", 0, 4)


@cache
def gpu_capability(device: torch.device) -> GpuCapability:
    """Of a device that tensors lie on; of the CPU that of Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    backend = "hip" if torch.version.hip else "cuda"
    return GpuCapability(found.name, backend, 10 * found.major + found.minor, found.multi_processor_count)


class Tile(NamedTuple):
    """What a program of a GEMM works on.

    Attributes:
        tokens, rows: of the result.
        warps: of a program.
        stages: of loads in flight.
    """

    tokens: int
    rows: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """How a product runs.

    Attributes:
        kernel: `gemv`, `gemm`, or `expand` (decode the weight, a few rows at a time, in front of a dense product).
        tile: of its programs.
        splits: programs that share the columns.
    """

    kernel: str
    tile: Tile
    splits: int


# By the number of tokens up to which it serves.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "int_linear": {
        "hopper": {8: Tile(8, 64, 4, 5), 16: Tile(16, 64, 4, 4), 32: Tile(32, 128, 4, 4), 64: Tile(64, 128, 4, 3),
                   192: Tile(128, 128, 8, 3)},
        "ampere": {8: Tile(8, 64, 4, 4), 16: Tile(16, 64, 4, 4), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 4, 2),
                   192: Tile(64, 128, 8, 2)},
    },
    "sparse_linear": {
        "hopper": {8: Tile(8, 64, 4, 3), 16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 2), 64: Tile(64, 128, 8, 2)},
        "ampere": {8: Tile(8, 64, 4, 3), 16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 4, 2)},
    },
    "experts": {
        "hopper": {16: Tile(16, 64, 4, 3), 1024: Tile(32, 64, 4, 3), 1 << 30: Tile(64, 64, 4, 2)},
        "ampere": {16: Tile(16, 64, 4, 3), 1024: Tile(32, 64, 4, 2), 1 << 30: Tile(64, 64, 8, 2)},
    },
}  # fmt: skip
GEMV = Tile(1, 64, 4, 3)
TILES_PER_SPLIT = 4  # tiles of columns that a program gets at least
PROGRAMS = 4  # that a processor should have


def splits_for(programs: int, tiles: int, processors: int) -> int:
    """In how many parts to split the columns so that all processors have work."""
    wanted = -(-PROGRAMS * processors // programs)
    return max(1, min(wanted, tiles // TILES_PER_SPLIT, 16))


def heuristic_tile(kernel: str, tokens: int, gpu: GpuCapability) -> Tile | None:
    """By the tables; None beyond these."""
    return next((tile for most, tile in TILES[kernel][gpu.family].items() if tokens <= most), None)


def bucket(tokens: int) -> int:
    """The number of tokens that a tuned configuration is kept under."""
    return next((most for most in (1, 4, 16, 32, 64, 128, 256, 512) if tokens <= most), 1024)


def config_key(
    kernel: str, tokens: int, rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype
) -> str:
    """The name of a tuned configuration."""
    kind = str(dtype).removeprefix("torch.")
    return f"{kernel} int{bits} group {group_size} {kind} tokens {bucket(tokens)} shape {rows}x{columns}"


def config_file(gpu: GpuCapability) -> Path:
    """Where a device's tuned configurations are."""
    return Path(__file__).parent / "configs" / (gpu.name.replace(" ", "_").replace("/", "_") + ".json")


@cache
def tuned(gpu: GpuCapability) -> dict[str, Launch]:
    """A device's tuned configurations; empty where it has no file."""
    file = config_file(gpu)
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))["launches"]
    return {key: Launch(found["kernel"], Tile(*found["tile"]), found["splits"]) for key, found in entries.items()}


def nearest(key: str, entries: dict[str, Launch]) -> Launch | None:
    """A tuned configuration: of this very shape, else of the nearest size among those alike in all else."""
    if key in entries:
        return entries[key]
    alike, shape = key.rsplit(" ", 1)
    size = _size(shape)
    others = [other for other in entries if other.rsplit(" ", 1)[0] == alike]
    if not others:
        return None
    return entries[min(others, key=lambda other: abs(math.log(_size(other.rsplit(" ", 1)[1]) / size)))]


def _size(shape: str) -> int:
    rows, columns = shape.split("x")
    return int(rows) * int(columns)


def linear_launch(
    kernel: str, tokens: int, rows: int, columns: int, bits: int, group_size: int, depth: int, dtype: torch.dtype,
    gpu: GpuCapability,
) -> Launch:  # fmt: skip
    """How a product runs.

    Args:
        kernel: `int_linear` or `sparse_linear`.
        tokens, rows, columns: of the inputs and the weight.
        bits, group_size: of its codes.
        depth: columns of a tile.
        dtype: of the activations.
    """
    if found := nearest(config_key(kernel, tokens, rows, columns, bits, group_size, dtype), tuned(gpu)):
        return found
    tile = heuristic_tile(kernel, tokens, gpu)
    if tile is None:
        return Launch("expand", GEMV, 1)
    programs = -(-rows // tile.rows) * -(-tokens // tile.tokens)
    return Launch("gemm", tile, splits_for(programs, -(-columns // depth), gpu.processors))


def experts_tile(
    pairs: int, rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype, gpu: GpuCapability
) -> Tile:
    """What a program of a mixture works on, by the pairs of token and choice that an expert has on average."""
    found = nearest(config_key("experts", pairs, rows, columns, bits, group_size, dtype), tuned(gpu))
    tile = heuristic_tile("experts", pairs, gpu) if found is None else found.tile
    assert tile is not None
    return tile


def attention_launch(key_width: int, value_width: int, codes: bool, dtype: torch.dtype, gpu: GpuCapability) -> Launch:
    """What a program of latent attention works on, by the latents that a head reads: wide ones leave less room.

    Returns:
        In `tile` the tokens at a time, the channels of a key's latents at a time, warps and stages; in `splits` the
        programs that a processor should have.
    """
    bits = 8 if codes else 16
    if found := nearest(config_key("attention", 1, key_width, value_width, bits, 0, dtype), tuned(gpu)):
        return found
    channels = next(part for part in (64, 32, 16) if key_width % part == 0 or (codes and part == 32))  # of a scale
    width = key_width + value_width
    if width <= 256:
        tile = Tile(64, channels, 4, 2)
    elif width <= 512:
        tile = Tile(32, channels, 8, 1 if codes else 2)
    else:
        tile = Tile(32 if gpu.family == "hopper" else 16, channels, 8, 1)
    return Launch("attention", tile, 2)


def attention_splits(lines: int, tokens: int, launch: Launch, gpu: GpuCapability) -> int:
    """Into how many spans to divide the tokens of `lines` (sequences × key-value heads)."""
    wanted = -(-launch.splits * gpu.processors // lines)
    return max(1, min(wanted, -(-tokens // (2 * launch.tile.tokens)), 128))
