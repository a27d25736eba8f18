"""Typed recipes: YAML in, passes out, and errors that point at the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from ..runtime.errors import RecipeError
from .passes import PASSES, AnyPass
from .passes.base import LinearPass

if TYPE_CHECKING:
    from .baseline import Baseline

_Path = tuple[str | int, ...]


SAMPLES = 128  # windows to calibrate on, where nothing asks for more
# What PyYAML raises, beside errors of its own, for dates that do not exist, keys that are lists, loops.
_NOT_YAML = (ValueError, TypeError, AttributeError, RecursionError)
_SCHEMA = "# yaml-language-server: $schema=./schema.json\n"  # for editors, of the files as they lie beside it
_ENTRIES = 10_000  # that aliases may make of a short text
LARGE_MODEL = 100_000_000  # parameters from which the built-in calibration text is too little
TOKENS = 16  # to calibrate on, for each input of the widest linear


class Data(BaseModel):
    """The text that calibrates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "builtin", description="'builtin' (the Python standard library's text), or a .txt or .jsonl file"
    )
    samples: int | None = Field(
        None,
        gt=0,
        description="how many windows of tokens are read; default: 128, or as many as make 16 tokens for each input of "
        "the widest linear, as far as the text goes",
    )
    sequence_length: int = Field(512, gt=1, description="tokens in a window; windows are packed without padding")
    seed: int = Field(0, ge=0, description="number that decides which windows of the text are drawn")

    def sized(self, widest: int) -> Data:
        """These with a number of samples, for a model whose widest linear has so many inputs."""
        return self.model_copy(update={"samples": self.samples or max(SAMPLES, self.enough(widest))})

    def enough(self, widest: int) -> int:
        """How many samples a model wants whose widest linear has so many inputs."""
        return math.ceil(TOKENS * widest / self.sequence_length)

    @property
    def tokens(self) -> int:
        """How many are read, at most."""
        return (self.samples or SAMPLES) * self.sequence_length


class Limits(BaseModel):
    """How far the output may be from the original; beyond, it is written all the same, and the exit code is 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl: float | None = Field(
        0.5,
        gt=0,
        description="KL(original ‖ output) per token, in nats, on text that did not calibrate, if any is left; null: "
        "no limit",
    )
    perplexity_ratio: float | None = Field(
        1.5, gt=0, description="perplexity of that text, as a multiple of the original's; null: no limit"
    )


class Tune(BaseModel):
    """After all passes: scales of integers, norms and biases of blocks are trained for the original's answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(
        256,
        gt=0,
        description="windows of text that do not calibrate, fewer where the text has no more; each serves one step, "
        "but for one in 16, by which it is told whether what came is better and is kept",
    )
    batch: int = Field(
        2, gt=0, description="windows of a step; of several processes, each takes as many, and one at least"
    )
    rate: float = Field(
        0.002,
        gt=0,
        le=0.1,
        description="by what share of the difference between two codes weights move in a step, in the mean, at most",
    )


class Output(BaseModel):
    """What is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["auto", "compressed-tensors", "fp8", "gptq", "awq", "compressor", "dense"] = Field(
        "auto",
        description="auto: compressed-tensors wherever a reader of it can take every tensor, else fp8 (what fp8-block "
        "leaves, rows and columns of any number), else compressor; gptq, "
        "awq: integers (awq: of 4 bits) for GPTQModel and engines that want such checkpoints; dense: decoded to plain "
        "weights, which is no smaller",
    )
    shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?(MB|GB)$", description="largest weight file, as 500MB or 5GB")

    @property
    def shard_bytes(self) -> int:
        unit = {"MB": 10**6, "GB": 10**9}[self.shard_size[-2:]]
        return int(float(self.shard_size[:-2]) * unit)


class Recipe(BaseModel):
    """What to do to a model: passes in order, the text that calibrates them, the form of the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = Field(1, description="version of the recipe language")
    description: str = Field("", description="one line that says what the recipe is for, shown by `recipes list`")
    data: Data = Field(Data(), description="the text that calibrates")
    passes: tuple[AnyPass, ...] = Field(
        min_length=1, description="the passes, in the order in which each linear goes through them"
    )
    tune: Tune | None = Field(
        None,
        description="after all passes, scales of integers, norms and biases of blocks trained so that the answers come "
        "nearer to the original's; null: not",
    )
    output: Output = Field(Output(), description="what is written")
    limits: Limits = Field(Limits(), description="how far the output may be from the original")

    @property
    def linear_passes(self) -> dict[int, LinearPass]:
        """Number in `passes` → the passes that rewrite linears."""
        return {number: step for number, step in enumerate(self.passes) if isinstance(step, LinearPass)}


