"""Which path runs an operator: pure functions of shapes and capabilities, so they are tested without the hardware.

On a GPU a configuration comes from the file in `configs/` of the device or of one of its architecture, which
`benchmarks/gpu.py` writes, else from the tables below, all of whose entries `tests/test_aot.py` compiles. Nothing is
tuned while a model loads or runs.
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
    from .cpu import sums_bytes

    matrix = bool(torch.cpu._is_amx_tile_supported())
    half = matrix or bool(torch.cpu._is_avx512_bf16_supported())
    bytes_summed = bool(torch.cpu._is_vnni_supported()) and torch.backends.mkldnn.is_available() and sums_bytes()
    return CpuCapability(matrix, half, bytes_summed)


def products_dtype(capability: CpuCapability) -> torch.dtype:
    """What GEMMs that tolerate rounded inputs multiply in: bfloat16 where the processor is fast at it."""
    return torch.bfloat16 if capability.bf16 else torch.float32


def int4_path(tokens: int, dtype: torch.dtype, capability: CpuCapability) -> str:
    """`int4pack` or `dequantize` for a batch of `tokens` on a CPU.

    The native kernel multiplies few tokens at the speed of memory; decoding once and multiplying in bf16 wins when many
    share the work (crossover: `benchmarks/cpu_decode.py`) and the processor is fast at it. It computes in bf16 only.
    """
    return "int4pack" if dtype == torch.bfloat16 and (tokens <= 64 or not capability.bf16) else "dequantize"


AMPERE_SHARED = 166912  # bytes that a program may have on an A100


@dataclass(frozen=True)
class GpuCapability:
    """What of a GPU the choice depends on."""

    name: str  # empty: of no device, for which nothing is tuned
    backend: str  # "cuda" or "hip"
    arch: int  # 80, 90, 100, ...
    processors: int
    shared: int  # bytes of shared memory that a program may have

    @property
    def assembly(self) -> bool:
        """Whether it takes NVIDIA's instructions."""
        return self.backend == "cuda"

    @property
    def family(self) -> str:
        """Of the tables below: for the instructions of Hopper, of Ampere, with its memory or with less, or of AMD."""
        if self.backend == "hip":
            return "amd"
        if self.backend == "cuda" and self.arch == 90:
            return "hopper"
        return "ampere" if self.shared >= AMPERE_SHARED else "ada"

    @property
    def trusted(self) -> bool:
        """Whether it runs these kernels as they are meant.

        Products that are chained into one sum come out wrong by the matrix instructions of data-center Blackwell and
        Thor (triton-lang/triton#10821); before Ampere, there are none for bf16.
        """
        return self.backend != "cuda" or 80 <= self.arch < 100 or self.arch >= 120


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels run activations of a dtype on a device: a GPU, or the CPU in Triton's interpreter."""
    if dtype not in (torch.bfloat16, torch.float16) or find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and gpu_capability(device).trusted


def has_group_linear(group_size: int, columns: int) -> bool:
    """Whether `group_linear` takes groups of a size: whole tiles share a scale, or whole planes that fill a tile."""
    return group_size >= columns or group_size % 128 == 0 or (128 % group_size == 0 and group_size >= 16)


def has_sparse_linear(group_size: int, kept: int) -> bool:
    """Whether `sparse_linear` takes groups of so many of a row's `kept` entries: a quarter of a tile shares one."""
    return group_size >= kept or group_size % 32 == 0


def has_attention(width: int, capability: GpuCapability) -> bool:
    """Whether as many numbers as a head reads of a token's latents, keys and values, fit a device's memory; on AMD's
    GPUs too few registers are left."""
    return width <= {"amd": 0, "ada": 512}.get(capability.family, 1024)


def has_w8a8(codes: torch.dtype, dtype: torch.dtype, rows: int, columns: int, capability: GpuCapability) -> bool:
    """Whether a GPU multiplies 8-bit numbers: torch's products want multiples of 16; those of fp8 with a scale for each
    row want bf16 beside them, and Ada or Hopper."""
    if rows % 16 or columns % 16:
        return False
    fp8 = capability.backend == "cuda" and capability.arch >= 89 and dtype == torch.bfloat16
    return codes == torch.int8 or fp8


INTERPRETER = GpuCapability("interpreter", "cpu", 0, 4, AMPERE_SHARED)


