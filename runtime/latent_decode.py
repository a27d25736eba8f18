"""A decoding step over latents by the GPU kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import dispatch, layouts, ops, swizzles

HEAD_DIMS = (32, 64, 128, 256)  # whose halves fill the kernel's tiles


class LatentDecode(nn.Module):
    """What the kernel needs of a layer, in its order of channels (`swizzles.pair_order`).

    Attributes:
        up: `[kv_heads, rank / groups, head_dim]`; bias: `[kv_heads, head_dim]` or None; norm: `[head_dim]` or None.
    """

    order: Tensor
    up: Tensor
    bias: Tensor | None
    norm: Tensor | None

    @classmethod
    def of(cls, attention: Any) -> LatentDecode | None:
        """That of a `LatentAttention`, or None where the kernel does not fit it."""
        parts = attention.keys, attention.values
        dtype = next((part.dtype for part in parts if part.keeps_latents), None)
        if dtype is None:
            return None
        norm = attention.k_norm
        widths = [_groups(part, attention.kv_heads)[1] for part in parts]
        fits = (
            dispatch.has_kernels(_device(attention), dtype)
            and dispatch.has_attention(sum(widths), dispatch.gpu_capability(_device(attention)))
            and attention.head_dim in HEAD_DIMS
            and all(width % 16 == 0 for width in widths)
            and all(part.bits in (8, 16) for part in parts)
            and all(part.rank % 2 == 0 for part in parts)
            and all(width % layouts.LATENT_SPLIT == 0 or part.groups == 1
                    for part, width in zip(parts, widths, strict=True) if part.bits == 8)
            and (norm is None or (hasattr(norm, "variance_epsilon") and len(norm.weight) == attention.head_dim))
        )  # fmt: skip
        return cls(attention, dtype) if fits else None

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        super().__init__()
        keys, heads, head_dim = attention.keys, attention.kv_heads, attention.head_dim
        self.scaling, self.dtype = attention.scaling, dtype
        self.key_groups, width = _groups(keys, heads)
        self.value_groups, _ = _groups(attention.values, heads)
        self.key_bits, self.value_bits = (part.bits for part in (keys, attention.values))
        self.value_rank = attention.values.rank
        device = _device(attention)
        table = attention._rotary(1, torch.empty(0, dtype=dtype, device=device))[0]
        self.register_buffer("order", swizzles.pair_order(head_dim, table.shape[1]).to(device), persistent=False)
        if keys.keeps_latents:
            up = keys.up.whole(dtype).view(heads, head_dim, width)[:, self.order]
        else:  # keys are cached as they are
            up = torch.eye(head_dim, dtype=dtype, device=device)[self.order].expand(heads, -1, -1)
        self.register_buffer("up", up.mT.contiguous(), persistent=False)
        bias, norm = attention.key_bias, attention.k_norm
        bias = None if bias is None else bias.to(dtype).view(heads, head_dim)[:, self.order].contiguous()
        self.register_buffer("bias", bias, persistent=False)
        weight = None if norm is None else norm.weight.detach().to(dtype)[self.order].contiguous()
        self.register_buffer("norm", weight, persistent=False)
        self.epsilon = 0.0 if norm is None else float(norm.variance_epsilon)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Queries `[batch, kv_heads, queries, head_dim]` and the cache `[batch, 1, tokens, ...]` → means of the values'
        latents `[batch, kv_heads, queries, rank / groups]`."""
        batch, total = len(queries), keys.shape[2]
        keys, values = (
            (part[:, 0] if bits == 8 else part[:, 0].contiguous().view(self.dtype)).contiguous()
            for part, bits in ((keys, self.key_bits), (values, self.value_bits))
        )
        starts = torch.zeros(batch, dtype=torch.int32, device=queries.device)
        result: Tensor = ops.latent_attention(
            queries[..., self.order], keys, values, self.up, *tables, starts, starts + total, self.scaling,
            self.key_groups, self.value_groups, self.value_rank, self.bias, self.norm, self.epsilon,
            None if mask is None else mask[:, 0, 0, :total].contiguous(),
        )  # fmt: skip
        return result


def _groups(part: Any, heads: int) -> tuple[int, int]:
    """Of heads that have numbers of their own in the cache, and how many each has."""
    groups = part.groups if part.keeps_latents else heads
    return groups, part.rank // groups


def _device(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers()])).device
