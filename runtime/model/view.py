"""Checkpoints seen as if they had been saved with fewer or narrower experts; nothing is read until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from .checkpoint import Checkpoint, TensorInfo
from .families import with_text

Cut = tuple[Sequence[int] | slice, ...]  # what stays, for each of the first dimensions
_ALL = slice(None)


class View(Checkpoint):
    """Another checkpoint through a table of names.

    Args:
        config: `config.json` of the view.
        parts: name here → name there, and what stays of the tensor.
        made: folders of safetensors files whose tensors, named as here, take the place of what would be cut; later
            folders count.
    """

    def __init__(
        self,
        source: Checkpoint,
        config: Mapping[str, Any],
        parts: Mapping[str, tuple[str, Cut]],
        made: Sequence[Path] = (),
    ) -> None:
        self._source, self.path, self.stored = source, source.path, source.stored
        self.config, self._parts = dict(config), parts
        self.tensors = {name: self._info(*part) for name, part in parts.items()}
        self._made: dict[str, Path] = {}
        for path in (path for folder in made for path in sorted(folder.glob("*.safetensors"))):
            with safe_open(path, framework="pt") as file:
                self._made |= dict.fromkeys(file.keys(), path)

    def _info(self, name: str, cut: Cut) -> TensorInfo:
        info = self._source.tensors[name]
        cuts = (*cut, *[_ALL] * (len(info.shape) - len(cut)))
        sizes = zip(info.shape, cuts, strict=True)
        shape = tuple(len(range(n)[c]) if isinstance(c, slice) else len(c) for n, c in sizes)
        return TensorInfo(info.file, info.dtype, shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor by the view's name: new, or of the source."""
        if name in self._made:
            with safe_open(self._made[name], framework="pt") as file:
                made: Tensor = file.get_tensor(name)
            return made
        if name not in self._parts:
            raise ModelError(f"{self.path}: the checkpoint has no tensor {name!r}")
        source, cut = self._parts[name]
        tensor = self._source.tensor(source)
        for dimension, stays in enumerate(cut):
            if stays != _ALL:
                whole = (_ALL,) * dimension
                tensor = tensor[(*whole, stays if isinstance(stays, slice) else list(stays))]
        return tensor

    def stored_tensor(self, name: str) -> Tensor:
        """The source's, by its own name."""
        return self._source.stored_tensor(name)

    def release(self) -> None:
        self._source.release()


def fewer_experts(source: Checkpoint, kept: Mapping[int, Sequence[int]], made: Sequence[Path] = ()) -> View:
    """Some experts of each block, renumbered in the order given.

    Every block keeps as many, for config.json has one count for all of them. Layers beyond the last block, which some
    models carry to predict several tokens and whose experts are not looked at, are left out.

    Args:
        kept: block → numbers of its experts that stay.
    """
    family = source.family
    experts, blocks = family.experts, source.text_config.get("num_hidden_layers")
    parts: dict[str, tuple[str, Cut]] = {}
    for name in source.tensors:
        index = source.block_index(name)
        if index is not None and blocks is not None and index >= blocks:
            continue
        if index is None or index not in kept:
            parts[name] = name, ()
            continue
        inside = family.inside(name)
        number = experts.number(inside)
        if number is None:
            parts[name] = name, (kept[index],) if inside.startswith(experts.router + ".") else ()
        elif number in kept[index]:
            rest = inside.removeprefix(f"{experts.where}.{number}.")
            place = f"{experts.where}.{list(kept[index]).index(number)}.{rest}"
            parts[family.disk_name(f"{family.memory_name(name).removesuffix(inside)}{place}")] = name, ()
    return View(source, pruned_config(source, {len(numbers) for numbers in kept.values()}), parts, made)


def narrower_experts(source: Checkpoint, width: int, made: Sequence[Path] = ()) -> View:
    """Every routed expert, and shared ones whose width config.json derives from theirs, with fewer neurons: those of
    `made`, else the first ones.

    Args:
        width: neurons of a routed expert that stay.
    """
    family, blocks = source.family, source.text_config.get("num_hidden_layers")
    experts = family.experts
    before = source.text_config[experts.width]
    parts: dict[str, tuple[str, Cut]] = {}
    for name, info in source.tensors.items():
        index = source.block_index(name)
        inside = family.inside(name) if index is not None else ""
        cut: Cut = ()
        if inside.startswith((experts.where + ".", experts.shared + ".")):
            down = inside.endswith("down_proj.weight")
            stays = slice(info.shape[1 if down else 0] // before * width)
            cut = (_ALL, stays) if down else (stays,)
        if index is None or blocks is None or index < blocks:
            parts[name] = name, cut
    return View(source, _without_further_layers(source, {experts.width: width}), parts, made)


def pruned_config(source: Checkpoint, counts: set[int]) -> dict[str, Any]:
    """`config.json` for another number of experts, under every name that readers look for it."""
    [count] = counts
    experts = source.family.experts
    names = {name for name in experts.counts if name in source.text_config}.union(experts.also)
    return _without_further_layers(source, dict.fromkeys(sorted(names), count))


def _without_further_layers(source: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Any]:
    beyond = {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in source.text_config else {}
    return with_text(source.config, {**changes, **beyond})
