"""What the passes share that make linears ready for a pass behind them to round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import PrivateAttr

from ....runtime.errors import RecipeError
from ..base import LinearPass, Pass


class Ahead(LinearPass):
    """A pass that is of use where another rounds what it leaves."""

    behind: ClassVar[str]  # which passes that may be
    does: ClassVar[str]  # what this one does to a linear
    _later: tuple[Pass, ...] = PrivateAttr(default=())

    def before(self, later: Sequence[Pass]) -> Ahead:
        result = self.model_copy()
        result._later = tuple(later)
        return result

    def rounds(self, step: LinearPass) -> bool:
        """Whether this pass may come before another."""
        raise NotImplementedError

    def by_rounder(self, names: Sequence[str]) -> dict[LinearPass, list[str]]:
        """Linears by the pass that rounds them."""
        found: dict[LinearPass, list[str]] = {}
        for name in names:
            found.setdefault(self.rounder(name), []).append(name)
        return found

    def rounder(self, name: str) -> LinearPass:
        """The pass that rounds a linear, right behind this one.

        Raises:
            RecipeError: there is none.
        """
        found = next((step for step in self._later if isinstance(step, LinearPass) and step.wants(name)), None)
        if found is None or not self.rounds(found):
            why = "nothing does" if found is None else f"{found.kind} does not as this needs it"
            raise RecipeError(
                f"{self.kind} {self.does} {name} for the pass behind it to round, which {why}: put {self.behind} right "
                f"behind it, or let {self.kind} ignore it"
            )
        return found
