"""What happens during a run, as data: the command line draws it and `report/layers.jsonl` keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.schemes import Operator
    from .quality import Quality


@dataclass(frozen=True)
class Event:
    """Base of all events; `kind` in the record is the class name."""

    def record(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Solving(Event):
    """A pass is at work on a linear, of which a share is done; nothing that is kept."""

    name: str
    step: str
    share: float


@dataclass(frozen=True)
class LayerDone(Event):
    """A pass has rewritten one linear.

    Attributes:
        error: `tr(ΔHΔᵀ) / tr(VHVᵀ)`, the relative output error on calibration data, H being the second moment of
            inputs as it was measured, V the target of the pass and Δ what is stored less that; without data,
            `‖Δ‖² / ‖W‖²`.
        bits: stored bits per weight, scales included.
        weights: how many numbers the linear stands for.
    """

    name: str
    step: str
    error: float
    bits: float
    weights: int
    tokens: int = 0

    @classmethod
    def of(cls, name: str, step: str, error: float, result: Operator, tokens: int) -> LayerDone:
        """The event of a linear that became `result`."""
        from ..runtime.schemes import bits_per_weight

        rows, columns = result.shape
        return cls(name, step, error, bits_per_weight(result), rows * columns, tokens)


@dataclass(frozen=True)
class Warned(Event):
    """Something that a person should know before the run has done its work."""

    text: str


@dataclass(frozen=True)
class Measuring(Event):
    """The output is written and is now compared with the original."""


@dataclass(frozen=True)
class Measured(Event):
    """The output was compared with the original (`compress/quality.py`)."""

    quality: Quality


@dataclass(frozen=True)
class Resumed(Event):
    """A run goes on after blocks that an earlier one finished."""

    done: int
    blocks: int


@dataclass(frozen=True)
class Surveyed(Event):
    """A survey before the first block is rewritten has passed a block."""

    block: int
    blocks: int


@dataclass(frozen=True)
class Descending(Event):
    """Scales and norms of what was written have made a step: KL per token in nats before it, on the step's text."""

    step: int
    steps: int
    kl: float


@dataclass(frozen=True)
class Tuned(Event):
    """They are trained: KL per token in nats on windows that were held out of that, of what was there and of what came
    of it, which is stored where it is less."""

    before: float
    after: float


@dataclass(frozen=True)
class ExpertsKept(Event):
    """Which experts of a block stay, and why.

    Attributes:
        scores: of every expert by the criterion, experts with too few tokens moved below all others; by
            reconstruction, the loss without this expert alone.
        tokens: that were routed to each; empty without data.
    """

    block: int
    criterion: str
    kept: list[int]
    scores: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Allocated(Event):
    """Bits are shared out among linears.

    Attributes:
        nbytes: that these take.
        lost: KL per token in nats that this is expected to cost, errors of linears adding up.
        curve: the two of other budgets, from the fewest bits everywhere to the most.
    """

    step: str
    nbytes: float
    lost: float
    curve: list[list[float]]


@dataclass(frozen=True)
class ExpertsChanged(Event):
    """A block's experts have new weights: the squared error of what the block now puts out, as a share of what the
    original model's does."""

    block: int
    error: float


@dataclass(frozen=True)
class Fallback(Event):
    """A pass took its simple way for one linear: which, and why."""

    name: str
    step: str
    reason: str


@dataclass(frozen=True)
class Scaled(Event):
    """Scales have moved between what feeds linears and these.

    Attributes:
        name: the first of the linears.
        feeder: the norm, or the linear, by its name inside the block.
        left: share of what rounding the linears would cost that is left by estimate.
        least, most: of the scales, whose geometric mean is one.
    """

    name: str
    step: str
    feeder: str
    left: float
    least: float
    most: float


@dataclass(frozen=True)
class Starved(Event):
    """An expert's linear was seen by so few tokens that its statistics lean on other experts' tokens."""

    name: str
    tokens: int


@dataclass(frozen=True)
class BlockDone(Event):
    """A block is rewritten and on disk."""

    block: int
    blocks: int
    bits: float
    error: float
    fallbacks: int
