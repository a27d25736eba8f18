"""Folders that were tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from compressor.runtime import load
from compressor.runtime.errors import ModelError


def flip(path: Path, place: int) -> None:
    """Change a bit of one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def refuser(out: Path) -> Callable[..., None]:
    """What expects that an output of one file is refused with a message, with other tensors in it and something else
    said of them in `quantization_config`."""
    config = json.loads((out / "config.json").read_text())

    def refuses(match: str, tensors: dict[str, Tensor], **told: object) -> None:
        save_file(tensors, out / "model.safetensors")
        changed = {**config, "quantization_config": {**config["quantization_config"], **told}}
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=match):
            load(out)

    return refuses
