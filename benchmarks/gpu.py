"""Every kernel on this GPU: checked against float64, tuned, and timed beside the library's dense product.

    python benchmarks/gpu.py --write
    python benchmarks/gpu.py --only linear --schemes int4 --shapes 4096x4096 8192x8192 --write

Needs torch and triton, and no installed package. Weights and caches rotate through copies that exceed the cache, inputs
are random, calls are replayed from a CUDA graph, and the median counts. Most of the time goes into compiling what is
tried: minutes for each scheme. `--write` keeps the fastest configurations in `kernels/configs/` and the tables in
`benchmarks/results/`, beside those of earlier runs, as each table is done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
if find_spec("compressor") is None:
    sys.path.insert(0, str(ROOT / "typings"))
import triton  # noqa: E402
from gpu_timing import DEVICE, DTYPE, INTERPRETED, Call, ceilings, copies_for, error, fastest, microseconds  # noqa: E402

from compressor.kernels import dispatch, layouts, ops, reference, swizzles  # noqa: E402
from compressor.kernels.dispatch import Launch, Tile  # noqa: E402
from compressor.kernels.numbers import E2M1, E4M3  # noqa: E402

TOKENS = (1, 4, 16, 32, 64, 128, 256, 512)


def tiles(tokens: int) -> list[Tile]:
    """Configurations to try for a number of tokens."""
    sizes = [size for size in (8, 16, 32, 64, 128) if min(tokens, 128) <= size < 4 * max(tokens, 4)]
    shapes = itertools.product(sizes[:2], (64, 128), (3, 5) if tokens <= 16 else (2, 3))
    found = [Tile(size, rows, 4 if size * rows <= 4096 else 8, stages) for size, rows, stages in shapes]
    return found[:2] if INTERPRETED else found


def candidates(tokens: int, rows: int, columns: int, depth: int, processors: int, sparse: bool) -> list[Launch]:
    """Ways to run a product."""
    found = []
    for tile in tiles(tokens):
        programs = -(-rows // tile.rows) * -(-tokens // tile.tokens)
        usual = dispatch.splits_for(tokens, programs, -(-columns // depth), processors)
        splits = {1, usual, max(1, usual // 2)} if tokens <= 64 else {1, usual}
        found += [Launch("gemm", tile, split) for split in sorted(splits)]
    if tokens == 1 and not sparse:
        found += [Launch("gemv", Tile(1, n, 4, 3), s) for n, s in itertools.product((32, 64, 128), (4, 8, 16))]
    if tokens >= 64:
        found.append(Launch("expand", dispatch.GEMV, 1))
    return found[:3] if INTERPRETED else found


class Scheme(NamedTuple):
    """Of a weight.

    Attributes:
        bits: of a number.
        group: columns that share a scale, half of them kept where sparse.
        block: of the wrappers.
    """

    name: str
    bits: int
    group: int
    sparse: bool = False
    block: int = 0
    floats: bool = False

    @property
    def numbers(self) -> str:
        return f"{'float' if self.floats else 'int'}{self.bits}"


class Linear:
    """A random weight of a shape in a scheme, in copies, and its products."""

    def __init__(self, rows: int, columns: int, scheme: Scheme) -> None:
        self.rows, self.columns, self.scheme = rows, columns, scheme
        _, bits, group, sparse, block, floats = scheme
        generator = torch.Generator(DEVICE).manual_seed(0)
        dense = torch.randn(rows, columns, device=DEVICE, dtype=DTYPE, generator=generator) / columns**0.5
        kept = columns // 2 if sparse else columns
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (rows, kept), device=DEVICE, generator=generator).to(torch.int8)
        scales = torch.rand(rows, -(-kept // group), device=DEVICE, generator=generator).to(DTYPE) / half / columns**0.5
        self.kind = ("armor_linear" if block else "sparse_linear") if sparse else "group_linear"
        self.rival: list[Any] | None = None
        if sparse:
            order = torch.rand(rows, columns // 4, 4, device=DEVICE, generator=generator).argsort(2).argsort(2)
            values, indices = layouts.compress24(dense, (order < 2).view(rows, columns))
            entries, used = (values, None) if bits == 16 else (codes, scales)
            stored: Any = swizzles.swizzle_sparse24(entries, indices, used, None, bits, group, DTYPE)
            values = values if bits == 16 else reference.dequantize_int(codes, scales, None, group, DTYPE)
            self.weight = layouts.expand24(values, indices)
        elif floats:
            numbers, codes = E2M1 if bits == 4 else E4M3, codes.view(torch.uint8) & (15 if bits == 4 else 0xFE)
            powers = torch.exp2(scales.float().log2().round())  # which every form of scales holds
            stored = swizzles.swizzle_floats(codes, powers, bits, group)
            self.weight = (numbers.of_bytes(codes) * reference.expand_groups(powers, columns, group)).to(DTYPE)
        else:
            stored = swizzles.swizzle_int(codes, scales, None, bits, group, DTYPE)
            self.weight = reference.dequantize_int(codes, scales, None, group, DTYPE)
        self.nbytes = sum(part.nbytes for part in stored if isinstance(part, Tensor))
        self.blocks = None
        if block:
            self.blocks = [torch.randn(n, block, device=DEVICE, dtype=DTYPE) / block**0.5 for n in (columns, rows)]
            self.nbytes += sum(part.nbytes for part in self.blocks)
        self.depth = 16 * stored.width if sparse else swizzles.TILE
        self.copies = [
            type(stored)(*(part.clone() if isinstance(part, Tensor) else part for part in stored))
            for _ in range(copies_for(self.nbytes))
        ]

    def call(self, x: Tensor) -> Callable[[Launch], Call]:
        def by(launch: Launch) -> Call:
            if not self.scheme.sparse:
                return lambda number: ops.run_group_linear(launch, x, self.copies[number], self.rows)
            b, a = self.blocks or (None, None)
            return lambda number: ops.run_sparse_linear(
                launch, ops.four_planes(x, b, None), self.copies[number], self.rows, a
            )

        return by

    def exact(self, x: Tensor) -> Tensor:
        z = x.double()
        if self.blocks:
            b, a = (part.double().view(-1, part.shape[1], part.shape[1]) for part in self.blocks)
            return reference.block_diagonal(reference.block_diagonal(z, b) @ self.weight.double().T, a)
        return z @ self.weight.double().T


def linears(options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch]) -> None:
    """Tables of products with one weight."""
    for scheme in options.schemes:
        for rows, columns in options.shapes:
            layer = Linear(rows, columns, scheme)
            dense = [layer.weight.clone() for _ in range(copies_for(2 * rows * columns))]
            options.say(f"\n{scheme.name}, {rows} x {columns}, {8 * layer.nbytes / rows / columns:.2f} bits a weight")
            options.say(
                " tokens       us     GB/s  % copy  TFLOP/s  % GEMM  x dense  x gemlite    error  configuration"
            )
            for tokens in options.tokens:
                options.say(linear_row(options, limits, found, layer, dense, tokens))
            options.keep()


def linear_row(
    options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch], layer: Linear,
    dense: list[Tensor], tokens: int,
) -> str:  # fmt: skip
    """One number of tokens."""
    gpu, group = dispatch.gpu_capability(DEVICE), layer.copies[0].group_size
    rows, columns, scheme = layer.rows, layer.columns, layer.scheme
    x = torch.randn(tokens, columns, device=DEVICE, dtype=DTYPE)
    tried = [dispatch.linear_launch(layer.kind, tokens, rows, columns, scheme.numbers, group, layer.depth, DTYPE, gpu)]
    if not options.no_tune:
        tried += candidates(tokens, rows, columns, layer.depth, gpu.processors, scheme.sparse or scheme.floats)
    best, elapsed = fastest(tried, layer.call(x), len(layer.copies))
    wrong = error(layer.call(x)(best)(0), layer.exact(x))
    assert wrong < 1e-2, f"{layer.kind}, {rows} x {columns}, {tokens} tokens, {best}: error {wrong}"
    if tokens == dispatch.bucket(tokens):
        found[dispatch.config_key(layer.kind, tokens, rows, columns, scheme.numbers, group, DTYPE)] = best
    cublas = microseconds(lambda number: F.linear(x, dense[number]), len(dense))
    other = None if scheme.sparse else gemlite_time(layer, x)
    rate, flops = layer.nbytes / elapsed * 1e6, 2 * tokens * rows * columns / elapsed * 1e6
    beside = f"{other / elapsed:.2f}" if other else "-"
    return (
        f"{tokens:>7} {elapsed:>8.1f} {rate / 1e9:>8.0f} {100 * rate / limits['bytes']:>7.0f} {flops / 1e12:>8.1f} "
        f"{100 * flops / limits['flops']:>7.0f} {cublas / elapsed:>8.2f} {beside:>10} "
        f"{wrong:>8.1e}  {best.kernel} {'x'.join(map(str, best.tile))} / {best.splits}"
    )


def gemlite_time(layer: Linear, x: Tensor) -> float | None:
    """Microseconds of gemlite's 4-bit product of the same shape, where that package is at hand."""
    if INTERPRETED or layer.scheme.numbers != "int4" or find_spec("gemlite") is None:
        return None
    try:
        from gemlite.helper import A16Wn  # type: ignore[import-not-found]

        if layer.rival is None:
            codes = torch.randint(0, 16, (layer.rows, layer.columns), device=DEVICE).to(torch.uint8)
            scales = torch.rand(layer.rows, layer.columns // layer.scheme.group, device=DEVICE).to(DTYPE) / 1024
            make = A16Wn(device=str(DEVICE), dtype=DTYPE)
            layer.rival = [
                make.from_weights(codes, scales, torch.full_like(scales, 8), 4, layer.scheme.group)
                for _ in layer.copies
            ]
        rival = layer.rival
        rival[0](x)  # it tunes itself at the first call of a shape
        return microseconds(lambda number: rival[number](x), len(rival))
    except Exception as problem:  # theirs, of any type
        print(f"    gemlite: {type(problem).__name__}: {problem}", file=sys.stderr)
        return None


class Mixture:
    """Random experts in 4 bits, in copies, and dense."""

    def __init__(self, count: int, top_k: int, hidden: int, inner: int) -> None:
        self.count, self.top_k, self.hidden, self.inner = count, top_k, hidden, inner
        (gate, first), (up, second), (down, third) = (
            self._made(*shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
        )
        joined = [swizzles.stacked_rows(pair) for pair in zip(first, second, strict=True)]
        both = itertools.product((joined, third), ("words", "pairs"))
        stacks = [torch.stack([getattr(one, part) for one in each]) for each, part in both]
        self.dense = torch.cat([gate, up], 1), down
        self.nbytes = sum(part.nbytes for part in stacks)
        touched = self.nbytes * top_k // count  # by a single token
        self.copies = [[part.clone() for part in stacks] for _ in range(copies_for(touched))]

    def _made(self, rows: int, columns: int) -> tuple[Tensor, list[swizzles.GroupWords]]:
        codes = torch.randint(-8, 8, (self.count, rows, columns), device=DEVICE).to(torch.int8)
        scales = torch.rand(self.count, rows, columns // 128, device=DEVICE).to(DTYPE) / columns**0.5 / 4
        both = list(zip(codes, scales, strict=True))
        dense = torch.stack([reference.dequantize_int(c, s, None, 128, DTYPE) for c, s in both])
        return dense, [swizzles.swizzle_int(c, s, None, 4, 128, DTYPE) for c, s in both]


def experts(options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch]) -> None:
    """Tables of mixtures beside a grouped bf16 product."""
    for count, top_k, hidden, inner in options.mixtures:
        options.say(f"\nmixture of {count} experts, {top_k} to a token, {hidden} -> {inner}, int4 groups of 128")
        options.say(" tokens       us  x bf16    error  tile")
        layer = Mixture(count, top_k, hidden, inner)
        for tokens in options.tokens:
            options.say(experts_row(options, found, layer, tokens))
        options.keep()


def experts_row(options: argparse.Namespace, found: dict[str, Launch], layer: Mixture, tokens: int) -> str:
    """One number of tokens."""
    gpu, each = dispatch.gpu_capability(DEVICE), tokens * layer.top_k // layer.count
    shape = (each, layer.inner, layer.hidden, "int4", 128, DTYPE)
    key = dispatch.config_key("experts", *shape)
    x = torch.randn(tokens, layer.hidden, device=DEVICE, dtype=DTYPE)
    weights, index = torch.rand(tokens, layer.count, device=DEVICE).topk(layer.top_k)
    weights = weights.to(DTYPE)

    def by(launch: Launch) -> Call:
        dispatch.remember(dispatch.tuned(gpu), key, launch)

        def call(number: int) -> Tensor:
            first, first_pairs, second, second_pairs = layer.copies[number]
            stacks = first, None, first_pairs, second, None, second_pairs
            result: Tensor = ops.int_experts(x, index, weights, *stacks, layer.inner, [4, 4], [128, 128])
            return result

        return call

    tried = [dispatch.experts_tile(*shape, gpu)]
    if not options.no_tune:
        tried += [tile for tile in tiles(max(16, each)) if tile.tokens >= 16]
    best, elapsed = fastest([Launch("experts", tile, 1) for tile in tried], by, len(layer.copies))
    exact = mixture(x.double(), *(part.double() for part in layer.dense), index, weights.double())
    wrong = error(by(best)(0), exact)
    assert wrong < 2e-2, f"{layer.count} experts, {tokens} tokens, {best}: error {wrong}"
    found[key] = best
    plain = None
    if not INTERPRETED:
        plain = microseconds(lambda number: grouped_dense(x, *layer.dense, index, weights), 4)
    return f"{tokens:>7} {elapsed:>8.1f} {f'{plain / elapsed:.2f}' if plain else '-':>7} {wrong:>8.1e}  {best.tile}"


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """By the book, an expert at a time."""
    result = torch.zeros_like(x)
    for expert in range(len(down)):
        token, choice = torch.where(index == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, 1)
        result.index_add_(0, token, (F.silu(gate) * up) @ down[expert].T * weights[token, choice][:, None])
    return result


def grouped_dense(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The bf16 mixture by torch's grouped product."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    ends = torch.zeros(len(down), dtype=torch.int32, device=x.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int32)
    ).cumsum(0).to(torch.int32)  # fmt: skip
    inputs = x[order // index.shape[1]]
    gate, up = torch._grouped_mm(inputs, gate_up.mT, offs=ends).chunk(2, 1)
    outer = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * weights.flatten()[order][:, None]
    return torch.zeros_like(x).index_add_(0, order // index.shape[1], outer)


class Latents(NamedTuple):
    """How a cache is made: numbers of a token, groups of heads with their own, and whether they are of 8 bits."""

    rank: int
    groups: int
    codes: bool


def attention(options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch]) -> None:
    """Tables of decoding over latents beside attention over the dense cache."""
    heads, count, head_dim = options.heads
    for kind in options.latents:
        what = f"latents of {kind.rank} in {kind.groups} groups{', 8 bits' if kind.codes else ''}"
        options.say(f"\n{what}; {heads} heads of {head_dim}, {count} queries each")
        options.say("context batch       us  kept  x dense time    GB/s  % copy    error  tile")
        for context, batch in options.contexts:
            if 10 * batch * context * (2 * kind.rank + 2 * heads * head_dim) < options.memory:
                options.say(attention_row(options, limits, found, kind, context, batch))
        options.keep()


def attention_row(
    options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch], kind: Latents, context: int,
    batch: int,
) -> str:  # fmt: skip
    """One context and batch."""
    (heads, count, head_dim), (rank, groups, codes) = options.heads, kind
    gpu, width = dispatch.gpu_capability(DEVICE), rank // groups
    queries = torch.randn(batch, heads, count, head_dim, device=DEVICE, dtype=DTYPE)
    up = torch.randn(heads, width, head_dim, device=DEVICE, dtype=DTYPE) / width**0.5
    turns = 1e4 ** (torch.arange(head_dim // 2, device=DEVICE) * 2 / head_dim)
    angles = torch.arange(context, device=DEVICE)[:, None] / turns
    tables = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    cached = read = [torch.randn(batch, context, rank, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    if codes:
        cached = [layouts.pack_latents(part, 8) for part in read]
        read = [layouts.unpack_latents(part, rank, 8, DTYPE) for part in cached]
    ends = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    shape = head_dim, count, width, width, codes, DTYPE
    key, usual = dispatch.attention_key(*shape), dispatch.attention_launch(*shape, gpu)
    size = sum(part.nbytes for part in cached)
    caches = [cached, *([part.clone() for part in cached] for _ in range(1, copies_for(size)))]
    tried = [usual]
    if not options.no_tune and not INTERPRETED:
        shapes = itertools.product((32, 64, 128), (4, 8), (1, 2), (1, 2, 4))
        tried += [Launch("attention", Tile(t, usual.tile.rows, w, s), n) for t, w, s, n in shapes]

    def by(launch: Launch) -> Call:
        dispatch.remember(dispatch.tuned(gpu), key, launch)
        given = up, *tables, ends * 0, ends, head_dim**-0.5, groups, groups, rank
        return lambda number: ops.latent_attention(queries, *caches[number], *given)

    best, elapsed = fastest(tried, by, len(caches))
    sample = [part.double() for part in (queries[-1], read[0][-1], read[1][-1], up, *tables)]
    wrong = error(by(best)(0)[-1], reference.latent_attention(*sample, head_dim**-0.5, groups, groups))
    assert wrong < 2e-2, f"latents of {rank}, {context} tokens, {best}: error {wrong}"
    found[key] = best
    caches.clear()
    full = 2 * batch * heads * context * head_dim * DTYPE.itemsize
    dense = [
        [torch.randn(batch, heads, context, head_dim, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        for _ in range(copies_for(full))
    ]
    flat = queries.flatten(1, 2)[:, :, None]
    plain = microseconds(
        lambda number: F.scaled_dot_product_attention(flat, *dense[number], enable_gqa=True), len(dense)
    )
    rate = size / elapsed * 1e6
    return (
        f"{context:>7} {batch:>5} {elapsed:>8.1f} {size / full:>5.2f} "
        f"{elapsed / plain:>13.2f} {rate / 1e9:>7.0f} {100 * rate / limits['bytes']:>7.0f} {wrong:>8.1e}  {best.tile}"
    )


def bytes_products(options: argparse.Namespace, limits: dict[str, float], found: dict[str, Launch]) -> None:
    """Tables of products of 8-bit weights and inputs, rounding of the inputs included."""
    gpu = dispatch.gpu_capability(DEVICE)
    for number, (rows, columns) in itertools.product((torch.int8, torch.float8_e4m3fn), options.shapes):
        if not dispatch.has_w8a8(number, DTYPE, rows, columns, gpu):
            continue
        options.say(f"\n{str(number).removeprefix('torch.')}, inputs too, {rows} x {columns}")
        options.say(" tokens       us  TFLOP/s  % GEMM  x dense    error")
        weight = torch.randn(rows, columns, device=DEVICE, dtype=DTYPE) / columns**0.5
        codes, scales = reference.quantize_rows(weight, number)
        copies = [codes.clone() for _ in range(copies_for(codes.nbytes))]
        dense = [weight.clone() for _ in range(copies_for(weight.nbytes))]
        for tokens in options.tokens:
            x = torch.randn(tokens, columns, device=DEVICE, dtype=DTYPE)

            def call(copy: int, x: Tensor = x, copies: list[Tensor] = copies, scales: Tensor = scales) -> Tensor:
                result: Tensor = ops.quantized_rows_linear(x, copies[copy], scales)
                return result

            inputs, factors = (part.double() for part in reference.quantize_rows(x, number))
            exact = (inputs * factors[:, None]) @ (codes.double() * scales.double()[:, None]).T
            wrong = error(call(0), exact)
            assert wrong < 1e-2, f"{number}, {rows} x {columns}, {tokens} tokens: error {wrong}"
            elapsed = microseconds(call, len(copies))
            cublas = microseconds(lambda copy, x=x, dense=dense: F.linear(x, dense[copy]), len(dense))
            flops = 2 * tokens * rows * columns / elapsed * 1e6
            options.say(
                f"{tokens:>7} {elapsed:>8.1f} {flops / 1e12:>8.1f} {100 * flops / limits['flops']:>7.0f} "
                f"{cublas / elapsed:>8.2f} {wrong:>8.1e}"
            )
        options.keep()


PARTS = {"linear": linears, "w8a8": bytes_products, "experts": experts, "attention": attention}
SCHEMES = [
    Scheme("int4", 4, 128),
    Scheme("2:4-bf16", 16, 64, sparse=True),
    Scheme("armor-bf16", 16, 64, sparse=True, block=64),
    Scheme("armor-int4", 4, 64, sparse=True, block=64),
    Scheme("int8", 8, 128),
    Scheme("int3", 3, 128),
    Scheme("nvfp4", 4, 16, floats=True),
    Scheme("mxfp4", 4, 32, floats=True),
    Scheme("mxfp8", 8, 32, floats=True),
    Scheme("fp8-block", 8, 128, floats=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "8192x8192", "28672x8192"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    names = [scheme.name for scheme in SCHEMES]
    parser.add_argument("--schemes", choices=names, nargs="+", default=names, help="of the weights of --only linear")
    parser.add_argument("--no-tune", action="store_true", help="time what would run as things are")
    parser.add_argument("--write", action="store_true", help="keep configurations and tables")
    parser.add_argument("--out", type=Path, help="a folder to keep them in, in place of the two of this checkout")
    options = parser.parse_args()
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("no GPU here; TRITON_INTERPRET=1 only shows that this script runs")
    gpu = dispatch.gpu_capability(DEVICE)
    lines: list[str] = []
    options.say = lambda line: (lines.append(line), print(line, flush=True))
    options.shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes]
    options.schemes = [scheme for scheme in SCHEMES if scheme.name in options.schemes]
    small = INTERPRETED
    options.mixtures = [(4, 2, 128, 128)] if small else [(8, 2, 4096, 14336), (64, 8, 2048, 1408)]
    options.heads = (2, 2, 32) if small else (8, 4, 128)
    kinds = [(64, 1, False), (64, 2, True)]
    if not small:
        kinds = [(512, 8, False), (256, 8, False), (512, 8, True), (512, 1, False)]
    options.latents = [Latents(*kind) for kind in kinds]
    pairs = itertools.product((4096, 32768, 131072), (1, 8, 64))
    options.contexts = [(100, 2)] if small else list(pairs)
    options.memory = 1 << 40 if small else torch.cuda.get_device_properties(DEVICE).total_memory
    limits = ceilings()
    options.say(
        f"{gpu.name}, torch {torch.__version__}, triton {triton.__version__}: copy {limits['bytes'] / 1e9:.0f} GB/s, "
        f"GEMM {limits['flops'] / 1e12:.0f} TFLOP/s"
    )
    found: dict[str, Launch] = {}
    options.keep = lambda: keep(gpu, found, lines, options.out) if options.write else None
    for part in options.only:
        PARTS[part](options, limits, found)


def keep(gpu: dispatch.GpuCapability, found: dict[str, Launch], lines: list[str], out: Path | None) -> None:
    """Write configurations among those of earlier runs, and what was printed behind what earlier runs did."""
    file = (out or dispatch.config_file(gpu).parent) / dispatch.config_file(gpu).name
    record: dict[str, Any] = {"launches": {}}
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
    for key, one in found.items():
        record["launches"][key] = {"kernel": one.kernel, "tile": list(one.tile), "splits": one.splits}
    record |= {"device": gpu.name, "backend": gpu.backend, "arch": gpu.arch, "processors": gpu.processors}
    record |= {"torch": torch.__version__, "triton": triton.__version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    results = (out or ROOT / "benchmarks" / "results") / file.with_suffix(".txt").name
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as text:
        text.write("\n".join(lines) + "\n")
    lines.clear()


if __name__ == "__main__":
    main()
