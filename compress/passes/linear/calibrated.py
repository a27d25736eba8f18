"""What the passes share that solve for a weight on calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ....runtime.errors import RecipeError
from ..base import LinearPass, Need

if TYPE_CHECKING:
    from typing_extensions import Self

    from ....runtime.schemes import Dense, Operator

Correction = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]
CORRECTION = (
    "how much of the error of earlier layers to make up for (α); 0: none; auto: as much as helps on a quarter of the "
    "calibration tokens, for a correction found on the others"
)
SWEEPS = 10  # rounds over all groups of four that are enough
ROWS = 4096  # solved at a time: memory is bounded, and GEMMs are large enough


class Calibrated(LinearPass):
    """Options of every pass that solves on calibration data."""

    apart: ClassVar[bool] = True
    correction: Correction = Field("auto", description=CORRECTION)
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the mean diagonal that is added to the inputs' second moment before it is solved with",
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="how far the inputs' second moment is moved to its diagonal, for few tokens say little of the "
        "rest; 1: all the way; auto: columns / (columns + tokens)",
    )
    sequential: bool = Field(
        True,
        description="statistics of the model as compressed so far; false: of the original model, which can be kept and "
        "used again (--statistics), but cannot be corrected for earlier errors",
    )

    def _refuse_idle(self, condition: str, *keys: str) -> None:
        """As of every pass; that there is no correction may be said where there is none."""
        super()._refuse_idle(condition, *(key for key in keys if key != "correction" or self.correction))

    @model_validator(mode="after")
    def _no_idle_correction(self) -> Self:
        if not self.sequential:
            self._refuse_idle("with sequential: false, which sees the original model only", "correction")
        return self

    def factoring(self, columns: int) -> float:
        """Bytes while a second moment is factored: two float64 copies of it and two float32 ones; with auto, that of a
        part of the tokens."""
        return (28.0 if "held_cross" in self.needs else 24.0) * columns**2

    def correcting(self, rows: int, columns: int) -> float:
        """Operations of correcting a target; with auto, of finding out how much, which takes a second system."""
        once = 2.0 * rows * columns**2 * ("cross" in self.needs)
        return once + (2.0 * columns**3 + 4.0 * rows * columns**2 if "held_cross" in self.needs else 0.0)

    def shrinkage_for(self, columns: int, tokens: int) -> float:
        """The shrinkage of a moment over so many tokens."""
        return columns / (columns + tokens) if self.shrinkage == "auto" else self.shrinkage

    @property
    def needs(self) -> frozenset[Need]:
        if not self.sequential:
            return frozenset({"reference", "moment"})
        needed: set[Need] = {"compressed", "moment"}
        needed |= {"cross"} if self.correction else set()
        return frozenset(needed | ({"held_moment", "held_cross"} if self.correction == "auto" else set()))


def parts_of(rows: int, together: int = 1, start: int = 0) -> list[slice]:
    """So many rows from one on in parts, `ROWS` at most, and one for each process that works on the model.

    Args:
        together: rows that are solved for at once.
    """
    from ....runtime.processes import size

    most = min(ROWS, together * -(-rows // (together * size())))
    return [slice(first, min(first + most, start + rows)) for first in range(start, start + rows, most)]


def plain_floats(step: str, name: str, operator: Operator) -> Dense:
    """The operator of a linear that nothing has compressed, stored as plain floats.

    Raises:
        RecipeError: it is not.
    """
    import torch

    from ....runtime.schemes import Dense

    if not isinstance(operator, Dense):
        raise RecipeError(
            f"{step} cannot take {name}, which an earlier pass has compressed: let one of the two ignore it; which "
            "passes go on where others were, and in what order, is in docs/recipes.md"
        )
    if operator.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        stored = str(operator.weight.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{step} cannot take {name}: it is stored as {stored}; "
            "let the pass ignore it, or start from a bf16, fp16 or fp32 model"
        )
    return operator
