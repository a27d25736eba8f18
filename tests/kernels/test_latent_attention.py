"""One token over a cache of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.kernels import dispatch, layouts, ops, reference

Guard = Callable[[Tensor], Tensor]
HEADS, COUNT, HEAD_DIM = 4, 3, 32


def case(
    tokens: int, batch: int, ranks: tuple[int, int], groups: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    angles = torch.arange(tokens)[:, None] / 10 ** (torch.arange(HEAD_DIM // 2) / 8)
    return {
        "queries": normal(batch, HEADS, COUNT, HEAD_DIM), "keys": normal(batch, tokens, ranks[0]),
        "values": normal(batch, tokens, ranks[1]), "up": normal(HEADS, ranks[0] // groups[0], HEAD_DIM) / 4,
        "cosines": angles.cos().to(dtype), "sines": angles.sin().to(dtype),
    }  # fmt: skip


def exact(case: dict[str, Any], groups: tuple[int, int], spans: list[Tensor], **more: Any) -> Tensor:
    """By the twin in float64, of the tokens of each sequence that are seen."""
    parts = {key: tensor.double() for key, tensor in case.items()}
    return torch.stack([
        reference.latent_attention(
            parts["queries"][i], parts["keys"][i][seen], parts["values"][i][seen], parts["up"], parts["cosines"][seen],
            parts["sines"][seen], 0.2, *groups, **more,
        )
        for i, seen in enumerate(spans)
    ])  # fmt: skip


def run(guarded: Guard, case: dict[str, Any], groups: tuple[int, int], rank: int, **more: Any) -> Tensor:
    device = guarded(torch.zeros(1)).device
    ends = torch.full((len(case["queries"]),), case["keys"].shape[1], dtype=torch.int32)
    options: dict[str, Any] = {"starts": torch.zeros_like(ends), "ends": ends, **more}
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    inputs = {key: guarded(tensor) for key, tensor in case.items()}
    result: Tensor = ops.latent_attention(
        **inputs, scale=0.2, key_groups=groups[0], value_groups=groups[1], value_rank=rank, **options
    )
    return result


@pytest.fixture(params=[1, 5], autouse=True)
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that tokens are divided into, some of which may be empty."""
    monkeypatch.setattr(dispatch, "attention_splits", lambda *about: request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("ranks", "groups"), [((64, 64), (4, 4)), ((48, 96), (1, 1)), ((128, 64), (2, 1)), ((64, 192), (1, 2))]
)
def test_ranks_and_groups(
    device: torch.device, guarded: Guard, close: Callable[..., None], ranks: tuple[int, int], groups: tuple[int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    one = case(150, 2, ranks, groups, dtype)
    close(run(guarded, one, groups, ranks[1]), exact(one, groups, [torch.arange(150)] * 2), "all tokens")


def test_ragged_spans(device: torch.device, guarded: Guard, close: Callable[..., None]) -> None:
    one = case(300, 3, (64, 64), (1, 1), torch.float16)
    starts, ends = torch.tensor([0, 17, 299]), torch.tensor([1, 300, 300])
    spans = [torch.arange(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]
    result = run(guarded, one, (1, 1), 64, starts=starts.int(), ends=ends.int())
    close(result, exact(one, (1, 1), spans), "spans")


@pytest.mark.parametrize("rows", [1, 2])
def test_masks(device: torch.device, guarded: Guard, close: Callable[..., None], rows: int) -> None:
    one = case(200, 2, (64, 64), (1, 1), torch.float16)
    mask = torch.rand(rows, 200, generator=torch.Generator().manual_seed(1)) < 0.3
    spans = [mask[i % rows].nonzero()[:, 0] for i in range(2)]
    close(run(guarded, one, (1, 1), 64, mask=mask), exact(one, (1, 1), spans), "mask")


def test_bias_and_norm(device: torch.device, guarded: Guard, close: Callable[..., None]) -> None:
    one = case(100, 2, (64, 64), (4, 1), torch.float16)
    generator = torch.Generator().manual_seed(2)
    bias, norm = torch.randn(HEADS, HEAD_DIM, generator=generator), torch.rand(HEAD_DIM, generator=generator) + 0.5
    result = run(guarded, one, (4, 1), 64, bias=bias.half(), norm=norm.half(), epsilon=1e-5)
    more = {"bias": bias.half().double(), "norm": norm.half().double(), "epsilon": 1e-5}
    close(result, exact(one, (4, 1), [torch.arange(100)] * 2, **more), "bias and norm")


@pytest.mark.parametrize(("ranks", "groups"), [((64, 64), (2, 1)), ((48, 48), (1, 1)), ((64, 128), (1, 4))])
def test_latents_of_eight_bits(
    device: torch.device, guarded: Guard, close: Callable[..., None], ranks: tuple[int, int], groups: tuple[int, int]
) -> None:
    one = case(100, 2, ranks, groups, torch.float16)
    packed = {key: layouts.pack_latents(one[key], 8) for key in ("keys", "values")}
    read = {
        key: layouts.unpack_latents(packed[key], rank, 8, torch.float16)
        for key, rank in zip(packed, ranks, strict=True)
    }  # fmt: skip
    everything = [torch.arange(100)] * 2
    result = run(guarded, {**one, **packed}, groups, ranks[1])
    close(result, exact({**one, **read}, groups, everything), "both")
    result = run(guarded, {**one, "values": packed["values"]}, groups, ranks[1])
    close(result, exact({**one, "values": read["values"]}, groups, everything), "values")


def test_pages(device: torch.device, guarded: Guard, close: Callable[..., None]) -> None:
    one, page = case(144, 2, (64, 64), (1, 1), torch.float16), 16
    count = 144 // page
    places = torch.randperm(2 * count, generator=torch.Generator().manual_seed(3)).view(2, count)
    stored = {}
    for key in ("keys", "values"):
        stored[key] = torch.empty(2 * count, page, 64, dtype=torch.float16)
        stored[key][places.flatten()] = one[key].reshape(2 * count, page, 64)
    ends = torch.tensor([144, 70])
    result = run(guarded, {**one, **stored}, (1, 1), 64, pages=places.int(), ends=ends.int())
    close(result, exact(one, (1, 1), [torch.arange(144), torch.arange(70)]), "pages")


def test_the_operator(device: torch.device) -> None:
    one = {key: tensor.to(device) for key, tensor in case(20, 1, (64, 64), (1, 1), torch.float16).items()}
    ends = torch.tensor([20], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.compressor.latent_attention.default, (*one.values(), ends - 20, ends, 0.2, 1, 1, 64),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
