"""What this machine offers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any


def examine() -> dict[str, Any]:
    """Versions, processor, GPU, the paths that kernels will take, and traps in the environment."""
    import torch

    from ..kernels.dispatch import cpu_capability, int4_path

    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    paths = {tokens: int4_path(tokens, torch.bfloat16, cpu_capability()) for tokens in (1, 16, 256)}
    record: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("compressor", "torch", "transformers", "compressed-tensors", "triton")},
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "amx": cpu_capability().bf16_matrix,
        "gpu": gpu or "none",
        "int4 on the CPU": ", ".join(f"{tokens} token{'s' * (tokens > 1)}: {path}" for tokens, path in paths.items()),
        "w8a8 on the CPU": f"int8: {'oneDNN' if cpu_capability().int8 else 'decoded'}, fp8: decoded, slower than bf16",
        "disk free here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
    }
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and not _from_site(spec.origin):
        record["warning"] = f"a folder named kernels shadows Hugging Face's package: {spec.origin}"
    return record


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _from_site(origin: str) -> bool:
    return "site-packages" in origin or "dist-packages" in origin
