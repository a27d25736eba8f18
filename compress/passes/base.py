"""What every pass is: a typed config that is the pass itself, what it needs, what it would store, and what it does.

There are two kinds. A `LinearPass` rewrites linears of a stage while the walk is there. A `ModelPass` looks at a whole
model before the first block and makes another of it, which later passes, walk and writer take for the one on disk.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from ..events import Event, Surveyed

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from ...calibrate.curvature import BlockBack
    from ...calibrate.folders import FiguresFolder, RoutingFolder
    from ...calibrate.stage import StageWork
    from ...runtime.model.checkpoint import Checkpoint
    from ...runtime.model.skeleton import Skeleton
    from ...runtime.schemes import Dense, Operator

BUFFERS = 48e6  # bytes: compiled kernels and scratch of the matrix library
# A chain that is run over the text; kinds of `calibrate.statistics`; and what only surveys and some passes ask for.
Need = Literal[
    "reference", "compressed", "moment", "cross", "held_moment", "held_cross", "peak", "sample", "metric", "routing",
    "text", "divergences", "curvature", "foretold",
]  # fmt: skip
SURVEYED: frozenset[Need] = frozenset({"routing", "text", "divergences", "curvature", "foretold"})  # by surveys


@dataclass(frozen=True)
class Survey:
    """What a pass has at hand when it looks at the whole model, before the first block is rewritten.

    Attributes:
        windows: calibration tokens `[samples, tokens]`, if the pass needs any.
        task: the same, of the pass's own `text`, if it has one.
        folder: the pass's own, until the run is done; what an interrupted run of the same job left there is good.
        listener: told how it goes.
        routing: statistics of experts that other runs may have left, and may use; None: they are kept in `folder`.
        figures: what surveys of other runs may have measured of the same model and text.
        foretold: what `LinearPass.foretell` found of all blocks.
    """

    windows: Tensor | None
    folder: Path
    listener: Callable[[Event], None]
    task: Tensor | None = None
    routing: RoutingFolder | None = None
    figures: FiguresFolder | None = None
    foretold: Mapping[str, float] = field(default_factory=dict)

    def recalled(self, what: Mapping[str, Any], find: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures by name that another run found, or else those that `find` finds.

        Args:
            what: all that they depend on, besides model and windows.
        """
        return find() if self.figures is None else self.figures.recalled(what, find)

    def passed(self, blocks: int) -> Callable[[int], None]:
        """What tells the listener of each block that is behind."""
        return lambda index: self.listener(Surveyed(index, blocks))


@dataclass(frozen=True)
class Cost:
    """Bytes of memory beyond the imports and of disk at the worst moment, bytes that are `left` on disk for the run,
    floating-point operations."""

    memory: float = 0.0
    disk: float = 0.0
    left: float = 0.0
    flops: float = 0.0

    @classmethod
    def of(cls, steps: Sequence[Cost]) -> Cost:
        """The cost of one step after the other."""
        left = sum(step.left for step in steps)
        memory, disk = (max((getattr(step, key) for step in steps), default=0.0) for key in ("memory", "disk"))
        return cls(memory, left + disk, left, sum(step.flops for step in steps))


