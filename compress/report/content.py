"""What a report draws: everything that an output says about how it was made, read from its own files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...runtime.errors import VerifyError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.families import starred
from ...runtime.stored import open_model
from ..output.card import loading
from ..output.folder import PLAN, TIMINGS, events_of
from ..output.verify import read_manifest

CONTEXT_MEMORIES = (8, 16, 24, 48, 80)  # GB, of devices that people have


@dataclass(frozen=True)
class Content:
    """Of one output.

    Attributes:
        manifest: `compressor.json`; plan: `report/plan.json`; events: `report/layers.jsonl`; timings:
            `report/timings.jsonl`.
        drift: for each block, by how much the residual stream behind it is off.
        recipe: as it was written.
    """

    folder: Path
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    timings: Sequence[Mapping[str, Any]]
    drift: Sequence[float]
    reason: str
    recipe: str

    @classmethod
    def read(cls, folder: Path) -> Content:
        """
        Raises:
            VerifyError: the folder is no output, or was written before reports were.
        """
        manifest = read_manifest(folder)
        try:
            plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            quality = json.loads((folder / "report" / "quality.json").read_text(encoding="utf-8"))
            timings = [json.loads(line) for line in _lines(folder / TIMINGS)]
            recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
            return cls(
                folder, manifest, plan, events_of(folder), timings, quality["drift"], quality["reason"], recipe
            )  # fmt: skip
        except FileNotFoundError as error:
            raise VerifyError(
                f"{error.filename}: is not there, of which a report is made; was it written by an older compressor? "
                "apply the recipe again"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VerifyError(f"{folder}/report: not readable ({error}); apply the recipe again") from None

    @property
    def name(self) -> str:
        return Path(self.manifest["source"]["name"]).resolve().name

    def loading(self, shown: Path) -> dict[str, str]:
        """How readers open it, by their names, where it is shown to lie."""
        alone = self.model.text_config is self.model.config
        return loading(str(shown), self.manifest["readers"], alone=alone)

    @cached_property
    def model(self) -> Checkpoint:
        """The output, opened."""
        return open_model(self.folder)

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the weights, before and after."""
        found = self.manifest["bytes"]
        return found["before"], found["after"]

    @property
    def cached(self) -> tuple[int, int]:
        """Bytes of the KV cache for a token, before and after; 0 where it is not known."""
        return self.plan["kv_bytes_per_token_before"], self.plan["kv_bytes_per_token_after"]

    @property
    def context(self) -> list[tuple[int, int, int]]:
        """GB of a memory → tokens that fit into it beside the weights, before and after, where either does."""
        found = []
        for memory in CONTEXT_MEMORIES if all(self.cached) else ():
            before, after = (
                max(0, int((memory * 1e9 - weights) // cached))
                for weights, cached in zip(self.bytes, self.cached, strict=True)
            )
            if after:
                found.append((memory, before, after))
        return found

    @cached_property
    def linears(self) -> tuple[list[str], list[int]]:
        """Names inside a block, all experts as one, and numbers of the blocks, of linears that passes rewrote."""
        done = [self._place(event["name"]) for event in self.of("LayerDone")]
        names = list(dict.fromkeys(name for block, name in done if block is not None))
        return names, sorted({block for block, _ in done if block is not None})

    def by_block(self, key: str) -> list[list[float | None]]:
        """`error` or `bits` of what the last pass left, a row for each block of `linears`, a column for each name; of
        experts the mean over their weights."""
        names, blocks = self.linears
        last: dict[str, Mapping[str, Any]] = {}
        for event in self.of("LayerDone"):
            last[event["name"]] = event
        sums: dict[tuple[int | None, str], list[float]] = {}
        for name, event in last.items():
            total = sums.setdefault(self._place(name), [0.0, 0.0])
            total[0] += event[key] * event["weights"]
            total[1] += event["weights"]
        return [
            [None if (block, name) not in sums else sums[block, name][0] / sums[block, name][1] for name in names]
            for block in blocks
        ]

    def _place(self, name: str) -> tuple[int | None, str]:
        """Block and name in it, of a disk name, experts' numbers left out; of the embedding and the head None and the
        name."""
        block = self.model.block_index(f"{name}.weight")
        return block, name if block is None else starred(self.model.family.inside(name))

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """Events of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Step → seconds in each block; what no pass took is calibrating and writing."""
        blocks = {entry["block"]: entry for entry in self.timings if "block" in entry}
        steps = list(dict.fromkeys(step for entry in blocks.values() for step in entry.get("steps", ())))
        found = {step: [entry.get("steps", {}).get(step, 0.0) for entry in blocks.values()] for step in steps}
        rest = [entry["seconds"] - sum(entry.get("steps", {}).values()) for entry in blocks.values()]
        return {**found, "calibrating, writing": rest} if blocks else {}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
