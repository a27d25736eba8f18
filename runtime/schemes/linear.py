"""What runs a linear in its stored form: the modules that those of all schemes derive from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import cpu, ops, swizzles
from .base import rounded_inputs

Blocks = tuple[Tensor | None, Tensor | None]  # diagonal blocks one below the other, and the scales of their rows

_ALL = slice(None)


class StoredLinear(nn.Module):
    """A linear layer that keeps its weight as stored.

    Attributes:
        bias: `[out_features]` or None.
    """

    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", None, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """`[..., in_features]` → `[..., out_features]`, without the bias."""
        raise NotImplementedError

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out_features, in_features]`."""
        return self.product(torch.eye(self.in_features, dtype=dtype, device=next(self.buffers()).device)).T

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """`W x + bias + up down`, for `down` `[..., rank]` that a residual's lower factor made of x."""
        result = self.product(x)
        if up is not None and down is not None:
            result = result + F.linear(down, up)
        return result if bias is None else result + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class StoredEmbedding(nn.Module):
    """An embedding whose rows are decoded when they are looked up.

    Attributes:
        plain: the model's own module, which is given the rows that are asked for; it may scale them.
        rows: as `schemes.looked_up` makes it.
    """

    def __init__(self, plain: nn.Embedding, rows: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        plain.padding_idx = None  # which counts rows of the whole
        empty = torch.empty(0, plain.embedding_dim, dtype=dtype, device=next(rows.buffers()).device)
        plain.weight = nn.Parameter(empty, requires_grad=False)  # says where rows lie, and in what dtype they come
        self.plain, self.rows = plain, rows

    def forward(self, ids: Tensor) -> Tensor:
        found = self.rows(ids.flatten(), self.plain.weight.dtype)
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        result: Tensor = torch.func.functional_call(self.plain, {"weight": found}, (places,))
        return result


class RowsLinear(StoredLinear):
    """One whose rows can be decoded on their own, so that products are made a tile of rows at a time; or, on a GPU, one
    that a kernel runs as it is.

    Attributes:
        device_layout: which of the two; then activations are taken in `dtype`.
    """

    device_layout = False
    dtype: torch.dtype

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        """Some rows of the weight, without a device layout; they may lie in `scratch`."""
        raise NotImplementedError

    def fused(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        """A kernel's product and what follows it: bias, up and down, as `affine` takes them."""
        raise NotImplementedError

    def tiled(self, x: Tensor) -> Tensor:
        """The product a tile of rows at a time."""
        return cpu.linear_tiles(x, lambda rows, scratch: self.decode(rows, x.dtype, scratch), self.out_features)

    def path(self, tokens: int, dtype: torch.dtype) -> str:
        """By what so many tokens are multiplied, in words for people."""
        return "a fused kernel" if self.device_layout else "decoding a tile of rows at a time"

    def whole(self, dtype: torch.dtype) -> Tensor:
        return super().whole(dtype) if self.device_layout else self.decode(_ALL, dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.fused(x.to(self.dtype)).to(x.dtype) if self.device_layout else self.tiled(x)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        if self.device_layout and x.dtype == self.dtype:
            return self.fused(x, bias, up, down)
        return super().affine(x, bias, up, down)

    def _keep(self, **tensors: Tensor | None) -> None:
        """Tensors of the kernels' layout, in place of those on disk."""
        self.device_layout = True
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class GroupLinear(RowsLinear):
    """Numbers that share scales in groups: packed as on disk, or in the layout of a GPU's kernel.

    Attributes:
        words, high, pairs: as `swizzles.GroupWords` has them, on a GPU.
        inputs, input_factor: what inputs are rounded to, as `rounded_inputs` takes it, the latter as bytes.
    """

    words: Tensor
    high: Tensor | None
    pairs: Tensor
    inputs: str | None = None
    input_factor: Tensor | None

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        self.register_buffer("input_factor", None, persistent=False)

    def keep_words(self, words: swizzles.GroupWords) -> None:
        """The kernel's layout, in place of what is on disk."""
        self.layout = words[3:]
        self._keep(words=words.words, high=words.high, pairs=words.pairs)

    @property
    def stored(self) -> swizzles.GroupWords:
        """The weight in the kernel's layout."""
        return swizzles.GroupWords(self.words, self.high, self.pairs, *self.layout)

    def entering(self, x: Tensor) -> Tensor:
        """Inputs as the product takes them."""
        factor = None if self.input_factor is None else self.input_factor.view(torch.float32)
        return rounded_inputs(x, self.inputs, factor)

    def fused(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        return self._multiplied(self.entering(x), *ends)

    def _multiplied(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        """A product with inputs as they are."""
        result: Tensor = ops.group_linear(x, self.words, self.high, self.pairs, self.out_features, *self.layout, *ends)
        return result

    def whole(self, dtype: torch.dtype) -> Tensor:
        if not self.device_layout:
            return super().whole(dtype)
        unit = torch.eye(self.in_features, dtype=self.dtype, device=self.words.device)
        return self._multiplied(unit).T.to(dtype)

    def tiled(self, x: Tensor) -> Tensor:
        return super().tiled(self.entering(x))