class Pass(BaseModel):
    """One entry of a recipe's `passes`: the config is the pass.

    Attributes:
        kind: the name under which recipes ask for the pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)  # recipes build one schema of all passes
    joint: ClassVar[bool] = False  # whether `survey` is for all processes that work together, not for one of them

    kind: str

    def _refuse_idle(self, condition: str, *keys: str) -> None:
        """Raise a ValueError for a key that was given a value but does nothing.

        Args:
            condition: when that is, as in `with solver: adam`.
        """
        fields = type(self).model_fields
        for key in keys:
            if getattr(self, key) != fields[key].get_default():
                raise ValueError(f"{key} does nothing {condition}: leave it out")

    @property
    def needs(self) -> frozenset[Need]:
        """What to collect for the pass; nothing for a pass without data.

        Where: `reference`, in the uncompressed model, or `compressed`, in the model as it is so far, which serves for
        `reference` too. What: kinds of statistics (`calibrate.statistics.KINDS`), and `metric`, how the linear's errors
        move the block. Surveys alone ask for `routing`, what experts do, `text`, calibration text as such,
        `divergences`, what single changes of weights do to the answers, `curvature`, what errors of linears cost, and
        `foretold`, what `foretell` makes of it.
        """
        return frozenset()

    def before(self, later: Sequence[Pass]) -> Pass:
        """This pass, with what a recipe asks for behind it."""
        return self

    def prepare(self, skeleton: Skeleton) -> Pass:
        """This pass for a model of which headers are known.

        Raises:
            RecipeError: it cannot be applied to this model.
        """
        return self

    @property
    def to_survey(self) -> bool:
        """Whether `survey` has still to be called; without `needs`, it reads weights only."""
        return False

    def survey(self, skeleton: Skeleton, survey: Survey) -> Pass:
        """This prepared pass once it has looked at all weights; what it makes of them is left in `survey.folder`."""
        return self

    def survey_cost(self, skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
        """What `survey` takes, for so much calibration text."""
        return Cost()

    @property
    def text(self) -> str | None:
        """The text that `survey` calibrates on, where it is another than the recipe's."""
        return None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Model folders that the pass reads besides the model."""
        return ()

    @property
    def note(self) -> str:
        """What a table of linears does not show of a prepared pass, in a few words."""
        return ""

    @property
    def warning(self) -> str:
        """What may go wrong with a prepared pass, and what to do about it, where that is known before the run."""
        return ""


class ModelPass(Pass):
    """A pass that makes another model of the one there is: with fewer experts, or the same function in other weights.

    Subclasses say by `rewritten` what that model is, and leave tensors that have no formula in folders, which `survey`
    names by `with_made`.
    """

    exact: ClassVar[bool] = False  # whether the model of `rewritten` is the same function
    _made: tuple[Path, ...] = PrivateAttr(default=())

    def rewritten(self, checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
        """The checkpoint that the passes after this one see, and that is written; the same where nothing changes."""
        raise NotImplementedError

    def view(self, skeleton: Skeleton) -> Skeleton:
        """The model of `rewritten`."""
        from ...runtime.model.skeleton import Skeleton

        checkpoint = self.rewritten(skeleton.checkpoint, skeleton)
        unchanged = checkpoint is skeleton.checkpoint
        return skeleton if unchanged else Skeleton(checkpoint, skeleton.dtype, skeleton.device)

    def stream(self, hidden: Tensor) -> Tensor:
        """The residual stream `[..., hidden_size]` of the model before, as it is in that of `rewritten`."""
        return hidden

    @property
    def made(self) -> tuple[Path, ...]:
        """Folders of new weights that the survey left, later ones over earlier ones."""
        return self._made

    def with_made(self, folders: Sequence[Path]) -> Self:
        """This pass, whose survey left new weights in some folders."""
        result = self.model_copy()
        result._made = tuple(folders)
        return result


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


class LinearPass(Pass):
    """A pass that rewrites linears, a stage of a block at a time."""

    may_grow: ClassVar[bool] = False  # whether weights may take more bytes, for the sake of something else
    apart: ClassVar[bool] = False  # whether groups of a stage may come one by one, each without seams
    blind: ClassVar[bool] = False  # whether a matrix of whose inputs nothing is measured is rewritten all the same
    targets: Patterns = Field(
        ("*",),
        description="linears to work on: globs over names without .weight, or re: patterns; the embedding and the "
        "output head only where they are named in full, as lm_head",
    )
    ignore: Patterns = Field((), description="linears to leave alone, of those that match targets")

    def wants(self, name: str) -> bool:
        """Whether a linear, by its disk name without `.weight`, is this pass's to rewrite."""
        return any(matches(p, name) for p in self.targets) and not any(matches(p, name) for p in self.ignore)

    def names(self, name: str) -> bool:
        """Whether targets say a name in full, as they have to for the embedding and the head."""
        return name in self.targets and self.wants(name)

    @property
    def foretells(self) -> Mapping[str, Any] | None:
        """What the figures of `foretell` depend on, besides model and windows; None where it is not to be asked."""
        return None

    def foretell(self, skeleton: Skeleton, back: BlockBack) -> Mapping[str, float]:
        """What changes that this pass makes, or chooses among, are expected to cost, by a block through which gradients
        went: name of a change → KL per token in nats; empty where it cannot tell."""
        return {}

    def expected(self, skeleton: Skeleton, foretold: Mapping[str, float]) -> float | None:
        """What comes of figures of all blocks once this pass has chosen, KL per token in nats; None: it cannot tell."""
        return None

    def foretelling(self, rows: int, columns: int) -> tuple[float, float]:
        """Bytes of memory and floating-point operations of asking what changes of a linear cost."""
        return 0.0, 0.0

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """The operator that `apply` will leave, on `meta`; one of factors is rewritten factor by factor.

        Args:
            name: disk name of the linear.
            operator: what the passes before leave of it.
            group: the linears, as they are in the model, that read the same input and are this pass's; this one among
                them.

        Raises:
            RecipeError: this pass cannot follow what was done to the linear before.
        """
        from ...runtime.schemes import Dense, with_factors

        if not operator.factors:
            return self.planned(name, operator, group)
        parts: dict[str, Any] = {}
        for part in operator.factors:
            label, factor = f"{name}.{part}", getattr(operator, part)
            parts[part] = self.planned(label, factor, {label: factor} if isinstance(factor, Dense) else {})
        return with_factors(operator, **parts)

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """`plan` for a linear or a factor of one."""
        raise NotImplementedError

    def flops(self, rows: int, columns: int) -> float:
        """Floating-point operations to rewrite one linear, for the time estimate."""
        return 0.0

    def memory(self, operators: Sequence[Operator]) -> float:
        """Bytes in use at the worst moment of rewriting linears that share an input, given what they are in the end."""
        return 0.0

    def apply(self, work: StageWork) -> Iterator[Event]:
        """Replace the stage's wanted operators, and say what was done."""
        raise NotImplementedError
