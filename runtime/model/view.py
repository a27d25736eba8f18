"""Checkpoints seen as if they had been saved with other tensors: fewer or narrower experts, or the same function in
other weights. Nothing is read and nothing computed until it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from ..schemes import Operator
from .checkpoint import Checkpoint, TensorInfo
from .families import APART, with_text

_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # keys of config.json that count such layers


@dataclass(frozen=True)
class Derived:
    """A tensor of a view.

    Attributes:
        sources: names of the tensors of the source that it is made of.
        make: how, of those tensors in order; it works on `meta` too, by which shapes and dtypes are known. None for a
            single one that stays as it is.
        by_rows: whether each row is made of the same row of the first source.
        anew: whether what is made takes memory of its own, and is not a part of a mapped file.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None
    by_rows: bool = False
    anew: bool = False


class View(Checkpoint):
    """Another checkpoint through a table of names.

    Args:
        config: `config.json` of the view.
        parts: name here → what the tensor is.
        made: folders of safetensors files whose tensors, named as here, take the place of others; later folders count.
    """

    def __init__(
        self,
        source: Checkpoint,
        config: Mapping[str, Any],
        parts: Mapping[str, Derived],
        made: Sequence[Path] = (),
    ) -> None:
        self._source, self.path, self.stored, self._given = source, source.path, source.stored, source.family
        self.config, self._parts = dict(config), parts
        self.tensors = {name: self._info(part) for name, part in parts.items()}
        self._made: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for path in (path for folder in made for path in sorted(folder.glob("*.safetensors"))):
            with safe_open(path, framework="pt") as file:
                self._made |= dict.fromkeys(file.keys(), path)

    def _info(self, part: Derived) -> TensorInfo:
        infos = [self._source.tensors[name] for name in part.sources]
        if part.make is None:
            return infos[0]
        made = part.make(*(torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos))
        return TensorInfo(infos[0].file, made.dtype, tuple(made.shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor by the view's name: new, or made of the source's."""
        if name in self._made:
            path = self._made[name]
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt")
            made: Tensor = self._opened[path].get_tensor(name)
            return made
        if name not in self._parts:
            raise ModelError(f"{self.path}: the checkpoint has no tensor {name!r}")
        part = self._parts[name]
        sources = [self._source.tensor(source) for source in part.sources]
        return sources[0] if part.make is None else part.make(*sources)

    def made(self, name: str) -> bool:
        part = self._parts[name]
        return part.anew or (name not in self._made and any(map(self._source.made, part.sources)))

    @property
    def native(self) -> bool:
        return self._source.native

    def _unchanged(self, linear: str) -> str | None:
        """The linear of the source that one is; None where it is another."""
        name = linear + ".weight"
        [*sources] = self._parts[name].sources
        return None if self._parts[name].make or name in self._made else sources[0].removesuffix(".weight")

    def outline(self, linear: str) -> Operator:
        source = self._unchanged(linear)
        return super().outline(linear) if source is None else self._source.outline(source)

    def form(self, linear: str) -> str:
        source = self._unchanged(linear)
        return super().form(linear) if source is None else self._source.form(source)

    def operator(self, linear: str) -> Operator:
        source = self._unchanged(linear)
        return super().operator(linear) if source is None else self._source.operator(source)

    def stored_bytes(self, name: str) -> int:
        """Bytes that what a tensor is made of lies on disk as."""
        return sum(map(self._source.stored_bytes, self._parts[name].sources))

    def by_rows(self, name: str) -> bool:
        part = self._parts[name]
        if name in self._made:
            return False
        return part.by_rows or (part.make is None and self._source.by_rows(part.sources[0]))

    def rows(self, name: str, which: Tensor) -> Tensor:
        part = self._parts[name]
        if not self.by_rows(name):
            return super().rows(name, which)
        found = self._source.rows(part.sources[0], which)
        if part.make is None:
            return found
        made: Tensor = part.make(found, *map(self._source.tensor, part.sources[1:]))
        return made.to(self.tensors[name].dtype).float()

    def stored_tensor(self, name: str) -> Tensor:
        """The source's, by its own name."""
        return self._source.stored_tensor(name)

    def expect(self, *blocks: int) -> None:
        self._source.expect(*blocks)

    def release(self) -> None:
        self._opened.clear()
        self._source.release()


def changed(source: Checkpoint, parts: Mapping[str, Derived], made: Sequence[Path] = ()) -> View:
    """The same model with some tensors made otherwise."""
    return View(source, source.config, {name: Derived((name,)) for name in source.tensors} | dict(parts), made)


def fewer_experts(source: Checkpoint, kept: Mapping[int, Sequence[int]], made: Sequence[Path] = ()) -> View:
    """Some experts of each block, renumbered in the order given.

    Every block keeps as many, for config.json has one count for all of them. Layers beyond the last block, which some
    models carry to predict several tokens, are left out if `kept` does not have them; those that lie apart
    (Qwen3-Next's) if they have experts.

    Args:
        kept: block, or layer beyond → numbers of its experts that stay.
    """
    family = source.family
    experts, blocks = family.experts, source.text_config.get("num_hidden_layers")
    parts: dict[str, Derived] = {}
    counts: dict[int, int] = {}
    places = {name: (source.block_index(name), source.numbered(name)) for name in source.tensors}
    for index, place in places.values():
        if index is not None and index in kept and (number := experts.number(family.inside(place))) is not None:
            counts[index] = max(counts.get(index, 0), number + 1)
    gone = further_tensors(source, kept)
    for name, (index, place) in places.items():
        if name in gone:
            continue
        if index is None or index not in kept:
            parts[name] = Derived((name,))
            continue
        inside = family.inside(place)
        number = experts.number(inside)
        if number is None:
            each = inside.startswith(experts.router + ".") or inside in experts.rows
            each = each and counts[index] in source.tensors[name].shape[:2]  # routers have other tensors, too
            cut = partial(_rows, numbers=tuple(kept[index])) if each else None
            parts[name] = Derived((name,), cut)
        elif number in kept[index]:
            rest = inside.removeprefix(f"{experts.where}.{number}.")
            other = f"{experts.where}.{list(kept[index]).index(number)}.{rest}"
            other = family.disk_name(f"{family.memory_name(place).removesuffix(inside)}{other}")
            parts[source.lying(other)] = Derived((name,))
    beyond = sum(index >= blocks for index in kept) if blocks is not None else 0
    return View(source, pruned_config(source, {len(numbers) for numbers in kept.values()}, beyond), parts, made)


def narrower_experts(source: Checkpoint, width: int, made: Sequence[Path] = ()) -> View:
    """Every routed expert, and shared ones whose width config.json derives from theirs, with fewer neurons: those of
    `made`, else the first ones.

    Args:
        width: neurons of a routed expert that stay.
    """
    family, experts = source.family, source.family.experts
    before = source.text_config[experts.width]
    parts, gone = dict[str, Derived](), further_tensors(source)
    for name, info in source.tensors.items():
        index = source.block_index(name)
        inside = family.inside(source.numbered(name)) if index is not None else ""
        cut = None
        if inside.startswith((experts.where + ".", experts.shared + ".")):
            columns = inside.endswith("down_proj.weight")
            stays = info.shape[1 if columns else 0] // before * width
            cut = partial(_first, count=stays, columns=columns)
        if name not in gone:
            parts[name] = Derived((name,), cut)
    return View(source, without_further_layers(source, {experts.width: width}), parts, made)


def further_tensors(source: Checkpoint, kept: Container[int] = ()) -> set[str]:
    """Tensors of what predicts a token further ahead, but for the layers that are kept, and those that lie apart and
    have no experts."""
    blocks = source.text_config.get("num_hidden_layers")
    behind = [(name, index) for name in source.tensors if (index := source.block_index(name)) is not None]
    further = {name for name, index in behind if isinstance(blocks, int) and index >= blocks and index not in kept}
    apart = {name for name in source.tensors if name.startswith(APART)}
    sparse = any(".experts." in name for name in further & apart)
    return further | apart if sparse else further - apart


def pruned_config(source: Checkpoint, counts: set[int], beyond: int = 0) -> dict[str, Any]:
    """`config.json` for another number of experts, under every name that readers look for it.

    Args:
        beyond: layers that stay behind the last block.
    """
    [count] = counts
    experts = source.family.experts
    names = {name for name in experts.counts if name in source.text_config}.union(experts.also)
    return without_further_layers(source, dict.fromkeys(sorted(names), count), beyond)


def without_further_layers(source: Checkpoint, changes: Mapping[str, Any], left: int = 0) -> dict[str, Any]:
    """`config.json` with changes of what it says of the language model, with so many layers beyond the last block."""
    gone = bool(further_tensors(source))
    beyond = {key: left for key in _FURTHER if key in source.text_config and gone}
    return with_text(source.config, {**changes, **beyond})


def _rows(tensor: Tensor, *, numbers: Sequence[int]) -> Tensor:
    """Some rows, in the order given; columns of a tensor of one row."""
    return tensor[list(numbers)] if len(tensor) > 1 else tensor[:, list(numbers)]


def _first(tensor: Tensor, *, count: int, columns: bool) -> Tensor:
    """The first rows or columns."""
    return tensor[:, :count] if columns else tensor[:count]
