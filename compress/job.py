"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .recipe import Recipe


@dataclass(frozen=True)
class Job:
    """Everything a run is made of.

    Attributes:
        recipe_text: the recipe's file verbatim; `edits` were applied to it.
        model, revision: the folder, and the hub commit it came from, if any.
        source: what the user named as the model.
        recipe_file: where the recipe lies, if it is a file.
    """

    recipe: Recipe
    recipe_text: str
    edits: tuple[str, ...]
    model: Path
    out: Path
    source: str
    revision: str | None = None
    recipe_file: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """What the run reads."""
        sources = {self.recipe.data.source, *(step.text or "builtin" for step in self.recipe.passes)}
        data = [Path(source) for source in sorted(sources - {"builtin"})]
        models = [folder for step in self.recipe.passes for folder in step.inputs]
        linked = [file for folder in (self.model, *models) for file in folder.glob("*.gguf")]
        return [self.model, *models, *linked, *data, *([self.recipe_file] if self.recipe_file else [])]