def little_text(recipe: Recipe, parameters: int) -> bool:
    """Whether the text that comes with this package calibrates a model too large for it."""
    asked = any(step.needs for step in recipe.passes)
    return asked and recipe.data.source == "builtin" and parameters > LARGE_MODEL


_SECTIONS: dict[str, type[BaseModel]] = {"data": Data, "tune": Tune, "output": Output, "limits": Limits}
RENAMED = {"lorc-calibrated-50": "latents-50", "lorc-w4": "latents-w4"}  # old name of a shipped recipe → its name


def shipped() -> dict[str, str]:
    """Name → text of the recipes that come with compressor."""
    folder = resources.files("compressor.recipes")
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
    return {name: texts[name].removeprefix(_SCHEMA) for name in sorted(texts)}


def measured() -> Baseline:
    """What they made of the bundled models, as it is checked."""
    from .baseline import Baseline

    with resources.as_file(resources.files("compressor.recipes") / "baselines.json") as path:
        return Baseline.read(path)


def read_recipe(source: str) -> tuple[str, str]:
    """A path or a shipped name → `(name for messages, text)`."""
    path = Path(source)
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read ({error})") from None
    source = RENAMED.get(source, source)
    if source in shipped():
        return f"{source}.yaml", shipped()[source]
    names = list(shipped())
    close = [name for name in names if source and name.startswith(source)] or get_close_matches(source, names, 1)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "compressor recipes list names those"
    raise RecipeError(f"{source}: no such recipe file and no shipped recipe of that name; {hint}")


def parse_recipe(text: str, name: str = "recipe", edits: tuple[str, ...] = ()) -> Recipe:
    """Check a recipe's text.

    Args:
        text: YAML.
        name: for `name:line:column` in messages.
        edits: `path=value`, as in `passes.0.bits=3`; applied before the check.

    Raises:
        RecipeError: all mistakes at once, one `name:line:column` each.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name}:1:1: a recipe is a mapping with the key 'passes'")
        where: dict[_Path, tuple[yaml.Mark, yaml.Mark]] = {}
        duplicates = list(_marks(node, (), where, max(_ENTRIES, len(text))))  # what is written out takes characters
        document = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise RecipeError(f"{name}:1:1: not a recipe ({str(error).splitlines()[0]})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        lines = text.splitlines()
        shown = f"\n    {lines[mark.line]}\n    {' ' * mark.column}^" if mark and mark.line < len(lines) else ""
        raise RecipeError(f"{name}:{place}: not YAML: {error.problem}{shown}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}:1:1: not YAML ({error})") from None
    problems = [f"{name}:{line}: {message}" for line, message in duplicates]
    for edit in edits:
        _apply_edit(document, edit)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        paths = [tuple(_edit_path(edit)) for edit in edits]
        edited = {*paths, *({path[:end] for path in paths for end in range(1, len(path))} - set(where))}
        # A list whose items are wrong is also reported as too short.
        items = [dict(e) for e in error.errors(include_url=False) if not (e["type"] == "too_short" and e["input"])]
        problems += [_explain(name, text, where, edited, item) for item in items]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@cache
def json_schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def options_table() -> str:
    """Every key of a recipe as Markdown: what it may be, its default, what it does."""
    lines = []
    models: list[tuple[str, type[BaseModel]]] = [("recipe", Recipe), *_SECTIONS.items()]
    for title, model in [*models, *((f"passes: kind {name}", kind) for name, kind in PASSES.items())]:
        lines += [f"### {title}", "", (model.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| key | may be | default | what it does |", "|---|---|---|---|"]
        for key, spec in model.model_json_schema()["properties"].items():
            if key != "kind" and key not in {name for name, _ in models}:
                default = model.model_fields[key].get_default()
                shown = "" if default is PydanticUndefined else f"`{json.dumps(default)}`"
                lines.append(f"| `{key}` | {_allowed(spec)} | {shown} | {spec.get('description', '')} |")
        lines.append("")
    return "\n".join(lines)


def _allowed(spec: dict[str, Any]) -> str:
    """What a JSON schema's property may be, in words."""
    if "enum" in spec or "const" in spec:
        return ", ".join(str(value) for value in spec.get("enum", [spec.get("const")]))
    if spec.get("type") in ("array", "object"):
        return "a list" if spec["type"] == "array" else "a mapping"
    if "anyOf" in spec:  # where nothing is the default, it is not named
        return ", or ".join(_allowed(part) for part in spec["anyOf"] if part.get("type") != "null")
    signs = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    words = [
        {"integer": "a whole number", "boolean": "true or false", "string": "text"}.get(
            spec.get("type", ""), "a number"
        )
    ]
    return " ".join([*words, *(f"{sign} {spec[key]}" for key, sign in signs.items() if key in spec)])


