"""Memory that there is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from . import processes

HOST = torch.device("cpu")


def available_memory(device: torch.device = HOST) -> int | None:
    """Bytes this process may still take where a device keeps its tensors, or None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return min(free) // processes.beside()
