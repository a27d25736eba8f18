"""What keeps engines from sharing a compressed model out among several GPUs (tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..runtime.formats.base import OURS
from ..runtime.model.families import starred, text_config
from ..runtime.schemes import BlockScaled, IntQuantized, Operator

if TYPE_CHECKING:
    from .plan import Plan


def unsplittable(plan: Plan, parts: int) -> list[str]:
    """Why a planned output cannot be shared out in `parts`, a sentence for each kind of linear; nothing if it can.

    Engines share out the rows of what reads a norm, by heads or neurons, and the columns of what ends attention or an
    MLP, whose sums they add up. A part has to hold whole groups.
    """
    config, family = text_config(plan.skeleton.checkpoint.config), plan.skeleton.family
    heads = config.get("num_attention_heads") or parts
    key_heads = config.get("num_key_value_heads") or heads
    found: dict[str, int] = {}
    if plan.readers == OURS:
        found[f"format {plan.format.name} is read by compressor alone, which shares nothing out"] = 1
    if heads % parts:
        found[f"{heads} attention heads are no multiple of {parts}"] = 1
    elif key_heads % parts and parts % key_heads:
        found[f"{key_heads} heads of keys and values neither divide {parts} nor are a multiple of it"] = 1
    for name, linear in plan.linears.items():
        if plan.skeleton.checkpoint.block_index(name + ".weight") is None:
            continue  # the embedding and the head are padded
        inside = family.inside(name)
        # Every GPU has a head of keys and values, be it that of others, too.
        times = min(parts, key_heads) if inside in (family.keys, family.values) else parts
        for problem in _problems(linear.operator, family.split(inside), times):
            place = starred(name)
            found[f"{place}: {problem}"] = found.get(f"{place}: {problem}", 0) + 1
    return [text if count == 1 else f"{text} ({count} of them)" for text, count in found.items()]


def _problems(operator: Operator, dimension: int | None, parts: int) -> Iterator[str]:
    if dimension is None:
        return
    what, size = ("rows", "columns")[dimension], operator.shape[dimension]
    each, group = size / parts, _group(operator)[dimension]
    if size % parts:
        yield f"{size:,} {what} are no multiple of {parts}"
    elif each % group:
        fits = math.gcd(int(each), group)
        way = f"; groups of {fits} do" if isinstance(operator, IntQuantized) and fits >= 16 else ""
        yield f"{size:,} {what} in {parts} parts are {int(each):,} each, into which groups of {group} do not fit{way}"


def _group(operator: Operator) -> tuple[int, int]:
    """Rows and columns that share a scale; 1 for those of whole rows, which all parts can have."""
    if isinstance(operator, IntQuantized):
        rows, columns = 1, operator.span
    elif isinstance(operator, BlockScaled):
        rows, columns = operator.rounding.rows, operator.rounding.span(operator.shape[1])
    else:
        return 1, 1
    return rows, columns if columns < operator.shape[1] else 1