@cache
def gpu_capability(device: torch.device) -> GpuCapability:
    """Of a device that tensors lie on; of the CPU that of Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    backend = "hip" if torch.version.hip else "cuda"
    arch, shared = 10 * found.major + found.minor, found.shared_memory_per_block
    shared = getattr(found, "shared_memory_per_block_optin", shared)
    return GpuCapability(found.name, backend, arch, found.multi_processor_count, shared)


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


# By the number of tokens up to which it serves; a family without a table of its own has that of Ampere.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "group_linear": {
        "hopper": {8: Tile(8, 64, 4, 5), 16: Tile(16, 64, 4, 4), 32: Tile(32, 128, 4, 4), 64: Tile(64, 128, 4, 3),
                   192: Tile(128, 128, 8, 3)},
        "ampere": {8: Tile(8, 64, 4, 4), 16: Tile(16, 64, 4, 4), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 8, 2),
                   192: Tile(64, 128, 8, 2)},
        "amd": {16: Tile(16, 64, 4, 4), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 8, 2), 192: Tile(64, 128, 8, 2)},
    },
    "sparse_linear": {
        "hopper": {8: Tile(8, 64, 4, 3), 16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 2), 64: Tile(64, 128, 8, 2)},
        "ampere": {8: Tile(8, 64, 4, 3), 16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 8, 2)},
        "ada": {8: Tile(8, 64, 8, 3), 32: Tile(32, 64, 4, 2), 64: Tile(64, 64, 8, 1)},
        "amd": {16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 1), 64: Tile(64, 64, 8, 1)},
    },
    "experts": {
        "hopper": {16: Tile(16, 64, 4, 3), 1024: Tile(32, 64, 4, 3), 1 << 30: Tile(64, 64, 4, 2)},
        "ampere": {16: Tile(16, 64, 4, 3), 1024: Tile(32, 64, 4, 2), 1 << 30: Tile(64, 64, 8, 2)},
    },
}  # fmt: skip
TILES["armor_linear"] = TILES["sparse_linear"]  # between A and B: of the same tiles, but tuned on its own
GEMV = Tile(1, 64, 4, 3)
TILES_PER_SPLIT = 2  # tiles of columns that a program gets at least
PROGRAMS = 4  # that a processor should have


def splits_for(tokens: int, programs: int, tiles: int, processors: int) -> int:
    """In how many parts to split the columns so that all processors have work; with many tokens, parts of the result
    would take longer to write than the weight to read."""
    wanted = -(-(PROGRAMS if tokens <= 32 else 1) * processors // max(programs, 1))
    return max(1, min(wanted, tiles // TILES_PER_SPLIT, 16))


def tiles(kernel: str, gpu: GpuCapability) -> dict[int, Tile]:
    """The table of a device."""
    return TILES[kernel].get(gpu.family, TILES[kernel]["ampere"])


def heuristic_tile(kernel: str, tokens: int, gpu: GpuCapability) -> Tile | None:
    """By the tables; None beyond these."""
    return next((tile for most, tile in tiles(kernel, gpu).items() if tokens <= most), None)


def bucket(tokens: int) -> int:
    """The number of tokens that a tuned configuration is kept under."""
    return next((most for most in (1, 4, 16, 32, 64, 128, 256, 512) if tokens <= most), 1024)


def config_key(
    kernel: str, tokens: int, rows: int, columns: int, numbers: str, group_size: int, dtype: torch.dtype
) -> str:
    """The name of a tuned configuration."""
    kind = str(dtype).removeprefix("torch.")
    return f"{kernel} {numbers} group {group_size} {kind} tokens {bucket(tokens)} shape {rows}x{columns}"


def config_file(gpu: GpuCapability) -> Path:
    """Where `benchmarks/gpu.py` keeps a device's tuned configurations."""
    return Path(__file__).parent / "configs" / (gpu.name.replace(" ", "_").replace("/", "_") + ".json")


Tuned = dict[str, dict[str, Launch]]  # by what is alike, and then by shape


@cache
def tuned(gpu: GpuCapability) -> Tuned:
    """A device's tuned configurations, else those of the device of its architecture that is nearest in size.

    An H100 and an H200 chose alike in 224 of 271 cases, though their memories differ by half.
    """
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(config_file(gpu).parent.glob("*.json"))]
    alike = [
        record
        for record in records
        if gpu.name and (record.get("backend"), record.get("arch")) == (gpu.backend, gpu.arch)
    ]
    alike.sort(key=lambda record: (record["device"] != gpu.name, abs(record["processors"] - gpu.processors)))
    found: Tuned = {}
    for key, entry in alike[0]["launches"].items() if alike else ():
        remember(found, key, Launch(entry["kernel"], Tile(*entry["tile"]), entry["splits"]))
    return found


