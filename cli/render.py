"""How results and progress look. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..runtime.errors import human_size
from ..runtime.text import json_text
from .session import session

if TYPE_CHECKING:
    from ..compress.evaluate import Findings
    from ..compress.evaluate.long_context import LongEvaluation
    from ..compress.events import Event
    from ..compress.plan import Plan, Row
    from ..compress.predict import AtWidth

_WIDE = None if sys.stdout.isatty() else 140  # a pipe has no width of its own
_FOLDED, _READABLE = 12, 34  # characters that a column of words has at least, and that it should have


class _Output(Console):
    """A console on which the end of a pipe is an error, and not the answer no."""

    def on_broken_pipe(self) -> None:
        raise

    def say(self, text: str) -> None:
        """Print sentences: a terminal breaks them between words; what is to be copied is printed as it is."""
        self.print(text, soft_wrap=not self.is_terminal)


out = _Output(markup=False, highlight=False, soft_wrap=True, width=_WIDE)
err = _Output(stderr=True, markup=False, highlight=False, soft_wrap=True)


def document(content: Any, file: Path | None = None) -> None:
    """One JSON document, on stdout or in a file."""
    if file is None:
        print(json_text(content), end="")
        return
    from ..runtime.files import write_synced

    write_synced(file, json_text(content))


def table(
    headings: Sequence[str], lines: Sequence[Sequence[str]], spare: Sequence[str] = (), words: Sequence[str] = ()
) -> Table:
    """A table of names and numbers; where the terminal is narrow, columns go, and then words are folded, but no number
    is cut.

    Args:
        spare: headings of columns that may go, the first of them first; words: of those that may be folded, as the
            first column is.
    """
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    folds = [not number or heading in words for number, heading in enumerate(headings)]
    for count in range(len(spare) + 1):
        kept = [number for number, heading in enumerate(headings) if heading not in spare[:count]]
        wanted = sum(2 + (min(widths[number], _READABLE) if folds[number] else widths[number]) for number in kept)
        if not out.is_terminal or wanted <= out.width:
            break
    taken = sum(2 + (0 if folds[number] else widths[number]) for number in kept)
    room = max(1, min(_FOLDED, (out.width - taken) // sum(folds[number] for number in kept)))
    result = Table(box=None)
    for number in kept:
        least = min(widths[number], room) if folds[number] else widths[number]
        side: Literal["left", "right"] = "left" if folds[number] else "right"
        whole = not folds[number]
        result.add_column(headings[number], justify=side, no_wrap=whole, overflow="fold", min_width=least)
    for line in lines:
        result.add_row(*(line[number] for number in kept))
    return result


def plan_table(rows: Sequence[Row]) -> Table:
    headings = ("linears", "count", "parameters", "passes", "stored as", "bits/weight", "before", "after")
    lines = [
        (
            row.name.removeprefix("model."), str(row.count), f"{row.parameters:,}", " → ".join(row.steps) or "–",
            row.becomes, f"{row.bits:.3f}", human_size(row.before), human_size(row.after),
        )
        for row in rows
    ]  # fmt: skip
    return table(headings, lines, spare=("parameters", "before", "count", "bits/weight"), words=("passes", "stored as"))


def widths_table(rows: Sequence[AtWidth]) -> Table:
    """What integers of each width would make of a model."""
    from ..compress.predict import per_bit

    lines = [(str(row.bits), human_size(row.nbytes), f"{row.kl:.2g}") for row in rows]
    lines.append(("a bit less", "", f"× {per_bit(rows):.1f}"))
    return table(("bits", "weights", "KL expected"), lines)


def cache_line(before: float, after: float, weights: int) -> str:
    """What a smaller KV cache is worth."""
    line = f"KV cache {before:,.0f} → {after:,.0f} bytes a token ({100 * after / before:.1f} % kept)"
    if after < before:
        line += f"; what is saved outweighs all weights from {math.ceil(weights / (before - after)):,} tokens on"
    return line


def long_table(name: str, results: Sequence[LongEvaluation]) -> Table:
    """Results of a model and, if there is one, of its base."""
    lines = []
    for spans in zip(*(result.spans for result in results), strict=True):
        label = f"perplexity at {spans[0].start:,} to {spans[0].end - 1:,}"
        lines.append((label, *(f"{span.perplexity:.4f}" for span in spans)))
    for found in zip(*(result.retrievals for result in results), strict=True):
        label = f"hidden number in {found[0].tokens:,} tokens, log probability (if not hidden)"
        lines.append((label, *(f"{each.logprob:.3f} ({each.lost:.3f})" for each in found)))
        lines.append(("  found exactly", *(f"{100 * each.exact:.0f} %" for each in found)))
    for pair in zip(*(result.shared for result in results), strict=True):
        label = f"second question on a cache of {pair[0].tokens:,} tokens, log probability (if all is read anew)"
        lines.append((label, *(f"{each.second:.3f} ({each.anew:.3f})" for each in pair)))
        lines.append(
            ("  found exactly", *(f"{100 * each.exact:.0f} % ({100 * each.exact_anew:.0f} %)" for each in pair))
        )
    return table(("far from the beginning", name, *(["base"] * (len(results) - 1))), lines)


def evaluation(name: str, folder: Path, found: Findings) -> None:
    """Print what an evaluation found."""
    from ..runtime.stored import open_model

    cached = found.kv_bytes_per_token
    out.print(_evaluation_table(name, found))
    if cached[-1] != cached[0]:
        out.print(cache_line(cached[1], cached[0], open_model(folder).nbytes))
    if found.long:
        out.print(long_table(name, found.long))


def _evaluation_table(name: str, found: Findings) -> Table:
    lines = [
        ("tokens predicted", f"{found.exact.tokens:,}"),
        ("perplexity ± standard error", f"{found.exact.perplexity:.4f} ± {found.exact.perplexity_error:.4f}"),
    ]
    if (d := found.exact.against) is not None:
        lines += [
            ("perplexity of the base", f"{d.base_perplexity:.4f}"),
            ("ratio", f"{d.perplexity_ratio:.5f} ± {d.ratio_error:.5f}"),
            ("KL per token in nats, mean", f"{d.kl_mean:.6f} ± {d.kl_error:.6f}"),
            ("median / p99", f"{d.kl_median:.6f} / {d.kl_p99:.6f}"),
            ("top-1 agreement", f"{100 * d.top1_agreement:.2f} %"),
        ]
    if (d := found.as_run.against) is not None:
        ratio = f"{d.perplexity_ratio:.5f} ± {d.ratio_error:.5f}"
        lines.append((f"as it runs ({found.dtype}): ratio to float32", ratio))
        lines.append(
            (f"KL from itself in float32, {found.as_run.tokens:,} tokens", f"{d.kl_mean:.6f} ± {d.kl_error:.6f}")
        )
    lines.append(("KV cache, bytes a token", f"{found.kv_bytes_per_token[0]:,.0f}"))
    return table(("measure", name), [(label, value.replace(" ± nan", "")) for label, value in lines])


def readers(plan: Plan) -> str:
    """Who reads what a plan writes, and what keeps others from it."""
    return ", ".join(plan.readers) + (f" (others do not take {plan.obstacle})" if plan.obstacle else "")


@contextmanager
def reading(windows: int, tokens: int, long: int | None) -> Iterator[Callable[[int], None]]:
    """Says what is read, and draws a bar over the windows on a terminal, which is told how many more are behind."""
    err.print(
        f"reading {windows} windows of {tokens} tokens" + ("" if long is None else f", then of {long}: be patient")
    )
    with progress("windows", windows) as passed:
        yield passed


@contextmanager
def progress(what: str, count: int) -> Iterator[Callable[[int], None]]:
    """Draws a bar on a terminal, with the time that is left; it is told how many more are behind."""
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal or session.quiet,
        speed_estimate_period=math.inf,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=count)
        yield lambda more: bar.advance(task, more)


def track(what: str, things: Collection[Any], /) -> Iterator[Any]:
    """Things one by one, with a bar of them on a terminal."""
    with progress(what, len(things)) as passed:
        for thing in things:
            yield thing
            passed(1)


def scores(names: Sequence[str], record: Mapping[str, Any]) -> None:
    """Print what questions and tasks came to, of each model."""
    lines = []
    if "choices" in record:
        for label, key in (("right choices", "accuracy"), ("right choices by length", "by_length")):
            each = [f"{100 * one[key]:.2f} ± {100 * (one[key + '_error'] or 0):.2f} %" for one in record["choices"]]
            lines.append((f"{label}, of {record['choices'][0]['questions']:,}", *each))
    for task, first in (record.get("tasks") or [{}])[0].items():
        for key in (key for key, value in first.items() if isinstance(value, float) and "_stderr" not in key):
            lines.append((f"{task} {key.removesuffix(',none')}", *(f"{one[task][key]:.4f}" for one in record["tasks"])))
    if lines:
        out.print(table(("tasks", *names), lines))


def _allocated(record: dict[str, Any]) -> str:
    """Bits that were shared out, and what other sizes would cost."""
    points = [point for point in record["curve"] if point[1] > 0][::3]
    others = ", ".join(f"{human_size(nbytes)}: {lost:.2g}" for nbytes, lost in points)
    return (
        f"bits are shared out: {human_size(record['nbytes'])} of weights, of which a KL of {record['lost']:.2g} is "
        f"expected (of the same weights in {others})"
    )


def _tuned(record: dict[str, Any]) -> str:
    before, after = record["before"], record["after"]
    kept = "" if after < before else ", so that all stays as it was"
    return f"scales and norms are trained: KL {before:.4g} → {after:.4g} on windows held out of that{kept}"


class ApplyProgress:
    """Draws the events of a run: a bar over blocks on a terminal, a permanent line for every block everywhere."""

    def __init__(self, blocks: int, quiet: bool) -> None:
        self.quiet = quiet
        self._start = time.monotonic()
        self._bar: Progress | None = None
        if err.is_terminal and not quiet:
            whole, rest = Column(no_wrap=True, min_width=7), Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._bar = Progress(
                TextColumn("blocks"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(whole), TextColumn("left"),
                TimeRemainingColumn(table_column=whole.copy()), TextColumn("{task.fields[now]}", table_column=rest),
                console=err, transient=True, expand=True, speed_estimate_period=math.inf,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=blocks, now="")

    def __enter__(self) -> ApplyProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if session.follows:
            return
        record = event.record()
        if record["kind"] in ("LayerDone", "Solving") and self._bar is not None:
            inside = re.sub(r"^.*?\.\d+\.", "", record["name"])
            share = f", {record['step']} {100 * record['share']:.0f} %" if "share" in record else ""
            self._bar.update(self._task, now=inside + share)
        elif record["kind"] == "Surveyed":
            if self._bar is not None:
                self._bar.update(self._task, now=f"survey, block {record['block'] + 1} of {record['blocks']}")
            if not self.quiet:
                err.print(
                    f"survey, block {record['block'] + 1:>3}/{record['blocks']}  {time.monotonic() - self._start:.1f} s"
                )
        elif record["kind"] == "Allocated":
            err.say(_allocated(record))
        elif record["kind"] == "Descending":
            now = f"tune, step {record['step']} of {record['steps']}"
            if self._bar is not None:
                self._bar.update(self._task, now=now)
            if not self.quiet:
                err.print(f"{now}  KL {record['kl']:.4g}  {time.monotonic() - self._start:.1f} s")
        elif record["kind"] == "Tuned":
            err.say(_tuned(record))
        elif record["kind"] == "Measuring" and self._bar is not None:
            self._bar.update(self._task, now="comparing with the original")
        elif record["kind"] == "Warned":
            err.say(f"warning: {record['text']}")
        elif record["kind"] == "Fallback" and not self.quiet:
            err.say(f"  {record['name']}: {record['reason']}")
        elif record["kind"] == "Resumed":
            if self._bar is not None:
                self._bar.reset(self._task, completed=record["done"])  # what is left is not judged by what was there
            if not self.quiet:
                err.print(f"{record['done']} of {record['blocks']} blocks are done already")
        elif record["kind"] == "BlockDone":
            if self._bar is not None:
                self._bar.update(self._task, completed=record["block"] + 1)
            if not self.quiet:
                err.print(
                    f"block {record['block'] + 1:>3}/{record['blocks']}  {record['bits']:.3f} bits/weight  "
                    f"error {record['error']:.3e}  {time.monotonic() - self._start:.1f} s"
                )
