"""What this machine offers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..kernels.dispatch import CpuCapability


def examine() -> dict[str, Any]:
    """Versions, processor, GPU, the paths that kernels will take, and traps in the environment."""
    import torch

    from ..kernels.dispatch import cpu_capability, int4_path

    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    paths = {tokens: int4_path(tokens, torch.bfloat16, cpu_capability()) for tokens in (1, 16, 256)}
    record: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("compressor", "torch", "transformers", "compressed-tensors", "triton")},
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}",
        "amx": cpu_capability().bf16_matrix,
        "gpu": gpu or "none",
        "int4 on the CPU": ", ".join(f"{tokens} token{'s' * (tokens > 1)}: {path}" for tokens, path in paths.items()),
        "w8a8 on the CPU": f"int8: {'oneDNN' if cpu_capability().int8 else 'decoded'}, fp8: decoded, slower than bf16",
        "disk free here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB",
    }
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and not _from_site(spec.origin):
        record["warning"] = f"a folder named kernels shadows Hugging Face's package: {spec.origin}"
    if hints := faster(bool(gpu), cpu_capability(), os.getloadavg()[0]):
        record["would be faster"] = "; ".join(hints)
    return record


def faster(gpu: bool, processor: CpuCapability, load: float) -> list[str]:
    """What would make runs faster here, and how to get it.

    Args:
        gpu: whether there is one; load: of the machine, in processes that want a processor.
    """
    import torch

    found = []
    if gpu and importlib.util.find_spec("triton") is None:
        found.append("fused kernels on the GPU: pip install 'compressor[gpu]'")
    if not gpu and not processor.bf16:
        found.append("a processor with AVX-512 and bf16, or AMX: this one has no fast products of bf16")
    free = (os.cpu_count() or 1) - load
    if torch.get_num_threads() > max(1.0, free) and "OMP_NUM_THREADS" not in os.environ:
        count = max(1, round(free))
        found.append(f"OMP_NUM_THREADS={count} while other work runs here: threads that wait for each other are slow")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _from_site(origin: str) -> bool:
    return "site-packages" in origin or "dist-packages" in origin
