"""A checkpoint with fewer experts: the view of one on disk that names, slices and counts as if it had been saved so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .architectures import EXPERT_COUNTS
from .checkpoint import Checkpoint, TensorInfo, block_index


class PrunedCheckpoint(Checkpoint):
    """Some experts of each block, renumbered in order; nothing is read until a tensor is asked for.

    Every block keeps as many, for config.json has one count for all of them. Layers beyond the last block, which some
    models carry to predict several tokens and whose experts are not looked at, are left out.
    """

    def __init__(self, source: Checkpoint, kept: Mapping[int, Sequence[int]]) -> None:
        """
        Args:
            kept: block → numbers of its experts that stay, rising.
        """
        self._source, self.path, self.stored = source, source.path, source.stored
        self.config = pruned_config(source.config, {len(numbers) for numbers in kept.values()})
        self._parts: dict[str, tuple[str, Sequence[int] | None]] = {}
        for name in source.tensors:
            self._add(name, kept)
        self.tensors = {name: self._info(*part) for name, part in self._parts.items()}

    def _add(self, name: str, kept: Mapping[int, Sequence[int]]) -> None:
        """Where a tensor of the source comes to lie, if anywhere."""
        architecture = self._source.architecture
        memory = architecture.memory_name(name)
        index = block_index(memory)
        if index is not None and index >= self.config.get("num_hidden_layers", index + 1):
            return
        if index is None or index not in kept:
            self._parts[name] = name, None
            return
        block, inside = memory.split(".", 3)[:3], memory.split(".", 3)[3]
        if inside.startswith(architecture.experts + "."):
            number, rest = inside.removeprefix(architecture.experts + ".").split(".", 1)
            if int(number) in kept[index]:
                renamed = ".".join([*block, architecture.experts, str(list(kept[index]).index(int(number))), rest])
                self._parts[architecture.disk_name(renamed)] = name, None
        else:
            self._parts[name] = name, kept[index] if inside.startswith(architecture.router + ".") else None

    def _info(self, name: str, rows: Sequence[int] | None) -> TensorInfo:
        info = self._source.tensors[name]
        return info if rows is None else TensorInfo(info.file, info.dtype, (len(rows), *info.shape[1:]))

    def tensor(self, name: str) -> Tensor:
        source, rows = self._parts.get(name, (name, None))
        tensor = self._source.tensor(source)
        return tensor if rows is None else tensor[list(rows)]

    def release(self) -> None:
        self._source.release()


def pruned_config(config: Mapping[str, Any], counts: set[int]) -> dict[str, Any]:
    """`config.json` for another number of experts, under every name that readers look for it."""
    [count] = counts
    names = {name for name in EXPERT_COUNTS if name in config}
    if config.get("model_type") == "qwen3_moe":
        names |= {"num_experts", "num_local_experts"}  # transformers 4 reads the one, 5 saves the other
    beyond = {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in config else {}
    return {**config, **dict.fromkeys(sorted(names), count), **beyond}
