"""Kernels against their twins: on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set.

These files need torch, triton, numpy and pytest only, and no installed package:

    pytest tests/kernels --confcutdir tests/kernels
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if find_spec("compressor") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "typings"))
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel writes is NaN, or the largest integer."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            whole = tensor.dtype != torch.bool and not tensor.is_floating_point()
            return tensor.fill_(torch.iinfo(tensor.dtype).max if whole else float("nan"))

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def guarded(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy of a tensor on the device, with poison before and behind it."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        margin = 4096
        room = torch.empty(tensor.numel() + 2 * margin, dtype=tensor.dtype, device=device)
        inner = room[margin : margin + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        return inner

    return copy


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts that a result is that of float64, up to the rounding of its dtype.

    The interpreter cuts bfloat16 off where a GPU rounds.
    """

    def check(result: torch.Tensor, exact: torch.Tensor, name: str) -> None:
        assert result.shape == exact.shape, name
        most = {torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 8e-4}[result.dtype]
        error = float((result.double().cpu() - exact.cpu()).norm() / exact.norm())
        assert error < most, f"{name}: relative error {error:.2e}"

    return check
