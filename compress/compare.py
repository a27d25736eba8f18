"""Outputs beside each other: what each costs and what it loses, and which of them nothing beats."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from ..runtime.errors import RecipeError
from ..runtime.loader import load
from ..runtime.stored import StoredModel, open_model
from .baseline import Figures, Text
from .check import judged, text_of
from .evaluate.job import shared_windows
from .evaluate.measures import cache_per_token

MAX_CHOICES = 256
Row = tuple[str, Figures]


def compared(models: Mapping[str, Path], text: Text) -> Iterator[Row]:
    """The first model, which loses nothing, and then each output that was made of it.

    Args:
        models: name → folder.

    Raises:
        ModelError: a model makes other tokens of the text.
    """
    base, *others = models.values()
    windows = shared_windows(text_of(text), base, others, text.samples, text.sequence_length)
    for name, folder in models.items():
        opened = open_model(folder)
        lost = {"kl_mean": 0.0, "perplexity_ratio": 1.0} if folder is base else judged(folder, base, windows)
        yield (
            name,
            Figures(
                bytes=opened.nbytes,
                kv_bytes_per_token=cache_per_token(load(folder), windows[:1]),
                format=opened.format.name if isinstance(opened, StoredModel) else "plain",
                **lost,
            ),
        )


def unbeaten(rows: Sequence[Row], cost: str) -> set[str]:
    """Names of the rows of which no other costs no more and loses no more, one of the two being less.

    Args:
        cost: a figure, as `bytes`.
    """
    points = [(name, getattr(figures, cost), figures.kl_mean) for name, figures in rows]
    return {
        name
        for name, x, y in points
        if not any(a <= x and b <= y and (a < x or b < y) for _, a, b in points)
    }  # fmt: skip


def variations(edits: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Every combination of edits of which some have several values, with a name each.

    Args:
        edits: `path=value`; a value in brackets is a list of choices.

    Raises:
        RecipeError: no edit has choices, or there are too many combinations.
    """
    choices: list[list[str]] = []
    for edit in edits:
        path, equals, value = edit.partition("=")
        try:
            parsed = yaml.safe_load(value) if equals else None
        except yaml.YAMLError:
            parsed = None  # which the recipe's own check explains
        choices.append([f"{path}={_written(one)}" for one in parsed] if isinstance(parsed, list) else [edit])
    if not any(len(values) > 1 for values in choices):
        raise RecipeError(
            "a sweep needs an option with several values, as --set passes.0.bits=[2,3,4]; for one that is itself a "
            "list, a list of lists"
        )
    found = list(itertools.islice(itertools.product(*choices), MAX_CHOICES + 1))
    if len(found) > MAX_CHOICES:
        raise RecipeError(f"these are more than {MAX_CHOICES} combinations; give fewer values")
    varied = [number for number, values in enumerate(choices) if len(values) > 1]
    keys = [choices[number][0].partition("=")[0] for number in varied]
    last = [re.split(r"[.]", key)[-1] for key in keys]
    short = last if len(set(last)) == len(last) else keys
    names = [
        " ".join(f"{key}={edits[number].partition('=')[2]}" for key, number in zip(short, varied, strict=True))
        for edits in found
    ]
    return list(zip(names, found, strict=True))


def _written(value: object) -> str:
    """A YAML value in one line, as edits have it."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1 << 20)).removesuffix("...\n").strip()
