"""What an operator is, and how one made of several asks for the best values of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """A linear map in the form it is stored in: what passes rewrite, the writer stores and the runtime runs.

    It maps `[..., in_features]` to `[..., out_features]` and knows its stored tensors; `from_tensors` undoes
    `to_tensors` exactly. On the `meta` device an operator has shapes and bytes but no values, which is what plans use.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        ...

    @property
    def nbytes(self) -> float:
        """Bytes of the stored tensors, scales and all; of a tensor that several share, this operator's share."""
        ...

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]` this operator stands for."""
        ...

    def forward(self, x: Tensor) -> Tensor: ...

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix (`weight`, `weight_packed`, `core.indices`, ...; see `stored_name`)."""
        ...

    def scheme(self) -> dict[str, Any]:
        """What a reader must know beside the tensors; equal schemes are written once."""
        ...


@dataclass(frozen=True)
class Problem:
    """What a solver is asked: `min tr(M (T - Q) H (T - Q)ᵀ)` over what an operator can stand for.

    Attributes:
        target: T `[out_features, in_features]`.
        moment: H `[in_features, in_features]`, of the inputs that this operator sees.
        metric: M in diagonal blocks `[blocks, b, b]`, how much its outputs matter; None for the identity.
    """

    target: Tensor
    moment: Tensor
    metric: Tensor | None = None

    def loss(self, weight: Tensor) -> Tensor:
        """The loss of `[out_features, in_features]`, in float64."""
        delta = (self.target - weight).double()
        moved = delta @ self.moment.double()
        if self.metric is not None:
            count, size, _ = self.metric.shape
            moved = (self.metric.double() @ moved.view(count, size, -1)).view_as(moved)
        return (moved * delta).sum()


@runtime_checkable
class Composite(Operator, Protocol):
    """An operator made of others, of which one holds nearly all the numbers."""

    @property
    def inner(self) -> Operator:
        """That one: what a quantizer works on."""
        ...

    def with_inner(self, inner: Operator) -> Operator: ...

    def subproblem(self, problem: Problem) -> Problem:
        """What `inner` should be for this operator to solve a problem, all other parts staying as they are."""
        ...


def bits_per_weight(operator: Operator) -> float:
    """Stored bits per weight, scales, indices and factors included."""
    rows, columns = operator.shape
    return 8 * operator.nbytes / (rows * columns)


def identical(one: Any, other: Any) -> bool:
    """Whether two operators (or parts of them) have the same form and the same numbers in it, so that they decode
    alike."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if not is_dataclass(one):
        return bool(one == other)
    return all(identical(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def stored_name(linear: str, suffix: str) -> str:
    """The name of a stored tensor: below its linear's, or for a suffix that starts with `/` what follows it."""
    return suffix[1:] if suffix.startswith("/") else f"{linear}.{suffix}"


def below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a part: those whose suffix starts with `part.`, without that."""
    return {key.removeprefix(part + "."): tensor for key, tensor in tensors.items() if key.startswith(part + ".")}


def prefixed(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The inverse of `below`; shared tensors keep their names."""
    return {key if key.startswith("/") else f"{part}.{key}": tensor for key, tensor in tensors.items()}


def shared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that do not lie below the linear's name."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith("/")}
