"""Figures as SVG that takes its colours from the page around it, so that it can be light or dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...runtime.errors import human_size

WIDTH = 4.6  # inches: text keeps its size on a phone


class Palette(NamedTuple):
    """Colours of a figure."""

    ink: str
    faint: str
    first: str
    second: str
    third: str
    fourth: str


PRINT = Palette("#1f2328", "#8a929a", "#0f766e", "#c2410c", "#6d28d9", "#a16207")
_PAGE = Palette("#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112")  # become variables of a page's style
Draw = Callable[[Any, Figure, Palette], None]  # axes, figure, colours →


def _style(colours: Palette) -> dict[Any, Any]:
    ink, faint = colours.ink, colours.faint
    return {
        "svg.fonttype": "none", "svg.hashsalt": "compressor", "font.family": "sans-serif", "font.size": 8.5,
        "text.color": ink, "axes.edgecolor": faint, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
        "grid.color": faint, "grid.linewidth": 0.5, "axes.axisbelow": True,
        "legend.frameon": False, "legend.labelcolor": ink,
    }  # fmt: skip


def svg(draw: Draw, height: float) -> str:
    """A figure, as an `<svg>` element for the inside of a page that says what its colours are; height in inches."""
    found = _drawn(draw, height, _PAGE, "svg", {"Date": None}).decode()
    found = found[found.index("<svg") :]
    for name, colour in _PAGE._asdict().items():
        found = found.replace(colour, f"var(--{name})")
    return found


def picture(draw: Draw, height: float) -> bytes:
    """A figure as PNG, on white."""
    return _drawn(draw, height, PRINT, "png", {}, facecolor="white", dpi=200)


def _drawn(draw: Draw, height: float, colours: Palette, form: str, metadata: Any, **options: Any) -> bytes:
    with matplotlib.rc_context(_style(colours)):
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure.subplots(), figure, colours)
        data = io.BytesIO()
        figure.savefig(data, format=form, metadata=metadata, **options)
    return data.getvalue()


def heat(values: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[int], label: str) -> str:
    """A strip of squares, a row for each block; of numbers that differ by orders of magnitude in steps of these."""
    numbers = [[_finite(value) for value in row] for row in values]
    known = [value for row in numbers for value in row if value == value] or [0.0]
    least, most = min(known), max(known)
    positive = [value for value in known if value > 0]
    far = bool(positive) and most > 20 * min(positive)
    norm = (
        LogNorm(max(min(positive), most * 1e-6), most) if far else Normalize(least, most if most > least else least + 1)
    )

    def draw(axes: Any, figure: Figure, colours: Palette) -> None:
        drawn = axes.pcolormesh(numbers, norm=norm, cmap="viridis", edgecolors="none", linewidth=0)
        axes.set_xticks([number + 0.5 for number in range(len(columns))], columns, rotation=40, ha="right")
        step = max(1, len(rows) // 16)
        axes.set_yticks([number + 0.5 for number in range(0, len(rows), step)], [str(row) for row in rows[::step]])
        axes.invert_yaxis()
        axes.set_ylabel("block")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(drawn, ax=axes, label=label, aspect=30, pad=0.02)
        bar.outline.set_visible(False)

    return svg(draw, min(9.0, 1.5 + 0.13 * len(rows)))


def _finite(number: float | None) -> float:
    """A number, or NaN, which is not drawn, for what is none."""
    return math.nan if number is None or not math.isfinite(number) else number


def lines(curves: Mapping[str, Sequence[float | None]], label: str, *, log: bool = False) -> str:
    """Numbers by block."""
    drawn = {name: [_finite(number) for number in numbers] for name, numbers in curves.items()}

    def draw(axes: Any, figure: Figure, colours: Palette) -> None:
        for (name, numbers), colour in zip(drawn.items(), colours[2:], strict=False):
            axes.plot(range(len(numbers)), numbers, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
        if log and all(number > 0 for numbers in drawn.values() for number in numbers):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.grid(axis="y")
        if len(drawn) > 1:
            axes.legend()

    return svg(draw, 2.5)


def sizes(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Where bytes were, and where they are: two bars for each name."""
    names = list(before)

    def draw(axes: Any, figure: Figure, colours: Palette) -> None:
        places = range(len(names))
        axes.barh(
            [place - 0.19 for place in places],
            [before[name] for name in names],
            0.36,
            color=colours.faint,
            label="before",
        )
        axes.barh(
            [place + 0.19 for place in places],
            [after[name] for name in names],
            0.36,
            color=colours.first,
            label="after",
        )
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_size(value).replace(".00", "")))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper left", ncols=2)

    return svg(draw, 1.0 + 0.36 * len(names))


def stacked(parts: Mapping[str, Sequence[float]], label: str) -> str:
    """What adds up to something in each block."""

    def draw(axes: Any, figure: Figure, colours: Palette) -> None:
        count = len(next(iter(parts.values())))
        below = [0.0] * count
        for (name, numbers), colour in zip(parts.items(), colours[2:] * 8, strict=False):
            axes.bar(range(count), numbers, bottom=below, color=colour, label=name, width=0.8)
            below = [low + number for low, number in zip(below, numbers, strict=True)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=3)

    return svg(draw, 2.6)


Point = tuple[str, float, float, float]  # name, its place on the x axis, KL, and that one's standard error


def pareto(points: Sequence[Point], best: set[str], label: str) -> Draw:
    """KL over bytes of some kind, the best of them, by name, joined by a line."""

    def draw(axes: Any, figure: Figure, colours: Palette) -> None:
        places = [x for _, x, _, _ in points] or [0.0]
        middle = (min(places) + max(places)) / 2
        joined = sorted((x, y) for name, x, y, _ in points if name in best)
        axes.plot(
            [x for x, _ in joined], [y for _, y in joined], color=colours.first, linewidth=1.2, drawstyle="steps-post"
        )
        for number, (name, x, y, error) in enumerate(sorted(points, key=lambda point: point[1])):
            colour = colours.first if name in best else colours.faint
            noise = None if not math.isfinite(error) else min(error, 0.9 * y)
            axes.errorbar(x, y, yerr=noise, marker="o", markersize=5, color=colour, ecolor=colour, linestyle="none")
            side = -1 if x > middle else 1  # towards the middle, where there is room
            place = {"xytext": (5 * side, -10 if number % 2 else 4), "textcoords": "offset points"}
            place["ha"] = "right" if side < 0 else "left"
            axes.annotate(name, (x, y), color=colours.ink, fontsize=7.5, parse_math=False, **place)
        axes.set_yscale("log")
        axes.margins(x=0.18, y=0.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_size(value).replace(".00", "")))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
        axes.set_ylabel("KL per token in nats")
        axes.grid(axis="both")

    return draw
