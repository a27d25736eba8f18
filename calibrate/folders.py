"""What calibration found of the uncompressed model, kept in a folder: it serves every recipe that needs no other.

Statistics are a safetensors file per block and an index, written last, which says what they were collected from.
Figures of surveys are small files beside them. Statistics of the compressed chain are never kept: they hold for one
prefix of compressed blocks only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime import processes
from ..runtime.errors import ResourceError
from ..runtime.files import read_saved, save_synced, write_synced
from ..runtime.text import json_text
from .curvature import Curvature
from .routing import Routing
from .statistics import UNPAIRED, Statistics

T = TypeVar("T")
_SOURCE = "source"  # in the metadata of files
_PLACES = ".places"  # behind a linear's name


class BlockFolder:
    """A folder with a file of tensors for each of some blocks.

    Args:
        folder: made when it is first written to.
        source: what identifies model, text and windows; a folder of something else is refused.
    """

    index: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder, self.source = folder, dict(source)
        self._index = folder / self.index
        if folder.exists() and not folder.is_dir():
            raise ResourceError(f"{folder}: is a file; name a folder for the statistics")
        if self._index.is_file():
            try:
                found = json.loads(self._index.read_text(encoding="utf-8"))
                if not isinstance(found, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise ResourceError(f"{self._index}: damaged ({error}); delete {folder}") from None
            changed = [key for key in {*found, *self.source} if found.get(key) != self.source.get(key)]
            if changed:
                raise ResourceError(
                    f"{folder}: these statistics are of another {' and '.join(sorted(changed))}; name another folder"
                )

    @property
    def complete(self) -> bool:
        return processes.once(self._index.is_file)

    def _save(self, block: int, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        if not processes.leads():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_synced(self._file(block), tensors, {**names, _SOURCE: self._digest})

    def _load(self, block: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            tensors, names = read_saved(self._file(block))
            if names.pop(_SOURCE, "") != self._digest:  # another run began with the same folder
                raise ResourceError(f"{self._file(block)}: of another model or text; delete {self.folder}")
            return tensors, names
        except (SafetensorError, OSError, ValueError) as error:
            raise ResourceError(f"{self._file(block)}: not readable ({error}); delete {self.folder}") from None

    def _made(
        self,
        block: int,
        device: torch.device | str,
        make: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, T]],
    ) -> dict[str, T]:
        """What a block's tensors, on a device, and what is said of each linear make."""
        tensors, names = self._load(block)
        try:
            entries = {name: json.loads(entry) for name, entry in names.items()}
            return make({name: tensor.to(device) for name, tensor in tensors.items()}, entries)
        except (ValueError, TypeError, KeyError) as error:
            raise ResourceError(f"{self._file(block)}: not readable ({error}); delete {self.folder}") from None

    def finish(self, blocks: Iterable[int]) -> None:
        """Declare the folder complete, if it is: a run may have begun without it."""
        if processes.leads() and all(self.holds(block) for block in blocks):
            write_synced(self._index, json.dumps(self.source, indent=2) + "\n")
        processes.wait()

    @property
    def _digest(self) -> str:
        """Of the source, in every file: runs on other texts may have begun with the same folder."""
        return _digest(self.source)

    def holds(self, block: int) -> bool:
        """Whether a block's file is there, of the same source."""
        try:
            with safe_open(self._file(block), framework="pt") as file:
                return bool((file.metadata() or {}).get(_SOURCE) == self._digest)
        except (SafetensorError, OSError):
            return False

    def _file(self, block: int) -> Path:
        return self.folder / f"{self.prefix}-{block:05d}.safetensors"


