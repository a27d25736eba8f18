"""What every pass is: a typed config, what it needs, what it would store, and what it does to a stage."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ...calibrate.walk import StageWork
from ...runtime.operators import Dense, Operator
from ..events import Event

Need = Literal["reference", "moment", "cross"]


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
# A single pattern may be written without the brackets of a list.
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


def matches(pattern: str, name: str) -> bool:
    """Whether a glob (`*.mlp.*`) or `re:` pattern (searched from the start, to the end) names a linear."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


class Pass(BaseModel):
    """One entry of a recipe's `passes`: the config is the pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: ClassVar[str]
    targets: Patterns = Field(
        ("*",), description="linears to work on: globs over names without .weight, or re: patterns"
    )
    ignore: Patterns = Field((), description="linears to leave alone, of those that match targets")

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics to collect before `apply`; none for a pass without data.

        `reference`: moments of the uncompressed model; `moment`: of the compressed chain, which serve for `reference`
        too; `cross`: cross moments of the two chains besides.
        """
        return frozenset()

    def wants(self, name: str) -> bool:
        """Whether a linear, by its disk name without `.weight`, is this pass's to rewrite."""
        return any(matches(p, name) for p in self.targets) and not any(matches(p, name) for p in self.ignore)

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """The operator that `apply` will leave, on `meta`.

        Args:
            name: disk name of the linear.
            operator: what the passes before leave of it.
            group: the linears, as they are in the model, that read the same input and are this pass's; this one among
                them.

        Raises:
            RecipeError: this pass cannot follow what was done to the linear before.
        """
        raise NotImplementedError

    def flops(self, rows: int, columns: int) -> float:
        """Floating-point operations to rewrite one linear, for the time estimate."""
        return 0.0

    def memory(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Bytes in use at the worst moment of rewriting linears `(rows, columns)` that share an input."""
        return 0.0

    def apply(self, work: StageWork) -> Iterator[Event]:
        """Replace the stage's wanted operators, and say what was done."""
        raise NotImplementedError
