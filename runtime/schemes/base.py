"""What an operator is, how one made of several asks for the best values of its parts, and the list of all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import reference
from ...kernels.numbers import ROUNDINGS

if TYPE_CHECKING:
    from typing_extensions import Self

    from .linear import StoredLinear


class Operator(ABC):
    """A linear map in the form it is stored in: what passes rewrite, the writer stores and the runtime runs.

    It maps `[..., in_features]` to `[..., out_features]` and knows its stored tensors; `from_tensors` undoes
    `to_tensors` exactly. On the `meta` device an operator has shapes and bytes but no values, which is what plans use.
    Kinds are frozen dataclasses, whose fields are tensors, numbers and other operators.

    Attributes:
        kind: its name in `config.json`.
        moves_inputs: whether an operator inside meets other inputs than this one does.
        ends: of one made of others, those (by their fields) whose rows are its own, as what comes out last.
        multiplies: fields of floats by which many codes are multiplied each.
    """

    kind: ClassVar[str]
    moves_inputs: ClassVar[bool] = False
    ends: ClassVar[tuple[str, ...]] = ()
    multiplies: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""

    @property
    @abstractmethod
    def nbytes(self) -> float:
        """Bytes of the stored tensors, scales and all; of a tensor that several share, this operator's share."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]` this operator stands for."""

    def rows(self, which: Tensor | slice) -> Operator:
        """Some rows of it, in the same form; of kinds that embeddings may have."""
        raise NotImplementedError(f"{self.kind}: its rows are not taken apart")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """What it makes of `[..., in_features]`."""

    @property
    def rounds_activations(self) -> bool:
        """Whether it rounds its inputs or what lies between two factors, so that `forward` is not the product with
        `dense`; what it is made of aside (`inside`)."""
        return False

    def beyond(self, x: Tensor) -> Tensor:
        """By how much `forward` differs from the product with `dense`."""
        return self.forward(x) - F.linear(x, self.dense(x.dtype))

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix (`weight`, `weight_packed`, `core.indices`, ...; see `stored_name`)."""

    @abstractmethod
    def scheme(self) -> dict[str, Any]:
        """What a reader must know beside the tensors; equal schemes are written once."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Self:
        """The operator of stored tensors and a scheme.

        Raises:
            KeyError, ValueError: one is missing, or they do not go together.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """A short name for people: `int4 g128`."""

    @property
    def keep(self) -> Tensor | None:
        """bool `[out_features, in_features]`: the columns of each row that are stored; None for all."""
        return None

    @property
    def numbers(self) -> Operator:
        """What holds the numbers of the columns that are stored, without saying which they are."""
        return self

    def coded(self, stored: Operator) -> Operator:
        """This operator of plain numbers with what rounds them in their place.

        Args:
            stored: of the same shape; what it has for columns that are not stored does not matter.

        Raises:
            NotImplementedError: this kind cannot hold it.
        """
        raise NotImplementedError(f"{self.kind} holds no plain numbers")

    @property
    def scales_rows(self) -> bool:
        """Whether `rows_times` is at hand."""
        return bool(self.ends) and all(getattr(self, name).scales_rows for name in self.ends)

    def rows_times(self, scale: Tensor) -> Operator:
        """This operator, each row times a number of `[out_features]`. Where rows have scales these are rounded again,
        which powers of two are not subject to."""
        if not self.ends:
            raise NotImplementedError(f"{self.kind}: its rows have no scales of their own")
        return replace(self, **{name: getattr(self, name).rows_times(scale) for name in self.ends})  # type: ignore[type-var]

    def cached_bytes(self, itemsize: int) -> int:
        """Bytes that attention caches of a token's key or value, where a number of the model has `itemsize`."""
        return self.shape[0] * itemsize

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the parts that passes rewrite one after the other, in the order in which they run; empty for an
        operator that is rewritten as a whole."""
        return ()

    def between(self, moment: Tensor) -> Tensor:
        """The second moment of what enters the second factor, of what enters the first."""
        raise NotImplementedError(f"{self.kind} has no factors")

    def inside(self) -> Iterator[Operator]:
        """This operator, and all that it is made of."""
        yield self
        for _, part in self._parts():
            yield from part.inside()

    def _parts(self) -> Iterator[tuple[str, Operator]]:
        """Operators that it is made of, by their fields."""
        for field in fields(self):  # type: ignore[arg-type]
            if isinstance(part := getattr(self, field.name), Operator):
                yield field.name, part

    @property
    def lent(self) -> tuple[str, ...]:
        """Fields of parts that other operators have, too, and which are stored once."""
        return ()

    def multipliers(self) -> dict[str, Tensor]:
        """Scales of codes, its own and those of what it alone is made of, by their place in it (`core.scales`)."""
        found: dict[str, Tensor] = {name: getattr(self, name) for name in self.multiplies}
        for place, part in self._parts():
            if place not in self.lent:
                found |= {f"{place}.{name}": scales for name, scales in part.multipliers().items()}
        return found

    def multiplied(self, multipliers: Mapping[str, Tensor]) -> Self:
        """This operator with other scales in place of all of `multipliers`."""
        changed: dict[str, Any] = {name: multipliers[name] for name in self.multiplies}
        for place, part in self._parts():
            if place not in self.lent:
                changed[place] = part.multiplied({name: multipliers[f"{place}.{name}"] for name in part.multipliers()})
        return replace(self, **changed)  # type: ignore[type-var]


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


class Composite(Operator):
    """An operator made of others, of which one holds nearly all the numbers."""

    @property
    @abstractmethod
    def inner(self) -> Operator:
        """That one: what a quantizer works on."""

    @abstractmethod
    def with_inner(self, inner: Operator) -> Operator:
        """The same with another in its place."""

    @abstractmethod
    def aim(self, target: Tensor) -> Tensor:
        """The `inner` with which this operator would stand for a weight `[out_features, in_features]` exactly."""

    def seen(self, moment: Tensor) -> Tensor:
        """The second moment of what enters `inner`, of what enters this operator."""
        return moment

    def valued(self, metric: Tensor | None) -> Tensor | None:
        """How much the outputs of `inner` matter, of how much this operator's do (`Problem.metric`)."""
        return metric

    def subproblem(self, problem: Problem) -> Problem:
        """What `inner` should be for this operator to solve a problem, all other parts staying as they are."""
        return Problem(self.aim(problem.target), self.seen(problem.moment), self.valued(problem.metric))


