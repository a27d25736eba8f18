"""A committed baseline: what recipes made of models when somebody last looked, and how far that may move.

The file is JSON. `models` maps a name to where the model is and to figures by recipe; `tolerances` are shares of a
figure, and an entry may have its own; `updates` says who changed what, and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from ..runtime.errors import RecipeError
from ..runtime.files import write_synced
from ..runtime.text import json_text

Verdict = Literal["same", "better", "worse", "other"]  # other: neither of the two, as another format is
_NUMBERS = ("bytes", "kv_bytes_per_token", "kl_mean", "perplexity_ratio", "peak_memory", "prompt_time", "decode_time")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Part):
    """What a recipe made of a model. Figures that are None were not measured, and are not compared.

    Attributes:
        bytes: of the weights as stored; kv_bytes_per_token: of the caches.
        format, readers: of the output.
        kl_mean, kl_error: KL(original ‖ output) per token in nats, in float32, and its standard error over windows;
            perplexity_ratio, ratio_error: alike.
        peak_memory: bytes that the process of the run took at most.
        prompt_time, decode_time: seconds of the output for a prompt, and for each token after it, as shares of the
            original's.
        digest: sha256 over those of the weight files.
    """

    bytes: int
    kv_bytes_per_token: float
    format: str
    readers: tuple[str, ...] | None = None
    kl_mean: float
    kl_error: float | None = None
    perplexity_ratio: float
    ratio_error: float | None = None
    peak_memory: int | None = None
    prompt_time: float | None = None
    decode_time: float | None = None
    digest: str | None = None

    def filled(self, found: Figures) -> Figures:
        """These, and of another measurement what is missing."""
        missing = {key: getattr(found, key) for key, value in self if value is None}
        return self.model_copy(update=missing)


class Tolerances(_Part):
    """How far figures may move, as shares of them, before that counts."""

    bytes: float = Field(0.0, ge=0)
    kv_bytes_per_token: float = Field(0.0, ge=0)
    kl_mean: float = Field(0.08, ge=0)
    perplexity_ratio: float = Field(0.01, ge=0)
    peak_memory: float = Field(0.25, ge=0)
    prompt_time: float = Field(0.25, ge=0)
    decode_time: float = Field(0.25, ge=0)
    other_text: float = Field(0.5, ge=0)  # of kl_mean, where the text is not that of the baseline
    digest: bool = False  # whether other bytes count, as they may on another processor


class Entry(_Part):
    """A recipe on a model: the edits it is run with, what came of it, and those tolerances that are its own; the others
    are the baseline's."""

    edits: tuple[str, ...] = Field((), alias="set")
    figures: Figures
    tolerances: Tolerances | None = None
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_serializer("tolerances")
    def _own(self, value: Tolerances | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(exclude_unset=True)


class ModelEntry(_Part):
    """Where a model is (a folder from where the command is run, or a hub id), the bytes of its weights as it came, and
    recipes that were run on it."""

    source: str
    bytes: int | None = None
    recipes: dict[str, Entry] = {}


class Text(_Part):
    """What models are compared on: windows drawn from a text, as `data` of a recipe has it, and its sha256."""

    source: str = "builtin"
    samples: int = Field(24, ge=1)
    sequence_length: int = Field(256, ge=2)
    seed: int = 0
    sha256: str | None = None


class Update(_Part):
    """That a baseline was changed."""

    date: str
    compressor: str
    why: str
    changed: tuple[str, ...]


class Baseline(_Part):
    """The file."""

    version: Literal[1] = 1
    text: Text = Text()
    tolerances: Tolerances = Tolerances()
    models: dict[str, ModelEntry] = {}
    updates: tuple[Update, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """
        Raises:
            RecipeError: the file cannot be read, or is no baseline.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as a baseline ({error})") from None
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())
            raise RecipeError(f"{path}: is no baseline: " + "; ".join(list(lines)[:3])) from None

    def write(self, path: Path) -> None:
        write_synced(path, json_text(self.model_dump(mode="json", by_alias=True, exclude_none=True)))

    def tolerances_of(self, model: str, recipe: str) -> Tolerances:
        found = self.models.get(model)
        entry = None if found is None else found.recipes.get(recipe)
        own = None if entry is None else entry.tolerances
        return self.tolerances if own is None else self.tolerances.model_copy(update=own.model_dump(exclude_unset=True))


@dataclass(frozen=True)
class Move:
    """A figure, before and now."""

    figure: str
    before: str
    now: str
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.figure} {self.before} → {self.now}"


def moves(found: Figures, expected: Figures, allowed: Tolerances, *, same_text: bool) -> list[Move]:
    """How figures moved, of those that both have. Of all numbers, less is better.

    Args:
        same_text: whether both were measured on the same text; if not, KL and perplexity may differ by more, and by
            three standard errors.
    """
    result = []
    for name in _NUMBERS:
        before, now = getattr(expected, name), getattr(found, name)
        if before is None or now is None:
            continue
        room = getattr(allowed, name) * abs(before)
        error = {"kl_mean": "kl_error", "perplexity_ratio": "ratio_error"}.get(name)
        if error is not None and not same_text:
            room = max(room, allowed.other_text * abs(before if name == "kl_mean" else before - 1))
            room += 3 * sum((getattr(one, error) or 0.0) ** 2 for one in (found, expected)) ** 0.5
        verdict: Verdict = "better" if now < before else "worse"
        if abs(now - before) <= room + 1e-9 * abs(before):
            verdict = "same"
        result.append(Move(name, _shown(before), _shown(now), "worse" if now != now else verdict))
    if found.format != expected.format:
        result.append(Move("format", expected.format, found.format, "other"))
    result += _readers(found.readers, expected.readers)
    if allowed.digest and None not in (found.digest, expected.digest) and found.digest != expected.digest:
        result.append(Move("digest", str(expected.digest)[:12], str(found.digest)[:12], "other"))
    return result


def _readers(now: tuple[str, ...] | None, before: tuple[str, ...] | None) -> list[Move]:
    if now is None or before is None or set(now) == set(before):
        return []
    lost = set(before) - set(now)
    return [Move("readers", ", ".join(sorted(before)), ", ".join(sorted(now)), "worse" if lost else "better")]


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def updated(
    baseline: Baseline, changes: Mapping[tuple[str, str], Entry], sources: Mapping[str, str], sizes: Mapping[str, int]
) -> Baseline:
    """A baseline with other entries, by model and recipe.

    Args:
        sources: of models that are not in it; sizes: bytes of the models.
    """
    models = dict(baseline.models)
    for (model, recipe), entry in changes.items():
        known = models.get(model) or ModelEntry(source=sources[model])
        recipes = {**known.recipes, recipe: entry}
        models[model] = ModelEntry(source=known.source, bytes=sizes[model], recipes=recipes)
    return baseline.model_copy(update={"models": models})
