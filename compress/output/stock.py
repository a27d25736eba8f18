"""What stock transformers makes of a folder's tensors, by their names and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime.errors import VerifyError, first_line
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.disk_experts import fuse
from ...runtime.model.parts import quiet
from ...runtime.model.skeleton import Skeleton, model_config

_LISTS = {
    "missing_keys": "would be initialised at random, for it is missing",
    "unexpected_keys": "would be left out, for no module has it",
    "mismatched_keys": "would be initialised at random, for it has another shape",
}
_AT_ONCE = "HF_DEACTIVATE_ASYNC_LOAD"  # fake tensors are of one thread


def check_stock(output: Checkpoint, original: Checkpoint) -> None:
    """Let stock transformers load an output, decoded, without its numbers.

    Raises:
        VerifyError: it would leave a tensor out or make one up that it does not in the original.
    """
    if _told(output) == _told(original):
        return  # it makes the same of both
    try:
        before = _account(original)
    except Exception:  # transformers raises whatever its models do, and then has no say
        return
    try:
        after = _account(output)
    except Exception as error:
        raise VerifyError(f"{output.path}: transformers cannot load the result ({first_line(error)})") from None
    for kind, why in _LISTS.items():
        if new := sorted(after[kind] - before[kind]):
            raise VerifyError(f"{output.path}: in transformers {new[0]} {why}")


def _told(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """All that it goes by."""
    return model_config(checkpoint).to_dict(), {name: info.shape for name, info in checkpoint.tensors.items()}


def _account(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Names of tensors that are missing, unexpected, or of another shape, as transformers calls them."""
    kind: Any = type(Skeleton(checkpoint).model)
    with _at_once(), FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
        state = fuse(checkpoint.family, state)
        _, found = kind.from_pretrained(
            None,
            config=model_config(checkpoint),
            state_dict=state,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return {name: {one if isinstance(one, str) else one[0] for one in found[name]} for name in _LISTS}


@contextmanager
def _at_once() -> Iterator[None]:
    """Without what transformers says of a load, and all of it in this thread."""
    before = os.environ.get(_AT_ONCE)
    os.environ[_AT_ONCE] = "1"
    try:
        with quiet():
            yield
    finally:
        if before is None:
            del os.environ[_AT_ONCE]
        else:
            os.environ[_AT_ONCE] = before
