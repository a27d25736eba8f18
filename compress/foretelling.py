"""The one walk back over a model, for all passes that ask what errors cost its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibrate.curvature import BlockBack, reverse_walk
from ..calibrate.folders import BlockFigures, CurvatureFolder, FiguresFolder
from ..runtime import processes
from ..runtime.model.skeleton import Skeleton
from .events import Event, Surveyed
from .passes.base import LinearPass

Figures = dict[str, float]
_DEFINED = 4  # how often what is foretold was defined anew, for figures that are kept


class WalkBack:
    """Over the model that linear passes see.

    Args:
        windows: token ids `[samples, tokens]`.
        room: a folder for the run.
        curvature: to be filled, where passes solve with it.
        figures: where other runs may have left what passes ask.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Tensor,
        room: Path,
        curvature: CurvatureFolder | None,
        figures: FiguresFolder | None,
        listener: Callable[[Event], None],
    ) -> None:
        self._skeleton, self._windows, self._listener = skeleton, windows, listener
        self._curvature, self._figures, self._room = curvature, figures, room

    def foretold(self, passes: Mapping[int, LinearPass]) -> dict[int, Figures]:
        """Number of a pass that asks → what it foretells of all blocks; the walk is only made for what is not known.

        Args:
            passes: number → prepared pass.
        """
        asking = {number: what for number, step in passes.items() if (what := step.foretells) is not None}
        known = self._figures
        there = {n: what for n, what in asking.items() if known is not None and known.holds(_of_walk(what))}
        old = {n: known.recalled(_of_walk(what), dict) for n, what in there.items()} if known is not None else {}
        new = {n: passes[n] for n in asking if n not in old}
        metrics = any("curvature" in step.needs for step in new.values())
        found = self._walked(new, metrics=metrics)
        if known is None:
            return found
        return old | {n: known.recalled(_of_walk(asking[n]), partial(found.__getitem__, n)) for n in new}

    def asked(self, passes: Mapping[int, LinearPass]) -> dict[int, Figures]:
        """Number of a pass → what it foretells of all blocks, whether a run would ask it or not."""
        return self._walked(passes, metrics=True)

    def _walked(self, asking: Mapping[int, LinearPass], *, metrics: bool) -> dict[int, Figures]:
        """Number of a pass → what it foretells of all blocks.

        Args:
            metrics: whether passes are asked that need them.
        """
        skeleton, curvature = self._skeleton, self._curvature
        open_yet = curvature is not None and not curvature.complete
        if not asking and not open_yet:
            return {}
        kept, inputs = BlockFigures(self._room / "foretold"), frozenset[str]()
        if asking:
            every = (name for index in range(skeleton.blocks) for name in skeleton.linears(index))
            inputs = frozenset(name for name in every if any(step.wants(name) for step in asking.values()))

        def there(index: int) -> bool:
            found = kept.load(index)
            told = found is not None and {str(number) for number in asking} <= found.keys()
            return told and (not open_yet or (curvature is not None and curvature.holds(index)))

        def taken(index: int) -> bool:
            return processes.once(lambda: there(index))

        def take(back: BlockBack) -> None:
            if open_yet and curvature is not None:
                curvature.save(back.index, back.found())
            kept.save(back.index, processes.once(lambda: _told(skeleton, back, asking)))

        def done(step: int) -> None:
            self._listener(Surveyed(step, 2 * skeleton.blocks))

        if not all(map(taken, range(skeleton.blocks))):
            scratch, metrics = self._room / "walk", metrics or open_yet
            reverse_walk(skeleton, self._windows, scratch, take, done, taken=taken, metrics=metrics, inputs=inputs)
        if open_yet and curvature is not None:
            curvature.finish(range(skeleton.blocks))
        blocks = [kept.load(index) or {} for index in range(skeleton.blocks)]
        return {n: {name: cost for own in blocks for name, cost in own.get(str(n), {}).items()} for n in asking}


def _told(skeleton: Skeleton, back: BlockBack, asking: Mapping[int, LinearPass]) -> dict[str, Figures]:
    return {str(number): dict(step.foretell(skeleton, back)) for number, step in asking.items()}


def _of_walk(what: Mapping[str, Any]) -> dict[str, Any]:
    return {"foretold": dict(what), "as": _DEFINED}
