"""Layers beyond the last block that predict a token further ahead (MTP), as DeepSeek-V3 and GLM-4.5 have them.

`block(W [norm(embedding of the next token); norm(hidden state)])` is what such a layer makes (arXiv:2412.19437, eq.
21-22); hidden states are those behind the final norm, as engines feed them. transformers does not run these layers.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .skeleton import Skeleton

_JOINS, _HEAD = "eh_proj.weight", "shared_head"
_NORMS = ("enorm", "hnorm", f"{_HEAD}.norm")


def drafters(skeleton: Skeleton) -> list[int]:
    """Numbers of the layers that draft tokens, and are but for that what the last block is, if that has experts."""
    tensors, found, number = skeleton.checkpoint.tensors, list[int](), skeleton.blocks
    sparse = any(name.startswith(f"{skeleton.family.experts.where}.") for name in skeleton.layers[-1].state_dict())
    while sparse and skeleton.wide is None and skeleton.disk_name(number, _JOINS) in tensors:
        own = (skeleton.disk_name(number, name) for name in skeleton.layers[-1].state_dict())
        if all(name in tensors for name in own):
            found.append(number)
        number += 1
    return found


class Drafter:
    """One of them, with its weights.

    Attributes:
        layer: its block.
        joins: `[hidden_size, 2 · hidden_size]`, of the next token's embedding and the hidden state.
        norms: of these two, and of what leaves the block.
    """

    def __init__(self, skeleton: Skeleton, number: int) -> None:
        self._skeleton, self._number = skeleton, number
        self.layer = skeleton.block(number, like=skeleton.blocks - 1)
        self._runner = skeleton.runner(skeleton.blocks - 1, self.layer)
        self._behind = skeleton.outer_part(skeleton.family.norm)
        self.joins = nn.Parameter(self._tensor(_JOINS), requires_grad=False)
        self.norms = {name: self._norm(f"{name}.weight") for name in _NORMS}

    def _tensor(self, name: str) -> Tensor:
        skeleton = self._skeleton
        stored = skeleton.checkpoint.tensor(skeleton.disk_name(self._number, name))
        return stored.to(skeleton.device, torch.float32)

    def _norm(self, name: str) -> Any:
        """A norm as the final one is."""
        norm = copy.deepcopy(self._behind)
        norm.weight = nn.Parameter(self._tensor(name), requires_grad=False)
        return norm

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What leaves the final norm `[batch, tokens, hidden_size]`, of these ids `[batch, tokens]` → what leaves the
        layer, of all tokens but the last, `[batch, tokens - 1, hidden_size]`."""
        known = self.norms["hnorm"](hidden[:, :-1].to(self._skeleton.device).float())
        entered = torch.cat([self.norms["enorm"](self._skeleton.embed(ids[:, 1:])), known], -1) @ self.joins.T
        return self._skeleton.forward(self._runner, entered)

    @torch.no_grad()
    def run(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """`forward` of what leaves the last block, where no gradient is wanted."""
        return self.forward(self._behind(hidden.to(self._skeleton.device).float()), ids)

    @cached_property
    def _head(self) -> Tensor:
        return self._tensor(f"{_HEAD}.head.weight")

    def answers(self, left: Tensor) -> Tensor:
        """Logits of the tokens after the next, of what leaves the layer."""
        found: Tensor = self.norms[f"{_HEAD}.norm"](left) @ self._head.T
        return found