KINDS: dict[str, tuple[type[Operator], Any]] = {}  # kind → operator, and the class of the module that runs it
LOOKUPS: dict[str, Any] = {}  # kind → the class of the module that looks rows up, where embeddings may be stored so


def register(operator: type[Operator], module: Any, rows: Any = None) -> None:
    """Let folders hold an operator.

    Args:
        module: `module(tensors, scheme, dtype)` runs it as a `StoredLinear`.
        rows: `rows(tensors, scheme)(numbers, dtype)` are some rows of it, for an embedding.
    """
    KINDS[operator.kind] = operator, module
    if rows is not None:
        LOOKUPS[operator.kind] = rows


def from_tensors(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Operator:
    """Rebuild any operator from its stored tensors and its scheme."""
    return KINDS[scheme["kind"]][0].from_tensors(tensors, scheme)


def build(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> StoredLinear:
    """The module that runs stored tensors, without a bias."""
    module: StoredLinear = KINDS[scheme["kind"]][1](tensors, scheme, dtype)
    return module


def stored_linear(
    tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], bias: Tensor | None, dtype: torch.dtype
) -> StoredLinear:
    """The module that runs an operator.

    Args:
        tensors, scheme: as `from_tensors` takes them.
        bias: `[out_features]` or None.
        dtype: of activations.
    """
    module = build(tensors, scheme, dtype)
    module.bias = None if bias is None else bias.to(dtype)
    return module


def looked_up(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Any:
    """The module that looks up rows of an operator (`register`)."""
    return LOOKUPS[scheme["kind"]](tensors, scheme)


def rewritten(operators: Mapping[str, Operator]) -> dict[str, Operator]:
    """Those that are not plain weights, under their names."""
    return {name: operator for name, operator in operators.items() if operator.kind != "dense"}


def with_factors(operator: Operator, **parts: Operator) -> Operator:
    """An operator with other factors (`Operator.factors`)."""
    return replace(operator, **parts)  # type: ignore[type-var]


def shared_prefixes(scheme: Mapping[str, Any]) -> list[str]:
    """Names that the operator's shared tensors start with."""
    found = [scheme["shared"]] if "shared" in scheme else []
    return found + [name for part in scheme.values() if isinstance(part, Mapping) for name in shared_prefixes(part)]


def bits_per_weight(operator: Operator) -> float:
    """Stored bits per weight, scales, indices and factors included."""
    rows, columns = operator.shape
    return 8 * operator.nbytes / (rows * columns)


def rounded_inputs(x: Tensor, name: str | None, scale: Tensor | None = None) -> Tensor:
    """Inputs `[..., in_features]` as they meet a weight: rounded to what a name says (`kernels.numbers.ROUNDINGS`)."""
    return x if name is None else reference.rounded(x, ROUNDINGS[name], scale)


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
