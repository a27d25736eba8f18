"""Scales and norms of a compressed model, trained until its answers are nearer to the original's.

Codes stay as they are. A scale of integers, or a number of a block's vectors (norms, biases), is what it was times
1 + δ, and δ goes down the gradient of KL(original ‖ compressed) by Adam (arXiv:1412.6980), as in the second part of
EfficientQAT (arXiv:2407.11062). What enters each block is kept on the way to the end, then blocks are run once more,
from the last to the first, so that one is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime import processes
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.skeleton import Skeleton
from ..runtime.schemes import Operator, from_tensors
from ..runtime.stored import StoredModel
from .capture import as_it_runs, let_round

GRAPH_TOKENS = 1024  # that are run with gradients at a time, where windows are no longer
LOGITS = 1 << 22  # numbers of logits at a time
_BETAS = (0.9, 0.95)
_TINY = 1e-15  # a gradient, which one scale of millions has, is far above it
_PACE = 0.25  # of vectors where there are no codes, as beside such of 4 bits
_WARM = 10  # steps until the rate is what was asked for


@dataclass
class _Block:
    """A block of the compressed model, as it is trained.

    Attributes:
        operators: name of a linear in memory → its disk name, and what is stored of it.
        vectors: name in memory → on disk, and as stored.
    """

    layer: Any
    runner: Any
    operators: dict[str, tuple[str, Operator]]
    vectors: dict[str, tuple[str, Tensor]]


class Tuning:
    """A compressed model of which scales and vectors are trained.

    Attributes:
        steps: that were taken.
        deltas, means, squares: by the name of a vector on disk, or of a linear and its scales: δ, and means of its
            gradient and of the gradient's square over steps, float32.
    """

    def __init__(self, original: Skeleton, compressed: Skeleton) -> None:
        """
        Args:
            compressed: read from its folder, which is not written to while it is trained.
        """
        self._model = compressed
        self._reference, self._answer = original.answers(), compressed.answers(graph=True)
        self.steps = 0
        shapes = {name: like.shape for index in range(compressed.blocks) for name, like in self._trained(index)}
        zeros = ({name: torch.zeros(shape, device=compressed.device) for name, shape in shapes.items()} for _ in "123")
        self.deltas, self.means, self.squares = zeros
        self._paces: dict[str, float] = {}
        for index in range(compressed.blocks):
            self._paces |= self._paces_of(index)

    @property
    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on but for their number, to be kept in a file."""
        parts = {"delta": self.deltas, "mean": self.means, "square": self.squares}
        return {f"{part}:{name}": tensor for part, own in parts.items() for name, tensor in own.items()}

    def restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        """Go on after so many steps.

        Raises:
            ValueError: the state is of another model.
        """
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in self.state.items()}:
            raise ValueError("it is of another model")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.steps = steps

    def descend(self, ids: Tensor, exact: Tensor, rate: float, steps: int) -> float:
        """One step, on all processes' windows together.

        Args:
            ids: `[windows, tokens]`, this process's; exact: what leaves the last block of the original for them,
                `[windows, tokens, width]`.
            rate: of the difference between two codes, by which weights move in the mean at most; it grows over ten
                steps, and falls to nothing by half a cosine until the last of `steps`.

        Returns:
            KL per token in nats before the step.
        """
        loss, found = self._gradients(ids, exact)
        names = list(self.deltas)
        flat = [found.get(name, torch.zeros_like(self.deltas[name])).flatten() for name in names]
        sums = processes.summed(torch.cat([torch.tensor([loss, ids.numel()], device=self._model.device), *flat]))
        tokens = float(sums[1])
        gradients = (sums[2:] / tokens).split([self.deltas[name].numel() for name in names])
        rate *= min(1.0, (self.steps + 1) / _WARM) * (1 + math.cos(math.pi * self.steps / steps)) / 2
        self.steps += 1
        for name, gradient in zip(names, gradients, strict=True):
            self._move(name, gradient.view_as(self.deltas[name]), rate * self._paces[name])
        return float(sums[0]) / tokens

    def _move(self, name: str, gradient: Tensor, rate: float) -> None:
        mean, square = self.means[name], self.squares[name]
        first, second = _BETAS
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (square / (1 - second**self.steps)).sqrt_().add_(_TINY)
        self.deltas[name].addcdiv_(mean, size, value=-rate / (1 - first**self.steps))

    @torch.no_grad()
    def divergences(self, ids: Tensor, exact: Tensor, *, moved: bool) -> list[float]:
        """KL per token in nats of each window, once all is rounded to what it is stored in.

        Args:
            ids, exact: as of `descend`.
            moved: with what was found so far; else with what there was before.
        """
        model, hidden = self._model, self._model.embed(ids)
        for index in range(model.blocks):
            block = self._opened(index)
            self._set(block, stored=True, moved=moved)
            parts = hidden.split(self._batch(ids))
            hidden = torch.cat([model.run(block.runner, part) for part in parts])
            model.checkpoint.release()
        return [self._compared(*pair)[0] / ids.shape[1] for pair in zip(hidden, exact, strict=True)]

    def result(self, index: int) -> tuple[dict[str, Operator], dict[str, Tensor]]:
        """Disk name of a block's linears, and of its vectors → what is to be stored in their place."""
        block = self._opened(index)
        operators = {disk: self._operator(disk, stored, exact=False) for disk, stored in block.operators.values()}
        return operators, {disk: self._vector(disk, stored) for disk, stored in block.vectors.values()}

    def _trained(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and, without values, what is trained of a block."""
        for disk in self._stored(index).values():
            for place, scales in self._model.checkpoint.outline(disk).multipliers().items():
                yield f"{disk}:{place}", scales
        for name, disk in self._vectors(index).items():
            yield disk, self._model.layers[index].get_parameter(name)

    def _paces_of(self, index: int) -> dict[str, float]:
        """By what share of themselves a block's numbers are to move where weights move by the difference between two
        codes: codes of few bits are small, and so is what is lost by those of many. Vectors go by the mean."""
        found: dict[str, float] = {}
        for disk in self._stored(index).values():
            operator = _operator(self._model.checkpoint, disk, self._model.device)
            size = float(operator.dense().square().mean().sqrt())
            for place, scales in operator.multipliers().items():
                found[f"{disk}:{place}"] = float(scales.float().square().mean().sqrt()) / max(size, _TINY)
        self._model.checkpoint.release()
        mean = sum(found.values()) / len(found) if found else _PACE
        return found | dict.fromkeys(self._vectors(index).values(), mean)

    def _stored(self, index: int) -> dict[str, str]:
        """Name in memory of the block's linears with scales → on disk."""
        model = self._model
        names = (name for stage in model.stages(index) for group in stage for name in group.linears)
        disk = {name: model.disk_name(index, name) for name in names}
        return {name: own for name, own in disk.items() if model.checkpoint.outline(own).multipliers()}

    def _vectors(self, index: int) -> dict[str, str]:
        """The same of the vectors that are stored under a name of their own; routers' aside, whose choices have no
        gradient."""
        model = self._model
        tensors, router = model.checkpoint.tensors, f"{model.family.experts.router}."
        found: dict[str, str] = {}
        for name, like in model.layers[index].named_parameters():
            disk = model.disk_name(index, name)
            alone = disk in tensors and tensors[disk].shape == tuple(like.shape)
            if like.dim() == 1 and alone and not name.startswith(router):
                found[name] = disk
        return found

    def _opened(self, index: int) -> _Block:
        model, checkpoint = self._model, self._model.checkpoint
        checkpoint.expect(index)
        stored = self._stored(index)
        layer = as_it_runs(model, index, without=stored)
        operators = {name: (disk, _operator(checkpoint, disk, model.device)) for name, disk in stored.items()}
        vectors = {
            name: (disk, checkpoint.tensor(disk).to(model.device)) for name, disk in self._vectors(index).items()
        }
        return _Block(layer, model.runner(index, layer), operators, vectors)

    def _set(self, block: _Block, *, stored: bool, moved: bool = True) -> None:
        """Give a block what was found so far, and let it gather gradients of that.

        Args:
            stored: rounded as it is stored, and without gradients; moved: False: what there was before.
        """
        for name, (disk, operator) in block.operators.items():
            now = self._operator(disk, operator, exact=not stored) if moved else operator
            linear = block.layer.get_submodule(name)
            linear.weight = nn.Parameter(now.dense().to(self._model.dtype), requires_grad=not stored)
            let_round(linear, now)
        for name, (disk, vector) in block.vectors.items():
            parameter = block.layer.get_parameter(name)
            value = self._vector(disk, vector) if stored else vector.float() * (1 + self.deltas[disk])
            parameter.data = (value if moved else vector).to(parameter.dtype)
            parameter.requires_grad_(not stored)

    def _operator(self, disk: str, operator: Operator, *, exact: bool) -> Operator:
        """What is stored of a linear, with scales as they are now; exact: not rounded to what they are stored in."""
        changed = {}
        for place, scales in operator.multipliers().items():
            now = scales.float() * (1 + self.deltas[f"{disk}:{place}"])
            changed[place] = now if exact else now.to(scales.dtype)
        return operator.multiplied(changed)

    def _vector(self, disk: str, vector: Tensor) -> Tensor:
        return (vector.float() * (1 + self.deltas[disk])).to(vector.dtype)

    def _batch(self, ids: Tensor) -> int:
        return max(1, GRAPH_TOKENS // ids.shape[1])

    def _gradients(self, ids: Tensor, exact: Tensor) -> tuple[float, dict[str, Tensor]]:
        """KL of some windows, summed over tokens, and its gradients."""
        model, batch = self._model, self._batch(ids)
        entering, hidden = list[Tensor](), model.embed(ids)
        for index in range(model.blocks):
            # Run alike on the way back; what a wide row has beside hidden states takes more digits.
            entering.append(hidden.to(model.dtype) if model.wide is None else hidden)
            block = self._opened(index)
            self._set(block, stored=False)
            hidden = torch.cat([model.run(block.runner, part.float()) for part in entering[-1].split(batch)])
            model.checkpoint.release()
        ends = [self._compared(*pair) for pair in zip(hidden, exact, strict=True)]
        loss, gradient = sum(loss for loss, _ in ends), torch.stack([own for _, own in ends])
        found: dict[str, Tensor] = {}
        for index in reversed(range(model.blocks)):
            block = self._opened(index)
            self._set(block, stored=False)
            pulled = [
                self._pulled(block, *pair)
                for pair in zip(entering.pop().split(batch), gradient.split(batch), strict=True)
            ]
            gradient = torch.cat(pulled)
            found |= self._gathered(block)
            model.checkpoint.release()
        return loss, found

    def _pulled(self, block: _Block, entering: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at what leaves a block → at what enters it."""
        hidden = entering.float().requires_grad_(True)
        with torch.enable_grad():
            self._model.forward(block.runner, hidden).backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    def _gathered(self, block: _Block) -> dict[str, Tensor]:
        """Gradients of all δ of a block, of those of its weights."""
        found: dict[str, Tensor] = {}
        for name, (disk, operator) in block.operators.items():
            weight = block.layer.get_submodule(name).weight
            if weight.grad is None:  # an expert that no token came to
                continue
            scales = operator.multipliers()
            deltas = {place: self.deltas[f"{disk}:{place}"].clone().requires_grad_(True) for place in scales}
            with torch.enable_grad():
                now = {place: scales[place].float() * (1 + delta) for place, delta in deltas.items()}
                dense = operator.multiplied(now).dense()
            own = torch.autograd.grad(dense, list(deltas.values()), weight.grad.float())
            found |= {f"{disk}:{place}": gradient for place, gradient in zip(deltas, own, strict=True)}
        for name, (disk, vector) in block.vectors.items():
            own_gradient = block.layer.get_parameter(name).grad
            if own_gradient is not None:
                found[disk] = own_gradient.float() * vector.float()
        return found

    def _compared(self, hidden: Tensor, exact: Tensor) -> tuple[float, Tensor]:
        """Of what leaves the last blocks for a window, `[tokens, width]`: KL summed over tokens, and its gradient at
        that of the compressed model."""
        piece = max(32, LOGITS // int(self._model.config.vocab_size))
        loss, gradients = 0.0, list[Tensor]()
        for part, own in zip(hidden.split(piece), exact.split(piece), strict=True):
            reference = self._reference(own.float()).log_softmax(-1)
            inside = part.detach().requires_grad_(True)
            with torch.enable_grad():
                logs = self._answer(inside).log_softmax(-1)
                divergence = F.kl_div(logs, reference, log_target=True, reduction="sum")
            gradients.append(torch.autograd.grad(divergence, inside)[0])
            loss += divergence.item()
        return loss, torch.cat(gradients)


def _operator(checkpoint: Checkpoint, disk: str, device: torch.device) -> Operator:
    """What is stored of a linear, on a device."""
    assert isinstance(checkpoint, StoredModel)  # nothing else has scales
    parts = {name: tensor.to(device) for name, tensor in checkpoint.operator_tensors(disk).items()}
    return from_tensors(parts, checkpoint.schemes[disk])