def _marks(
    node: yaml.Node, path: _Path, where: dict[_Path, tuple[yaml.Mark, yaml.Mark]], most: int
) -> Iterator[tuple[str, str]]:
    """Fill in where each path stands (key mark, value mark), `most` of them; yield duplicate keys, which PyYAML would
    drop silently.

    Raises:
        ValueError: there are more, which aliases of aliases can make endlessly many.
    """
    if len(where) > most:
        raise ValueError(f"it has more than {most:,} entries, aliases followed")
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            here = (*path, key.value)
            if key.value in first:
                place = f"{key.start_mark.line + 1}:{key.start_mark.column + 1}"
                yield place, f"duplicate key {key.value!r}, first on line {first[key.value]}"
            first.setdefault(key.value, key.start_mark.line + 1)
            where[here] = key.start_mark, value.start_mark
            yield from _marks(value, here, where, most)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            where[(*path, number)] = value.start_mark, value.start_mark
            yield from _marks(value, (*path, number), where, most)


def _edit_path(edit: str) -> list[str | int]:
    return [int(part) if part.isascii() and part.isdigit() else part for part in edit.partition("=")[0].split(".")]


def _apply_edit(document: Any, edit: str) -> None:
    if "=" not in edit:
        raise RecipeError(f"--set {edit}: write it as path=value, for example passes.0.bits=3")
    *parents, last = _edit_path(edit)
    place = document
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        else:
            raise RecipeError(f"--set {edit}: the recipe has no {'.'.join(map(str, parents))}")
    value: Any = edit.partition("=")[2]
    with suppress(yaml.YAMLError, *_NOT_YAML):  # what is not YAML, like a glob, is the text itself
        value = yaml.safe_load(value)
    if isinstance(place, dict) or (isinstance(place, list) and isinstance(last, int) and last < len(place)):
        place[last] = value  # type: ignore[index]
    else:
        raise RecipeError(f"--set {edit}: the recipe has no {'.'.join(map(str, [*parents, last]))}")


def _explain(
    name: str, text: str, where: dict[_Path, tuple[yaml.Mark, yaml.Mark]], edited: set[_Path], error: dict[str, Any]
) -> str:
    """One pydantic error as `name:line:column: path: what (hint)` with the line itself and a caret."""
    path: _Path = ()
    model: type[BaseModel] = Recipe
    for part in error["loc"]:
        if part in PASSES and path and path[0] == "passes":
            model = PASSES[str(part)]  # the union's tag is in loc but not in the document
        elif (*path, part) in where or (*path, part) in edited or error["type"] == "extra_forbidden":
            path = (*path, part)
            if len(path) == 1 and part in _SECTIONS:
                model = _SECTIONS[str(part)]
    message = error["msg"].removeprefix("Value error, ")
    extra = error["type"] == "extra_forbidden"
    if extra:
        close = get_close_matches(str(path[-1]), model.model_fields, 1)
        message = (
            f"unknown key (did you mean {close[0]!r}?)"
            if close
            else f"unknown key; known: {', '.join(model.model_fields)}"
        )
    elif error["type"] == "missing":
        message = f"the key {error['loc'][-1]!r} is missing"
    elif error["type"].startswith("union_tag"):
        kind = error.get("input", {}).get("kind") if isinstance(error.get("input"), dict) else None
        close = get_close_matches(str(kind), PASSES, 1)
        message = f"unknown pass {kind!r}" if kind is not None else "a pass needs a 'kind'"
        message += f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(PASSES)}"
        path = (*path, "kind") if (*path, "kind") in where else path
    if path in edited:
        return f"--set {'.'.join(map(str, path))}: {message}"
    known = path
    while known and known not in where:
        known = known[:-1]
    dotted = ".".join(map(str, path))
    if not known:
        return f"{name}:1:1: {dotted + ': ' if dotted else ''}{message}"
    mark = where[known][0 if extra else 1]
    line = text.splitlines()[mark.line]
    return f"{name}:{mark.line + 1}:{mark.column + 1}: {dotted}: {message}\n    {line}\n    {' ' * mark.column}^"
