"""A page on all passes: what their modules say of them, and what shipped recipes that have them were measured to do."""

from __future__ import annotations

import inspect
import sys

from .passes import PASSES
from .recipe import Recipe, measured, parse_recipe, shipped

_HEAD = """# Passes

What each pass does, where it comes from, and what shipped recipes that have it make of the bundled models (`compressor
check` holds them to it; what a real model loses is in [`results.md`](results.md)). Every key of every pass is in
[`recipes.md`](recipes.md). This page is written by `compressor recipes passes`.
"""


def passes_guide() -> str:
    """Every pass as Markdown."""
    recipes = {name: parse_recipe(text, name) for name, text in shipped().items()}
    parts = [_HEAD]
    for kind, made in PASSES.items():
        said = inspect.cleandoc(sys.modules[made.__module__].__doc__ or "")
        parts.append(f"\n## {kind}\n\n{said}\n")
        using = {name: recipe for name, recipe in recipes.items() if any(step.kind == kind for step in recipe.passes)}
        if using:
            parts.append("\n" + "\n".join(_table(using)) + "\n")
        else:
            parts.append("\nNo shipped recipe has it.\n")
    return "".join(parts)


def _table(recipes: dict[str, Recipe]) -> list[str]:
    models = measured().models
    names = " | ".join(f"{name}, smaller | KL" for name in models)
    lines = [f"| recipe | what it does | {names} |", "|---|---|" + "---|---|" * len(models)]
    for name, recipe in recipes.items():
        cells = [f"`{name}`", recipe.description]
        for entry in models.values():
            found = entry.recipes.get(name)
            if found is None or entry.bytes is None:
                cells += ["–", "–"]
            else:
                cells += [f"{entry.bytes / found.figures.bytes:.2f} ×", f"{found.figures.kl_mean:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
