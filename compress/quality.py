"""What an output lost: measured at the end of every run, on a few windows, and held against the recipe's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibrate.corpus import builtin_corpus, drawn_windows, file_corpus, has_tokenizer, load_tokenizer
from ..runtime.errors import CompressorError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.skeleton import Skeleton
from ..runtime.stored import open_model
from .evaluate import Divergence, Evaluation
from .evaluate.blocks import evaluate_blocks
from .output.folder import events_of
from .passes.base import ModelPass, Pass
from .plan import Plan
from .recipe import Limits, Recipe
from .resources import LEAST, LENGTH, held_out_windows
from .surveys import Text

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT, CALIBRATION, BUILTIN = "held-out", "calibration", "built-in"  # names of texts


@dataclass(frozen=True)
class Quality:
    """How far an output is from the original.

    Attributes:
        texts: name of a text → what was found on it, the one that counts first; empty where nothing could be measured.
        drift: for each block, by how much the residual stream that leaves it is off: `mean ‖x − x̃‖² / ‖x‖²`.
        reason: why nothing could be measured.
    """

    texts: dict[str, Evaluation]
    drift: tuple[float, ...] = ()
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Quality:
        """From a record."""
        texts = {
            name: Evaluation(**{**found, "against": Divergence(**found["against"])})
            for name, found in record["texts"].items()
        }
        return cls(texts, tuple(record["drift"]), record["reason"])

    @property
    def main(self) -> tuple[str, Evaluation, Divergence] | None:
        """The text that counts and what was found on it."""
        for name, found in self.texts.items():
            assert found.against is not None
            return name, found, found.against
        return None

    def summary(self) -> str:
        """A line for people."""
        if self.main is None:
            return f"not compared with the original: {self.reason}"
        name, found, against = self.main
        text = f"{name} tokens" if name in (HELD_OUT, CALIBRATION, BUILTIN) else f"tokens of {name}"
        line = (
            f"on {found.tokens:,} {text}: KL {against.kl_mean:.4g} from the original, perplexity "
            f"{against.base_perplexity:.4g} → {found.perplexity:.4g} (× {against.perplexity_ratio:.4g}), the same "
            f"likeliest token {100 * against.top1_agreement:.1f} % of the time"
        )
        other = self.texts.get(CALIBRATION)
        if name != CALIBRATION and other is not None and other.against is not None:
            line += f"; KL on calibration text {other.against.kl_mean:.4g}"
        return line

    def beyond(self, limits: Limits) -> str:
        """What is above the limits, or nothing; limits that the recipe states and nothing can be held against count."""
        if self.main is None:
            stated = [f"limits.{key}" for key in sorted(limits.model_fields_set) if getattr(limits, key) is not None]
            return f"{' and '.join(stated)} cannot be checked: {self.reason}" if stated else ""
        _, _, against = self.main
        found = {"kl": ("KL", against.kl_mean), "perplexity_ratio": ("perplexity ratio", against.perplexity_ratio)}
        above = [
            f"{words} {value:.4g} is above limits.{key} {limit:g}"
            for key, (words, value) in found.items()
            if (limit := getattr(limits, key)) is not None and not value <= limit
        ]
        return ", ".join(above)


def texts_to_measure(recipe: Recipe, checkpoint: Checkpoint, text: Text | None) -> tuple[dict[str, Tensor], str]:
    """Name → windows to measure on, or why there are none.

    Args:
        text: that calibrated; without one, the recipe's text is read for this, or the built-in one.
    """
    if text is not None:
        few = max(1, held_out_windows(recipe.data) // 2)
        found = {HELD_OUT: text.held_out[:, :LENGTH], CALIBRATION: text.windows[:few, :LENGTH]}
        return {name: windows for name, windows in found.items() if len(windows)}, ""
    if not has_tokenizer(checkpoint.path):
        return {}, "the model has no tokenizer"
    source, length = recipe.data.source, LENGTH
    length = min(length, checkpoint.positions or length)
    try:
        corpus = builtin_corpus("evaluation") if source == "builtin" else file_corpus(Path(source))
        tokenizer = load_tokenizer(checkpoint.path)
        windows, _ = drawn_windows(corpus, tokenizer, LEAST // length, length, recipe.data.seed, least=1, parts=1)
        checkpoint.check_ids(windows)
    except CompressorError as error:
        return {}, str(error)
    return {BUILTIN if source == "builtin" else corpus.name: windows}, ""


def measure(folder: Path, original: Skeleton, texts: Mapping[str, Tensor], passes: Sequence[Pass] = ()) -> Quality:
    """Compare a written folder with the original.

    Args:
        passes: prepared, that made the one of the other.

    Raises:
        VerifyError: a block gives NaN or infinities.
    """
    output = Skeleton(open_model(folder), original.dtype, original.device)
    found, drift = evaluate_blocks(original, output, texts, partial(_stream, passes))
    return Quality(found, tuple(drift))


def _stream(passes: Sequence[Pass], hidden: Tensor) -> Tensor:
    """The residual stream of the original as the output has it."""
    for step in passes:
        if isinstance(step, ModelPass):
            hidden = step.stream(hidden)
    return hidden


def most_lost(plan: Plan, out: Path, drift: Sequence[float]) -> str:
    """Where most was lost: the block behind which the residual stream is further off by most, and there the pass and
    the linear whose outputs are, as far as that can be told.

    Args:
        out: the finished output.
    """
    outside = {rows: name for name, rows in plan.skeleton.outer().items() if name in plan.rewritten}
    if not any(drift):
        return f"all is lost behind the blocks, in {outside[False]}" if False in outside else "no block is off"
    jumps = [after - before for before, after in zip((0.0, *drift), drift, strict=False)]
    block = max(range(len(jumps)), key=jumps.__getitem__)
    before = drift[block - 1] if block else 0.0
    where = f"most is lost in block {block}, behind which the stream is {drift[block]:.2g} off ({before:.2g} before it)"
    if block == 0 and True in outside:
        return f"{where}, or in {outside[True]} in front of it"
    reshaped = [step.kind for step in plan.recipe.passes if isinstance(step, ModelPass) and not step.exact]
    if reshaped:  # what linears report is how far they are from what these left
        return f"{where}: by {' and '.join(reshaped)} or by what came after"
    block_of = {name: plan.skeleton.checkpoint.block_index(f"{name}.weight") for name in plan.linears}
    events = events_of(out)
    done = [event for event in events if event["kind"] == "LayerDone" and block_of.get(event["name"]) == block]
    if not done:
        return where
    worst = max(done, key=lambda event: float(event["error"]))
    return f"{where}: by {worst['step']}, most of all in {worst['name']} (error {worst['error']:.2g})"
