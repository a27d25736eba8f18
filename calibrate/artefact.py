"""Statistics of the uncompressed model, kept in a folder: one calibration serves every recipe that needs no other.

One safetensors file per block and `statistics.json`, written last, which says what they were collected from.
Statistics of the compressed chain are never kept: they hold for one prefix of compressed blocks only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..runtime.errors import ResourceError
from ..runtime.files import write_synced
from .statistics import Statistics


class StatisticsFolder:
    """A folder of reference statistics.

    Args:
        folder: made when it is first written to.
        source: what identifies model, text and windows; a folder of something else is refused.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder, self.source = folder, dict(source)
        self._index = folder / "statistics.json"
        if folder.exists() and not folder.is_dir():
            raise ResourceError(f"{folder}: is a file; name a folder for the statistics")
        if self._index.is_file():
            try:
                found = json.loads(self._index.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ResourceError(f"{self._index}: damaged ({error}); delete {folder}") from None
            changed = [key for key in {*found, *self.source} if found.get(key) != self.source.get(key)]
            if changed:
                raise ResourceError(
                    f"{folder}: these statistics are of another {' and '.join(sorted(changed))}; name another folder"
                )

    @property
    def complete(self) -> bool:
        return self._index.is_file()

    def save(self, block: int, statistics: Mapping[str, Statistics]) -> None:
        """Keep a block's statistics; linears that share an object share its tensors on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, names = {}, {}
        for name, found in statistics.items():
            lead = next(other for other, shared in statistics.items() if shared is found)
            tensors[lead] = found.moment
            names[name] = json.dumps([lead, found.tokens])
        partial = self._file(block).with_suffix(".partial")
        try:
            save_file(tensors, partial, names)
        except SafetensorError as error:  # not an OSError, whatever the reason
            raise ResourceError(f"{partial}: cannot be written ({error}); name another folder") from None
        partial.replace(self._file(block))

    def load(self, block: int) -> dict[str, Statistics]:
        """A block's statistics by disk name.

        Raises:
            ResourceError: the file is missing or damaged.
        """
        try:
            with safe_open(self._file(block), framework="pt") as file:
                names = {name: json.loads(entry) for name, entry in file.metadata().items()}
                made = {lead: Statistics(tokens, file.get_tensor(lead)) for lead, tokens in names.values()}
        except Exception as error:  # safetensors' own, missing files, damaged entries
            raise ResourceError(f"{self._file(block)}: not readable ({error}); delete {self.folder}") from None
        return {name: made[lead] for name, (lead, _) in names.items()}

    def finish(self, blocks: int) -> None:
        """Declare the folder complete, if it is: a run may have begun without it."""
        if all(self._file(block).is_file() for block in range(blocks)):
            write_synced(self._index, json.dumps(self.source, indent=2) + "\n")

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"
