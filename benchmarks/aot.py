"""Every kernel with every shipped configuration, compiled for GPUs that are not here: what it takes of them.

    python benchmarks/aot.py sm_80 sm_89 sm_90 gfx942

Registers, spills, shared memory and matrix instructions, from the machine code. Needs triton and no GPU.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compressor.kernels import dispatch
from compressor.kernels.triton import common, group_linear, grouped, latent_attention, sparse24, w8a8

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "gfx942": 65536}  # bytes that a program may have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = ("N", "NP", "K", "key_stride", "value_stride", "words_stride", "high_stride", "pairs_stride")
SIZES = ("M", "N", "NP", "K", "RANK", "SHIFT")
MATRIX = ("HMMA", "HGMMA", "IMMA", "v_mfma")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", re.M)


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spills: instructions that move registers to memory and back.
        shared: bytes of shared memory of a program.
        matrix: instructions of the tensor cores.
        instructions: of all, by kind.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    instructions: collections.Counter[str]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: str, **options: int) -> Any:
    """A kernel as `target` would run it; arguments are of `types`, pointers and ALIGNED sizes divisible by 16."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and name not in constants and (types[name].startswith("*") or name in ALIGNED)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(binary: Any, target: str) -> Resources:
    """Read from the machine code."""
    shared = binary.metadata.shared
    if TARGETS[target].backend == "hip":
        text = binary.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        kinds = collections.Counter(re.findall(r"^\s+([a-z]+_[a-z0-9]+)", text, re.M))
        return Resources(count["vgpr_count"], count["vgpr_spill_count"], shared, kinds["v_mfma"], kinds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    kinds = collections.Counter(name.split(".")[0] for name in _SASS.findall(sass))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = kinds["LDL"] + kinds["STL"]
    return Resources(registers, spills, shared, sum(kinds[name] for name in MATRIX), kinds)


class Case(NamedTuple):
    """A kernel in one configuration.

    Attributes:
        matrix: whether it has to use matrix instructions.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    matrix: bool = True


FLOAT = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def gpu(target: str) -> dispatch.GpuCapability:
    """What dispatch would know of a device of this kind."""
    found = TARGETS[target]
    arch = found.arch if isinstance(found.arch, int) else 0
    return dispatch.GpuCapability("", found.backend, arch, 132, SHARED[target])


def _typed(kernel: Any, names: dict[str, str], dtype: torch.dtype) -> dict[str, str]:
    """Types of a kernel's arguments: those given, activations for names in capitals, sizes for the others."""
    return {
        name: names.get(name) or (FLOAT[dtype] if name.isupper() and name not in SIZES else "i32")
        for name in kernel.arg_names
    }


def group_cases(target: str, bits: int, group: int, dtype: torch.dtype, floats: bool = False) -> Iterator[Case]:
    """The products with integers or floats, by the tables of `kernels/dispatch.py`."""
    device = gpu(target)
    words = {"WORDS": "*i8" if bits == 8 else "*i16", "HIGH": "*u8", "PAIRS": "*i32"}
    shared = {"BITS": bits, "FLOATS": floats, "GROUP": group, "EVEN": True, "ASM": device.assembly}
    plain = {"HAS_BIAS": False, "HAS_RESIDUAL": False}
    what = f"{'float' if floats else 'int'}{bits} group {group} {FLOAT[dtype][1:]}"
    for tile in dict.fromkeys(dispatch.tiles("group_linear", device).values()):
        sizes = {"BM": tile.tokens, "BN": tile.rows}
        for split in (True, False):
            types = _typed(group_linear.gemm_kernel, {**words, "OUT": "*fp32"} if split else words, dtype)
            ends = plain if split else {"HAS_BIAS": True, "HAS_RESIDUAL": True}
            name = f"group_linear {what} tile {tile.tokens}x{tile.rows}{' split' if split else ''}"
            yield Case(name, group_linear.gemm_kernel, types, {**shared, **ends, **sizes, "SPLIT": split}, *tile[2:])
    without = {key: shared[key] for key in ("BITS", "FLOATS", "GROUP", "ASM")}
    types, name = _typed(group_linear.expand_kernel, words, dtype), f"group_linear {what} expand"
    yield Case(name, group_linear.expand_kernel, types, {**without, "BN": 64}, 4, 2, matrix=False)
    if floats:
        return
    tile = dispatch.GEMV
    types = _typed(group_linear.gemv_kernel, {**words, "OUT": "*fp32"}, dtype)
    sizes = {"BN": tile.rows, "STAGES": tile.stages}
    name = f"group_linear {what} gemv"
    yield Case(name, group_linear.gemv_kernel, types, {**shared, **sizes}, *tile[2:], matrix=False)
    for tile in dict.fromkeys(dispatch.tiles("experts", device).values()):
        slots = {**words, "SLOTS": "*i32", "OWNERS": "*i32"}
        sizes = {"BM": tile.tokens, "BN": tile.rows}
        given = {key: value for key, value in shared.items() if key != "FLOATS"}
        for kernel in (grouped.gate_up_kernel, grouped.down_kernel):
            name = f"experts {kernel.__name__.removesuffix('_kernel')} {what} tile {tile.tokens}x{tile.rows}"
            yield Case(name, kernel, _typed(kernel, slots, dtype), {**given, **sizes}, *tile[2:])


def sparse_cases(target: str, bits: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """The products with 2:4 sparse weights, by the same tables."""
    device = gpu(target)
    values = {4: "*i16", 8: "*i8", 16: FLOAT[dtype]}[bits]
    words = {"VALUES": values, "KEPT": "*i16", "PAIRS": "*i32"}
    shared = {"BITS": bits, "GROUP": 0 if bits == 16 else 128, "WIDTH": width, "EVEN": True, "ASM": device.assembly}
    what = f"int{bits} {FLOAT[dtype][1:]} width {width}"
    for tile in dict.fromkeys(dispatch.tiles("sparse_linear", device).values()):
        for block in (0, tile.rows):
            split = block == 0
            types = _typed(sparse24.gemm_kernel, {**words, "OUT": "*fp32"} if split else words, dtype)
            ends = {"BLOCK": block, "A_CODES": False, "HAS_BIAS": False, "HAS_RESIDUAL": not split, "SPLIT": split}
            name = f"sparse_linear {what} tile {tile.tokens}x{tile.rows} {'split' if split else f'A of {block}'}"
            sizes = {"BM": tile.tokens, "BN": tile.rows}
            yield Case(name, sparse24.gemm_kernel, types, {**shared, **ends, **sizes}, *tile[2:])
    for block in (64, 128):
        types = _typed(sparse24.scatter_kernel, {}, dtype)
        sizes = {"BLOCK": block, "CODES": False, "BM": 16}
        yield Case(f"sparse_linear B of {block}", sparse24.scatter_kernel, types, sizes, 4, 2)


def attention_cases(target: str, codes: bool, dtype: torch.dtype) -> Iterator[Case]:
    """Latent attention with latents of some widths, queries in groups of 4 and 8."""
    device, kernel = gpu(target), latent_attention.decode_kernel
    latents = "*i8" if codes else FLOAT[dtype]
    given = {
        "KEYS": latents, "VALUES": latents, "KEY_SCALES": "*fp16", "VALUE_SCALES": "*fp16", "STARTS": "*i32",
        "ENDS": "*i32", "MASK": "*i1", "PAGES": "*i32", "OUT": "*fp32", "TOTALS": "*fp32", "Q": FLOAT[dtype],
        "UP": FLOAT[dtype], "scale": "fp32", "epsilon": "fp32",
    }  # fmt: skip
    for half, keys, values in ((32, 32, 32), (64, 64, 64), (64, 128, 128), (64, 256, 256), (64, 512, 512)):
        if not dispatch.has_attention(keys + values, device):
            continue
        tile = dispatch.attention_launch(2 * half, 4, keys, values, codes, dtype, device).tile
        constants = {
            "QUERIES": 4, "KEY_HEADS": 1, "VALUE_HEADS": 1, "HALF": half, "KEY_RANK": keys, "KEY_WIDTH": keys,
            "VALUE_RANK": values, "VALUE_WIDTH": values, "KEY_CODES": codes, "VALUE_CODES": codes, "HAS_BIAS": False,
            "HAS_NORM": True, "HAS_MASK": True, "PAGE": 0, "BQ": 16, "BT": tile.tokens, "BR": tile.rows,
            "BV": values,
        }  # fmt: skip
        what = f"{'8 bits' if codes else FLOAT[dtype][1:]} heads of {2 * half}, latents of {keys} and {values}"
        yield Case(f"latent_attention {what}", kernel, _typed(kernel, given, dtype), constants, *tile[2:])


def ending_cases(target: str, dtype: torch.dtype) -> Iterator[Case]:
    """What follows a split product, spans of attention, activations as bytes; sizes of one are constants to Triton."""
    ends = {"A_CODES": True, "HAS_BIAS": True, "HAS_RESIDUAL": True}
    for block, tokens, sizes in ((64, 8, {}), (128, 16, {}), (64, 8, {"M": 1, "SPLITS": 1})):
        types = _typed(common.reduce_kernel, {"PARTS": "*fp32", "A": "*i8", "SPLITS": "i32"}, dtype)
        constants = {**ends, **sizes, "BLOCK": block, "BM": tokens, "BN": block}
        yield Case(f"reduce, A of {block} {sizes or ''}", common.reduce_kernel, types, constants, 4, 2)
    for splits in (1, 64):
        types = _typed(latent_attention.combine_kernel, {"PARTS": "*fp32", "TOTALS": "*fp32", "SPLITS": "i32"}, dtype)
        constants = {"QUERIES": 4, "VALUE_WIDTH": 64, "BS": splits, "BV": 64, **({"SPLITS": 1} if splits == 1 else {})}
        yield Case(f"combine {splits}", latent_attention.combine_kernel, types, constants, 4, 2, matrix=False)
    for number, kind, largest in ((torch.int8, "*i8", 127.0), (torch.float8_e4m3fn, "*fp8e4nv", 448.0)):
        if dispatch.has_w8a8(number, dtype, 64, 64, gpu(target)):
            types = _typed(w8a8.quantize_kernel, {"CODES": kind, "SCALES": "*fp32"}, dtype)
            constants = {"LARGEST": largest, "BK": 1024}
            yield Case(f"rows to {kind[1:]}", w8a8.quantize_kernel, types, constants, 4, 2, matrix=False)
    given = {"SUMS": "*i32", "ROW_SCALES": "*fp32", "COLUMN_SCALES": "*fp32"}
    types = _typed(w8a8.rescale_kernel, given, dtype)
    constants = {"HAS_BIAS": True, "BN": 1024}
    yield Case("rescale", w8a8.rescale_kernel, types, constants, 4, 2, matrix=False)


def check(case: Case, target: str) -> Resources:
    """What a kernel takes; complains of spills, too much shared memory, or a missing matrix instruction."""
    binary = compiled(case.kernel, case.types, case.constants, target, num_warps=case.warps, num_stages=case.stages)
    found = resources(binary, target)
    assert found.spills == 0, f"{case.name}, {target}: {found.spills} spills"
    assert found.shared <= SHARED[target], f"{case.name}, {target}: {found.shared} bytes of shared memory"
    assert found.registers <= 255, f"{case.name}, {target}: {found.registers} registers"
    assert not case.matrix or found.matrix, f"{case.name}, {target}: no matrix instruction"
    return found


def every_case(target: str) -> Iterator[Case]:
    """All widths, groups and dtypes."""
    for dtype in FLOAT:
        for bits, group in itertools.product((2, 3, 4, 8), (0, 32, 64, 128)):
            yield from group_cases(target, bits, group, dtype)
    for bits, group in ((4, 16), (4, 32), (8, 32), (8, 128)):
        yield from group_cases(target, bits, group, torch.bfloat16, floats=True)
    for dtype in FLOAT:
        for bits, width in itertools.product((4, 8, 16), (16, 32)):
            yield from sparse_cases(target, bits, width, dtype)
        for codes in (False, True):
            yield from attention_cases(target, codes, dtype)
        yield from ending_cases(target, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_90"], help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--kernel", default="", help="only cases whose name has this")
    options = parser.parse_args()
    failed = 0
    for target in options.targets:
        print(
            f"{target}, triton {triton.__version__}: registers, spills, shared bytes, matrix instructions, instructions"
        )
        for case in every_case(target):
            if options.kernel not in case.name:
                continue
            try:
                found = check(case, target)
            except Exception as error:  # a compiler's, of any type
                failed += 1
                print(f"  {case.name:<72} {str(error).splitlines()[0]}", flush=True)
                continue
            total = sum(found.instructions.values())
            print(
                f"  {case.name:<72} {found.registers:>4} {found.spills:>4} {found.shared:>7} {found.matrix:>5} "
                f"{total:>6}", flush=True,
            )  # fmt: skip
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
