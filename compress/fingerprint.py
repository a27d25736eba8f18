"""What must be the same for a run to go on, and for kept statistics to serve."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.corpus import Corpus
from ..kernels.dispatch import cpu_capability
from ..runtime.files import file_sha256
from ..runtime.model.skeleton import Skeleton
from ..runtime.stored import open_model
from .job import Job


def make_fingerprint(
    job: Job, skeleton: Skeleton, corpus: Corpus | None, windows: Tensor | None, statistics: Path | None
) -> dict[str, Any]:
    """What must be the same for a run to be resumed; reads every weight once and refuses NaN and infinity.

    Raises:
        ModelError: a weight is not finite (named).
    """
    checkpoint = skeleton.checkpoint
    others = ["config.json", *(path.name for path in checkpoint.side_files)]
    return {
        "model": checkpoint.digests() | {name: file_sha256(checkpoint.path / name) for name in others},
        "models": [open_model(folder).digests() for step in job.recipe.passes for folder in step.inputs],
        "recipe": job.recipe.model_dump(mode="json"),
        "corpus": None if corpus is None else {"name": corpus.name, "sha256": corpus.sha256},
        "tokens": None if windows is None else windows.numel(),
        **machine(skeleton),
        "statistics": None if statistics is None else str(statistics.resolve()),
    }


def machine(skeleton: Skeleton) -> dict[str, Any]:
    """Of what computes: the same numbers come out where it is the same."""
    return {
        "versions": versions(),
        "device": str(skeleton.device),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {cpu_capability()}",
        "computes": str(skeleton.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {name: version(name) for name in ("compressor", "torch", "transformers", "safetensors", "numpy", "numba")}
    return found | {"python": platform.python_version()}


def statistics_source(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for a folder of statistics to serve: weights, text and windows."""
    data = {key: value for key, value in fingerprint["recipe"]["data"].items() if key != "source"}
    same = {key: fingerprint[key] for key in ("model", "corpus", "versions", "device", "cpu", "computes")}
    return {**same, "windows": data}
