"""Outputs beside each other, as a page or a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...runtime.files import write_synced
from ..compare import Row, unbeaten
from . import figures
from .page import environment

_COSTS = {"bytes": "weights", "kv_bytes_per_token": "KV cache for a token"}


def _plot(rows: Sequence[Row], cost: str) -> figures.Draw:
    points = [
        (name, float(getattr(found, cost)), found.kl_mean, math.nan if found.kl_error is None else found.kl_error)
        for name, found in rows
        if found.kl_mean > 0
    ]
    return figures.pareto(points, unbeaten(rows, cost), _COSTS[cost])


def write_picture(rows: Sequence[Row], out: Path) -> None:
    """KL against the bytes of the weights, as PNG."""
    out.write_bytes(figures.picture(_plot(rows, "bytes"), 3.2))


def write_page(rows: Sequence[Row], title: str, out: Path) -> None:
    """A table of all, and KL against bytes of what differs in them."""
    varied = [cost for cost in _COSTS if len({getattr(found, cost) for _, found in rows if found.kl_mean > 0}) > 1]
    charts = [(f"KL against {_COSTS[cost]}", figures.svg(_plot(rows, cost), 3.2)) for cost in varied]
    template = environment().get_template("comparison.html.jinja")
    write_synced(out, template.render(title=title, rows=rows, best=unbeaten(rows, "bytes"), charts=charts))
