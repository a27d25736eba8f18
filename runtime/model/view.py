"""Checkpoints seen as if they had been saved with fewer or narrower experts; nothing is read until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from .checkpoint import Checkpoint, TensorInfo, block_index
from .families import EXPERT_COUNTS, SHARED

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
    config = pruned_config(source.config, {len(numbers) for numbers in kept.values()})
    architecture = source.architecture
    parts: dict[str, tuple[str, Cut]] = {}
    for name in source.tensors:
        memory = architecture.memory_name(name)
        index = block_index(memory)
        if index is not None and index >= config.get("num_hidden_layers", index + 1):
            continue
        if index is None or index not in kept:
            parts[name] = name, ()
            continue
        block, inside = memory.split(".", 3)[:3], memory.split(".", 3)[3]
        if inside.startswith(architecture.experts + "."):
            number, rest = inside.removeprefix(architecture.experts + ".").split(".", 1)
            if int(number) in kept[index]:
                place = str(list(kept[index]).index(int(number)))
                parts[architecture.disk_name(".".join([*block, architecture.experts, place, rest]))] = name, ()
        else:
            parts[name] = name, (kept[index],) if inside.startswith(architecture.router + ".") else ()
    return View(source, config, parts, made)


def narrower_experts(source: Checkpoint, width: int, made: Sequence[Path] = ()) -> View:
    """Every routed expert, and shared ones whose width config.json derives from theirs, with fewer neurons: those of
    `made`, else the first ones.

    Args:
        width: neurons of a routed expert that stay.
    """
    key = width_key(source.config)
    before, architecture = source.config[key], source.architecture
    parts: dict[str, tuple[str, Cut]] = {}
    for name, info in source.tensors.items():
        memory = architecture.memory_name(name)
        index = block_index(memory)
        inside = memory.split(".", 3)[3] if index is not None else ""
        cut: Cut = ()
        if inside.startswith((architecture.experts + ".", SHARED + ".")):
            down = inside.endswith("down_proj.weight")
            stays = slice(info.shape[1 if down else 0] // before * width)
            cut = (_ALL, stays) if down else (stays,)
        if index is None or index < source.config.get("num_hidden_layers", index + 1):
            parts[name] = name, cut
    return View(source, _without_further_layers({**source.config, key: width}), parts, made)


def width_key(config: Mapping[str, Any]) -> str:
    """Where config.json says how many neurons a routed expert has."""
    return "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"


def pruned_config(config: Mapping[str, Any], counts: set[int]) -> dict[str, Any]:
    """`config.json` for another number of experts, under every name that readers look for it."""
    [count] = counts
    names = {name for name in EXPERT_COUNTS if name in config}
    if config.get("model_type") == "qwen3_moe":
        names |= {"num_experts", "num_local_experts"}  # transformers 4 reads the one, 5 saves the other
    return _without_further_layers({**config, **dict.fromkeys(sorted(names), count)})


def _without_further_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    beyond = {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in config else {}
    return {**config, **beyond}
