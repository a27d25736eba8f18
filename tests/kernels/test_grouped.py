"""Mixtures of gated MLPs with group-quantized weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.kernels import ops, reference, swizzles

pytestmark = pytest.mark.long

Guard = Callable[[Tensor], Tensor]


def stacked(
    shape: tuple[int, int, int], parts: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[swizzles.GroupWords]]:
    """Weights of all experts, dense; and for each expert words of `parts` matrices one below the other."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    half, dense, words = 2 ** (bits - 1), [], []
    for _ in range(parts):
        codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
        scales = ((torch.rand(experts, rows, -(-columns // group), generator=generator) + 0.2) / half / 4).to(dtype)
        dense.append(
            torch.stack(
                [reference.dequantize_int(c, s, None, group, dtype) for c, s in zip(codes, scales, strict=True)]
            )
        )
        words.append([swizzles.swizzle_int(c, s, None, bits, group, dtype) for c, s in zip(codes, scales, strict=True)])
    joined = [swizzles.stacked_rows(matrices) for matrices in zip(*words, strict=True)]
    return dense, joined


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 128), (8, 32), (4, 16)])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (7, 3, 1), (40, 4, 2)])
def test_a_mixture(
    device: torch.device, guarded: Guard, close: Callable[..., None], tokens: int, experts: int, top_k: int, bits: int,
    group: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    hidden, intermediate = 160, 72
    (gate, up), first = stacked((experts, intermediate, hidden), 2, bits, group, dtype)
    (down,), second = stacked((experts, hidden, intermediate), 1, bits, group, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    coefficients, index = scores.topk(top_k)
    coefficients = coefficients.to(dtype)
    words, highs, pairs, sizes = [], [], [], []
    for each in (first, second):
        words.append(guarded(torch.stack([one.words for one in each])))
        highs.append(guarded(torch.stack([one.high for one in each])) if bits == 3 else None)
        pairs.append(guarded(torch.stack([one.pairs for one in each])))
        sizes.append(each[0].group_size)
    arguments = (
        guarded(x), guarded(index), guarded(coefficients), words[0], highs[0], pairs[0], words[1], highs[1], pairs[1],
        intermediate, [bits, bits], sizes,
    )  # fmt: skip
    result = ops.int_experts(*arguments)
    exact = reference.gated_experts(*(part.double() for part in (x, gate, up, down)), index, coefficients.double())
    close(result, exact, "mixture")
    torch.library.opcheck(
        torch.ops.compressor.int_experts.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("block", [1, 4, 16])
def test_slots_hold_every_pair_once(block: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        experts = 1 + seed % 7
        index = torch.randint(experts, (1 + seed, 2), generator=generator)
        slots, owners = ops.sorted_slots(index, experts, block)
        pairs = index.numel()
        assert sorted(slots[slots < pairs].tolist()) == list(range(pairs))
        for number, owner in enumerate(owners.tolist()):
            inside = [slot for slot in slots[number * block : (number + 1) * block].tolist() if slot < pairs]
            assert (owner >= 0) == bool(inside)
            assert all(int(index.flatten()[slot]) == owner for slot in inside)
