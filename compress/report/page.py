"""The report of an output: one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...runtime.errors import human_size
from ...runtime.files import write_synced
from ..output.folder import REPORT
from . import figures
from .content import Content

if TYPE_CHECKING:
    from ..evaluate import Findings

_MEANINGS = {
    "Fallback": "linears for which a pass took its simple way, because its own would have been worse; they are as good "
    "as rounding to nearest or better",
    "Starved": "linears of experts that few calibration tokens came by: their statistics lean on other experts' "
    "tokens; more calibration text, or text of the kind that the model is used for, helps",
}


@dataclass(frozen=True)
class Sample:
    """What two models go on with."""

    prompt: str
    before: str
    after: str


@cache
def environment() -> Environment:
    """Templates of this folder; what is put into them is escaped."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"size": human_size, "short": _short, "noise": _noise}
    return found


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def _noise(error: float | None) -> str:
    """A standard error, which one window alone does not have."""
    return "" if error is None or not math.isfinite(error) else f"± {error:.1g}"


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    shown: Path | None = None,
    found: Findings | None = None,
    samples: Sequence[Sample] = (),
) -> Path:
    """Write the report of an output, and say where.

    Args:
        out: default: in the output, beside what it is made of.
        shown: where the output will be, if that is elsewhere.
        found: of an evaluation against the model that it came from; samples: of both, side by side.
    """
    content = Content.read(folder)
    out = folder / REPORT if out is None else out
    page = environment().get_template("report.html.jinja").render(
        content=content, charts=_charts(content), told=_told(content), loading=content.loading(shown or folder),
        found=found, samples=samples,
    )  # fmt: skip
    write_synced(out, page)
    return out


def _charts(content: Content) -> list[tuple[str, str, str]]:
    """Title, figure, what it says; of what there is something to say about."""
    found = []
    names, blocks = content.linears
    if blocks:
        found.append((
            "Error by linear", figures.heat(content.by_block("error"), names, blocks, "relative output error"),
            "What is lost of each linear's outputs on calibration text, as a share of their energy; without data, "
            "of the weights.",
        ))  # fmt: skip
        bits = content.by_block("bits")
        if len({round(value, 1) for row in bits for value in row if value is not None}) > 1:
            found.append((
                "Bits by linear", figures.heat(bits, names, blocks, "bits per weight"), "Scales included.",
            ))  # fmt: skip
    if any(content.drift):
        found.append((
            "Drift of the residual stream", figures.lines({"drift": content.drift}, "‖x − x̃‖² / ‖x‖²", log=True),
            "How far what leaves each block is from what leaves it in the original, on text that did not calibrate.",
        ))  # fmt: skip
    before, after = _parts(content)
    found.append(("Where the bytes are", figures.sizes(before, after), "Weights as they are stored, scales included."))
    if changed := content.of("ExpertsChanged"):
        errors = {"error": [event["error"] for event in changed]}
        found.append((
            "What experts put out", figures.lines(errors, "relative error"),
            "What is lost of the blocks' outputs by having fewer experts, or smaller ones.",
        ))  # fmt: skip
    if seconds := content.seconds:
        found.append(("Time by block", figures.stacked(seconds, "seconds"), "Of the last run, if it was resumed."))
    return found


def _parts(content: Content) -> tuple[dict[str, float], dict[str, float]]:
    """Name of a part → bytes, before and after."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for row in content.plan["rows"]:
        name = row["name"].rpartition(".")[2]
        name = f"experts {name}" if ".experts." in row["name"] else name
        before[name] = before.get(name, 0) + row["before"]
        after[name] = after.get(name, 0) + row["after"]
    rest = [total - sum(parts.values()) for total, parts in zip(content.bytes, (before, after), strict=True)]
    if min(rest) >= 0 and max(rest) > 0:
        before["all else"], after["all else"] = rest
    return before, after


def _told(content: Content) -> list[tuple[str, list[dict[str, Any]]]]:
    """What happened that a person should know: its meaning, and where."""
    found = []
    for kind, meaning in _MEANINGS.items():
        events = {event["name"]: dict(event) for event in content.of(kind)}
        if events:
            found.append((f"{len(events)} {meaning}.", list(events.values())))
    return found