def remember(entries: Tuned, key: str, launch: Launch) -> None:
    """Keep a configuration under its `config_key`."""
    alike, shape = key.rsplit(" ", 1)
    entries.setdefault(alike, {})[shape] = launch


def nearest(key: str, entries: Tuned) -> Launch | None:
    """A tuned configuration: of this very shape, else of the nearest size among those alike in all else."""
    alike, shape = key.rsplit(" ", 1)
    shapes = entries.get(alike)
    if not shapes:
        return None
    return shapes.get(shape) or shapes[min(shapes, key=lambda other: abs(math.log(_size(other) / _size(shape))))]


def _size(shape: str) -> int:
    rows, columns = shape.split("x")
    return int(rows) * int(columns)


def linear_launch(
    kernel: str, tokens: int, rows: int, columns: int, numbers: str, group_size: int, depth: int, dtype: torch.dtype,
    gpu: GpuCapability,
) -> Launch:  # fmt: skip
    """How a product runs.

    Args:
        kernel: `group_linear`, `sparse_linear`, or `armor_linear`, which is that between A and B.
        tokens, rows, columns: of the inputs and the weight.
        numbers, group_size: of its codes: `int4`, `float4`, ..., and how many share a scale.
        depth: columns of a tile.
        dtype: of the activations.
    """
    if found := nearest(config_key(kernel, tokens, rows, columns, numbers, group_size, dtype), tuned(gpu)):
        return found
    tile = heuristic_tile(kernel, tokens, gpu)
    if tile is None:
        return Launch("expand", GEMV, 1)
    programs = -(-rows // tile.rows) * -(-tokens // tile.tokens)
    return Launch("gemm", tile, splits_for(tokens, programs, -(-columns // depth), gpu.processors))


def experts_tile(
    pairs: int, rows: int, columns: int, numbers: str, group_size: int, dtype: torch.dtype, gpu: GpuCapability
) -> Tile:
    """What a program of a mixture works on, by the pairs of token and choice that an expert has on average."""
    found = nearest(config_key("experts", pairs, rows, columns, numbers, group_size, dtype), tuned(gpu))
    tile = heuristic_tile("experts", pairs, gpu) if found is None else found.tile
    assert tile is not None
    return tile


def attention_key(
    head_dim: int, queries: int, key_width: int, value_width: int, codes: bool, dtype: torch.dtype
) -> str:
    """The name of a tuned configuration of latent attention; another shape may not fit the device's memory."""
    kind = "int8" if codes else str(dtype).removeprefix("torch.")
    return f"attention {kind} heads of {head_dim} queries {queries} shape {key_width}x{value_width}"


def attention_launch(
    head_dim: int, queries: int, key_width: int, value_width: int, codes: bool, dtype: torch.dtype, gpu: GpuCapability
) -> Launch:
    """What a program of latent attention works on, by the latents that a head reads: wide ones leave less room.

    Returns:
        In `tile` the tokens at a time, the channels of a key's latents at a time, warps and stages; in `splits` the
        programs that a processor should have.
    """
    alike, shape = attention_key(head_dim, queries, key_width, value_width, codes, dtype).rsplit(" ", 1)
    if found := tuned(gpu).get(alike, {}).get(shape):
        return found
    channels = next(part for part in (64, 32, 16) if key_width % part == 0 or (codes and part == 32))  # of a scale
    width = key_width + value_width
    if width <= 256:
        tile = Tile(64, channels, 4, 2)
    elif width <= 512:
        tile = Tile(32, channels, 8, 1 if codes or gpu.family == "ada" else 2)
    else:
        tile = Tile(32 if gpu.family == "hopper" else 16, channels, 8, 1)
    return Launch("attention", tile, 2)


def attention_splits(lines: int, tokens: int, launch: Launch, gpu: GpuCapability) -> int:
    """Into how many spans to divide the tokens of `lines` (sequences × key-value heads)."""
    wanted = -(-launch.splits * gpu.processors // lines)
    return max(1, min(wanted, -(-tokens // (2 * launch.tile.tokens)), 128))
