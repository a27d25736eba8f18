"""`compressor recipes`: recipes that come with compressor, and checks of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import render
from .arguments import JsonOption, RecipeArgument

recipes_app = typer.Typer(no_args_is_help=True, help="Recipes that come with compressor, and checks of your own.")


def read(source: str, edits: list[str] | None) -> tuple[str, Any]:
    """The text of a recipe and what it says, once edits are made."""
    from ..compress.recipe import parse_recipe, read_recipe

    name, text = read_recipe(source)
    return text, parse_recipe(text, name, tuple(edits or ()))


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """Names, one line each, and what they made of the bundled models when that was last checked."""
    from ..compress.recipe import measured, parse_recipe, shipped

    models = measured().models
    found: dict[str, dict[str, Any]] = {}
    for name, text in shipped().items():
        made = {}
        for model, entry in models.items():
            if name in entry.recipes and entry.bytes:
                figures = entry.recipes[name].figures
                made[model] = {"times_smaller": entry.bytes / figures.bytes, "kl_mean": figures.kl_mean}
        found[name] = {"description": parse_recipe(text, name).description, "measured": made}
    if as_json:
        render.document(found)
        return
    lines = []
    for name, about in found.items():
        cells = [name, about["description"]]
        for model in models:
            one = about["measured"].get(model)
            cells += ["–", "–"] if one is None else [f"{one['times_smaller']:.2f} ×", f"{one['kl_mean']:.4f}"]
        lines.append(cells)
    columns = [heading for model in models for heading in (model, f"KL, {model}")]
    spare = ["what it does", *columns[::-1]]
    render.out.print(render.table(["recipe", "what it does", *columns], lines, spare, ["what it does"]))
    render.out.print("the models' columns: how much smaller the bundled ones become, and what they lose")


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument) -> None:
    """The recipe with every default written out."""
    from ..compress.recipe import resolved_yaml

    print(resolved_yaml(read(recipe, None)[1]), end="")


@recipes_app.command("copy")
def recipes_copy(
    recipe: RecipeArgument, destination: Annotated[Path, typer.Argument(help="the file to write")]
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from ..compress.recipe import read_recipe
    from ..runtime.errors import ResourceError

    if destination.exists():
        raise ResourceError(f"{destination}: exists; choose another name")
    try:
        destination.write_text(read_recipe(recipe)[1], encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{destination}: cannot be written ({error.strerror}); choose another place") from None
    render.out.print(str(destination))


@recipes_app.command("validate")
def recipes_validate(files: Annotated[list[str], typer.Argument(help="recipe files or shipped names")]) -> None:
    """Check recipes; exit 1 if one of them has mistakes."""
    from ..compress.recipe import parse_recipe, read_recipe
    from ..runtime.errors import RecipeError

    bad = False
    for file, (name, text) in [(file, read_recipe(file)) for file in files]:
        try:
            parse_recipe(text, name)
            render.out.print(f"{file}: fine")
        except RecipeError as error:
            bad = True
            print(error)
    if bad:
        raise typer.Exit(1)


@recipes_app.command("options")
def recipes_options() -> None:
    """Every key of a recipe, what it may be and what it does, as Markdown."""
    from ..compress.recipe import options_table

    print(options_table(), end="")


@recipes_app.command("passes")
def recipes_passes() -> None:
    """What each pass does, where it comes from and what it was measured to do, as Markdown."""
    from ..compress.guide import passes_guide

    print(passes_guide(), end="")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """JSON schema of recipes, for editors."""
    from ..compress.recipe import json_schema

    render.document(json_schema())
