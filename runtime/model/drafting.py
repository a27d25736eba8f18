"""Layers beyond the last block that predict a token further ahead (MTP), as DeepSeek-V3, GLM-4.5 and Qwen3-Next have
them.

`block(W [norm(embedding of the next token); norm(hidden state)])` is what such a layer makes (arXiv:2412.19437, eq.
21-22); hidden states are those behind the final norm, as engines feed them. transformers does not run these layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .families import APART
from .skeleton import Skeleton


@dataclass(frozen=True)
class _Parts:
    """How what is around such a layer is named on disk, without `.weight`.

    Attributes:
        joins: the linear that joins the next token's embedding and the hidden state.
        entering: norms of these two; leaving: of what leaves the block.
    """

    joins: str
    entering: tuple[str, str]
    leaving: str
    head: str


def _parts(skeleton: Skeleton, number: int) -> _Parts:
    """Of a layer of its own, or of all of them where they lie apart and share the model's head."""
    if f"{APART}fc.weight" in skeleton.checkpoint.tensors:
        head = skeleton.head_table().removesuffix(".weight")
        return _Parts(
            f"{APART}fc", (f"{APART}pre_fc_norm_embedding", f"{APART}pre_fc_norm_hidden"), f"{APART}norm", head
        )
    joins, embedded, known, leaving, head = (
        skeleton.disk_name(number, name)
        for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head")
    )
    return _Parts(joins, (embedded, known), leaving, head)


def drafters(skeleton: Skeleton) -> list[int]:
    """Numbers of the layers that draft tokens, and are but for that what the last block is, if that has experts."""
    tensors, found, number = skeleton.checkpoint.tensors, list[int](), skeleton.blocks
    sparse = any(name.startswith(f"{skeleton.family.experts.where}.") for name in skeleton.layers[-1].state_dict())
    wanted = list(skeleton.layers[-1].state_dict()) if sparse and skeleton.wide is None else []
    while wanted and skeleton.disk_name(number, wanted[0]) in tensors:
        parts = _parts(skeleton, number)
        around = (f"{name}.weight" for name in (parts.joins, *parts.entering, parts.leaving))
        if all(name in tensors for name in (*around, *(skeleton.disk_name(number, name) for name in wanted))):
            found.append(number)
        number += 1
    return found


class Drafter:
    """One of them, with its weights.

    Attributes:
        layer: its block.
        joins: `[hidden_size, 2 · hidden_size]`, of the next token's embedding and the hidden state.
        entering: norms of these two; leaving: of what leaves the block.
    """

    def __init__(self, skeleton: Skeleton, number: int) -> None:
        self._skeleton = skeleton
        self.layer = skeleton.block(number, like=skeleton.blocks - 1)
        self._runner = skeleton.runner(skeleton.blocks - 1, self.layer)
        self._behind = skeleton.outer_part(skeleton.family.norm)
        self._parts = parts = _parts(skeleton, number)
        self.joins = nn.Parameter(self._tensor(parts.joins), requires_grad=False)
        self.entering, self.leaving = [self._norm(name) for name in parts.entering], self._norm(parts.leaving)

    def _tensor(self, name: str) -> Tensor:
        return self._skeleton.checkpoint.tensor(f"{name}.weight").to(self._skeleton.device, torch.float32)

    def _norm(self, name: str) -> Any:
        """A norm as the final one is."""
        norm = copy.deepcopy(self._behind)
        norm.weight = nn.Parameter(self._tensor(name), requires_grad=False)
        return norm

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What leaves the final norm `[batch, tokens, hidden_size]`, of these ids `[batch, tokens]` → what leaves the
        layer, of all tokens but the last, `[batch, tokens - 1, hidden_size]`."""
        embedded, known = self.entering
        left = known(hidden[:, :-1].to(self._skeleton.device).float())
        entered = torch.cat([embedded(self._skeleton.embed(ids[:, 1:])), left], -1) @ self.joins.T
        return self._skeleton.forward(self._runner, entered)

    @torch.no_grad()
    def run(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """`forward` of what leaves the last block, where no gradient is wanted."""
        return self.forward(self._behind(hidden.to(self._skeleton.device).float()), ids)

    @cached_property
    def _head(self) -> Tensor:
        return self._tensor(self._parts.head)

    def answers(self, left: Tensor) -> Tensor:
        """Logits of the tokens after the next, of what leaves the layer."""
        found: Tensor = self.leaving(left) @ self._head.T
        return found
