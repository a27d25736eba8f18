"""Shared fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pico import build_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pico("llama")` → the folder of a small random model; made once for each set of arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = build_model(family, tmp_path_factory.mktemp(family), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file large enough for a few windows of the pico tokenizer."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        (ROOT / "examples" / "train.py").read_text(encoding="utf-8").replace("<|endoftext|>", "") * 4, encoding="utf-8"
    )
    return path