class StatisticsFolder(BlockFolder):
    """Statistics of what enters the linears, of every kind that needs no second chain."""

    index, prefix = "statistics.json", "block"

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        super().__init__(folder, {**source, "kinds": sorted(UNPAIRED)})

    def save(self, block: int, statistics: Mapping[str, Statistics]) -> None:
        """Keep a block's statistics; linears that share an object share its tensors on disk."""
        tensors: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for name, found in statistics.items():
            lead = next(other for other, shared in statistics.items() if shared is found)
            tensors |= {f"{lead}.{kind}": sums for kind, sums in found.sums.items()}
            names[name] = json.dumps([lead, found.tokens, found.lent])
        self._save(block, tensors, names)

    def load(self, block: int, device: torch.device | str = "cpu") -> dict[str, Statistics]:
        """A block's statistics by disk name, on a device.

        Raises:
            ResourceError: the file is missing or damaged.
        """

        def made(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> dict[str, Statistics]:
            found = {
                lead: Statistics(tokens, {kind: tensors[f"{lead}.{kind}"] for kind in UNPAIRED}, lent)
                for lead, tokens, lent in entries.values()
            }
            return {name: found[lead] for name, (lead, *_) in entries.items()}

        return self._made(block, device, made)


class RoutingFolder(BlockFolder):
    """What routers do with tokens, and a sample of these (`routing`)."""

    index, prefix = "routing.json", "routing"

    def save(self, block: int, routing: Routing, sample: Tensor) -> None:
        """Keep a block's sums, and some tokens `[tokens, hidden_size]` that entered its experts."""
        self._save(block, {**vars(routing), "sample": sample}, {})

    def load(self, block: int) -> tuple[Routing, Tensor]:
        """A block's sums and its sample of tokens.

        Raises:
            ResourceError: the file is missing or damaged.
        """
        tensors, _ = self._load(block)
        try:
            sample = tensors.pop("sample")
            return Routing(**tensors), sample
        except (KeyError, TypeError) as error:
            raise ResourceError(f"{self._file(block)}: not readable ({error}); delete {self.folder}") from None


class CurvatureFolder(BlockFolder):
    """What errors of linears' outputs cost the model (`curvature`)."""

    index, prefix = "curvature.json", "curvature"

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        super().__init__(folder, {**source, "holds": sorted(field.name for field in fields(Curvature))})

    def save(self, block: int, curvatures: Mapping[str, Curvature]) -> None:
        """Keep a block's; linears that share a metric share its tensor on disk."""
        tensors: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for name, found in curvatures.items():
            metric = found.metric
            lead = next((other for other, tensor in tensors.items() if tensor is metric), name)
            if metric is not None:
                tensors[lead] = metric
            if found.places is not None:
                tensors[name + _PLACES] = found.places
            names[name] = json.dumps([lead if metric is not None else "", found.trace, found.tokens])
        self._save(block, tensors, names)

    def load(self, block: int, device: torch.device | str = "cpu") -> dict[str, Curvature]:
        """A block's curvatures by disk name, on a device.

        Raises:
            ResourceError: the file is missing or damaged.
        """

        def made(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> dict[str, Curvature]:
            return {
                name: Curvature(trace, tensors[lead] if lead else None, tokens, tensors.get(name + _PLACES))
                for name, (lead, trace, tokens) in entries.items()
            }

        return self._made(block, device, made)


class FiguresFolder:
    """Figures that surveys of the whole model found, by name.

    Args:
        folder: made when it is first written to.
        source: what identifies model, text and windows.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder, self.source = folder, dict(source)

    def holds(self, what: Mapping[str, Any]) -> bool:
        """Whether these figures are there."""
        return processes.once(self._path(what)[1].is_file)

    def _path(self, what: Mapping[str, Any]) -> tuple[str, Path]:
        key = _digest({**self.source, "what": what})
        return key, self.folder / f"survey-{key[:16]}.json"

    def recalled(self, what: Mapping[str, Any], find: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is there already, or else what `find` finds, which is kept.

        Args:
            what: all that the figures depend on besides the source.

        Raises:
            ResourceError: the file is damaged.
        """
        key, path = self._path(what)
        if not processes.once(path.is_file):
            found = find()
            if not all(map(math.isfinite, found.values())):
                return found  # which whoever asked has to see
            if processes.leads():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_synced(path, json_text({"source": key, "found": found, "sha256": _digest(found)}))
            processes.wait()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            figures: dict[str, float] = content["found"]
            if (content["source"], content["sha256"]) != (key, _digest(figures)):
                raise ValueError("its checksum is another one")
        except (ValueError, TypeError, KeyError) as error:
            raise ResourceError(f"{path}: damaged ({error}); delete it") from None
        return figures


class BlockFigures:
    """Figures by name that a walk finds of single blocks, for each of those who ask, until the run is done.

    Args:
        folder: made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Keep a block's."""
        if not processes.leads():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(json.dumps(figures))
        write_synced(self._file(block), json.dumps({"found": content, "sha256": _digest(content)}))

    def load(self, block: int) -> dict[str, dict[str, float]] | None:
        """A block's; None where they are not there, or damaged."""
        return processes.once(lambda: self._read(block))

    def _read(self, block: int) -> dict[str, dict[str, float]] | None:
        try:
            content = json.loads(self._file(block).read_text(encoding="utf-8"))
            found: dict[str, dict[str, float]] = content["found"]
            return found if content["sha256"] == _digest(found) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
