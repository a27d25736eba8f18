"""What the model around blocks is made of, where its own modules would take memory, rounding or work of no use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

HEAD_ROWS = 4096  # of the output head, in float32 at a time


def compute_buffers(model: Any, device: torch.device | str) -> None:
    """Give values to the buffers that checkpoints do not store, by the rule that transformers loads models with."""
    stored, own = model.state_dict().keys(), set[str]()
    for place, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        computed = [name for name in names if f"{place}.{name}" not in stored]
        for name in computed:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if computed:  # some have their values from a module that they are in
            parts = place.split(".")
            own |= {".".join(parts[:count]) for count in range(len(parts) + 1)}
    with torch.no_grad():
        for place in sorted(own, key=lambda place: (-place.count("."), place)):
            parts = place.split(".") if place else []
            above = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
            owner: Any = next(one for one in reversed(above) if isinstance(one, PreTrainedModel))
            owner._init_weights(above[-1])


def without_autocast(router: nn.Module, device: str) -> None:
    """Let a router compute in float32: rounding would send tokens to other experts."""
    forward = router.forward

    def exact(hidden: Tensor, *more: Any, **options: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(hidden.float(), *more, **options)

    router.forward = exact


def set_layer_types(config: Any, kinds: list[Any]) -> None:
    """What a config says of its layers, also where it derives that from other keys."""
    kind, name = type(config), (config.attribute_map or {}).get("layer_types", "layer_types")
    if isinstance(getattr(kind, name, None), property):
        config.__class__ = type(kind.__name__, (kind,), {name: kinds})
    else:
        config.layer_types = kinds


class Head(nn.Module):
    """An output head whose rows are converted to float32 some at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self._weight, self._bias, self._device = weight, bias, device
        # Fresh pages for every part would take longer than the product of a few tokens.
        self._room = torch.empty(min(HEAD_ROWS, len(weight)), weight.shape[1], device=device)

    @property
    def weight(self) -> Tensor:
        """What some models ask for the dtype of."""
        return self._room

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, some at a time, in float32; the next ones take their place."""
        for start in range(0, len(self._weight), HEAD_ROWS):
            part = self._weight[start : start + HEAD_ROWS]
            yield slice(start, start + len(part)), self._room[: len(part)].copy_(part)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = _Logits.apply(hidden, self)
        return logits if self._bias is None else logits + self._bias.to(self._device, torch.float32)

    def __len__(self) -> int:
        return len(self._weight)


class _Logits(torch.autograd.Function):
    """`hidden @ weightᵀ` for a head; its derivative needs the weight alone, a part at a time again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> Tensor:
        ctx.head = head
        logits = hidden.new_empty(*hidden.shape[:-1], len(head))
        for rows, weight in head.parts():
            logits[..., rows] = nn.functional.linear(hidden, weight)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        gradient: Tensor = gradients[0]
        return sum(gradient[..., rows] @ weight for rows, weight in ctx.head.parts()), None  # type: ignore[return-value]


class Zero(nn.Module):
    """In place of positions that are added to what enters the first block alone."""

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return torch.zeros(())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers has to say of models that are built or loaded to learn something."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
