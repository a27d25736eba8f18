"""The kernels' assembly, instruction by instruction: it runs on GPUs alone, and the interpreter takes another way."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

pytest.importorskip("triton")
import torch
import triton.language as tl

from compressor.kernels.triton import common, sparse24


def execute(assembly: str, inputs: list[int], outputs: int) -> list[int]:
    """What PTX of these few instructions makes of 32-bit registers: the first `outputs` operands are results."""
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    for line in assembly.strip("{} ").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, target, *operands = words
        values = [registers[one] if one in registers else int(one, 0) for one in operands]
        registers[target] = _step(name, values) & 0xFFFFFFFF
    return [registers[f"${place}"] for place in range(outputs)]


def _step(name: str, values: list[int]) -> int:
    if name == "shr.u32":
        return values[0] >> values[1]
    if name == "shl.b32":
        return values[0] << values[1]
    if name == "and.b32":
        return values[0] & values[1]
    if name == "lop3.b32":  # bit i of the table is the result where the three bits read i
        a, b, c, table = values
        places = ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32))
        return sum((table >> place & 1) << n for n, place in enumerate(places))
    assert name == "prmt.b32", name
    a, b, selector = values
    source, result = [(a | b << 32) >> 8 * n & 255 for n in range(8)], 0
    for n in range(4):
        choice = selector >> 4 * n & 15
        byte = source[choice & 7]
        result |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * n
    return result


def text(function: Any, *arguments: Any) -> str:
    found = function(*arguments)
    return str(getattr(found, "value", found))


@pytest.mark.parametrize(("bits", "planes"), [(4, 4), (2, 8)])
@pytest.mark.parametrize(
    ("kind", "dtype", "offset"), [(tl.bfloat16, torch.bfloat16, 128), (tl.float16, torch.half, 1024)]
)
def test_codes_become_floats(bits: int, planes: int, kind: Any, dtype: torch.dtype, offset: int) -> None:
    generator = random.Random(0)
    for plane in range(planes):
        assembly = text(common._lop3, plane * bits, bits, kind)
        for _ in range(200):
            lanes = [generator.getrandbits(16) for _ in range(2)]
            (found,) = execute(assembly, [lanes[0] | lanes[1] << 16], 1)
            floats = torch.tensor([found & 0xFFFF, found >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            assert floats.tolist() == [offset + (lane >> plane * bits & 2**bits - 1) for lane in lanes]


@pytest.mark.parametrize("quarter", range(4))
def test_kept_entries_go_to_their_planes(quarter: int) -> None:
    generator = random.Random(quarter)
    assembly = text(sparse24._planes_asm, quarter)
    for pairs in itertools.product(itertools.combinations(range(4), 2), repeat=2):  # where the entries of two lanes are
        maps = [generator.getrandbits(16) & ~(15 << 4 * quarter) for _ in pairs]  # other quarters have anything
        maps = [rest | sum(1 << place for place in kept) << 4 * quarter for rest, kept in zip(maps, pairs, strict=True)]
        first, second = ([generator.getrandbits(16) for _ in pairs] for _ in range(2))
        inputs = [low | high << 16 for low, high in (maps, first, second)]
        planes = execute(assembly, inputs, 4)
        for lane, kept in enumerate(pairs):
            expected = [0] * 4
            expected[kept[0]], expected[kept[1]] = first[lane], second[lane]
            assert [plane >> 16 * lane & 0xFFFF for plane in planes] == expected
