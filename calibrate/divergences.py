"""How much a model's answers change when a part of one block does: a survey of the whole model before any rewriting."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.model.skeleton import HEAD_ROWS, Skeleton
from ..runtime.schemes import Dense
from .chains import BATCH_TOKENS, Chains, Spill
from .drive import drive
from .statistics import Statistics


@dataclass(frozen=True)
class Seen:
    """What a survey sees at a block: the second moment of the observed inputs, if any are, and the block as it runs."""

    moment: Tensor | None
    runner: Any
    hidden: Tensor


LOGITS = 1 << 23  # numbers of logits at a time
BEGINNING = 128  # tokens of a window that are carried at least
SHALLOW = 8  # blocks up to which all tokens are carried for every change; deeper models take as much time for a block


def carried(blocks: int, samples: int, tokens: int) -> tuple[int, int]:
    """How many of the observed windows are carried to the end of the model for every change, and how many tokens of
    each: the beginnings of all, as long as these are long enough to be read."""
    share = int(max(1, min(samples * tokens, samples * tokens * SHALLOW // blocks)))
    length = min(tokens, share, max(BEGINNING, share // samples))
    return min(samples, share // length), length


Changes = Mapping[str, Mapping[str, Tensor]]  # label → name of a linear inside the block, in memory → its weight


@torch.no_grad()
def divergences(
    skeleton: Skeleton,
    windows: Tensor,
    scratch: Path,
    observed: str | None,
    changes: Callable[[int, Seen], Changes],
    done: Callable[[int], None],
    outer: Mapping[str, Callable[[], Tensor]] | None = None,
) -> dict[str, float]:
    """KL(original ‖ changed) per token in nats for every change, each on its own.

    At most 4,096 tokens are observed. A changed block's output is carried beside the original's to the end of the
    model: of a deep one for fewer of these tokens, so that a change takes as much time in a model of any depth.

    Args:
        windows: token ids `[samples, tokens]`, of which the first are read.
        scratch: a folder to be made and deleted again; holds what is carried, and two activations of the original.
        observed: the linear inside each block, by its name in memory, of whose inputs the second moment is
            taken, if any.
        changes: `(block, what is seen there) →` what to try there.
        done: told each block that is behind.
        outer: the embedding or the head, by its disk name → makes another one, `[vocab_size, hidden_size]`.
    """
    outer = outer or {}
    windows = windows[: max(1, BATCH_TOKENS // windows.shape[1]), :BATCH_TOKENS]
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted survey left lacks the chains of changes
    shape = carried(skeleton.blocks, *windows.shape)
    rows, length = map(slice, shape)
    every, changed = slice(None), dict[str, Spill]()
    few = Chains(scratch, (), (*shape, skeleton.width))
    for index, blocks, chains in drive({"original": skeleton}, windows, scratch):
        block = blocks["original"]
        layer, hidden = block.layer, chains.read(index, block.chain)[every]
        for name in (name for name in outer if index == 0 and skeleton.outer()[name]):
            changed[name] = few.scratch(hidden.shape[-1], torch.float32)
            changed[name][every] = skeleton.embed(windows[rows, length], Dense(outer[name]()))
        for spill in changed.values():
            spill[every] = skeleton.run(block.runner, spill[every])
        moment = None
        if observed is None:
            last = block.carry()
        else:
            linear = layer.get_submodule(observed)
            statistics = Statistics.empty(linear.in_features, ("moment",), skeleton.device)
            handle = linear.register_forward_pre_hook(_observer(statistics, skeleton.dtype))
            last = block.carry()
            handle.remove()
            moment = statistics.moment / statistics.tokens
        for label, weights in changes(index, Seen(moment, block.runner, hidden)).items():
            kept = {name: layer.get_submodule(name).weight for name in weights}
            for name, weight in weights.items():
                layer.get_submodule(name).weight = nn.Parameter(weight.to(kept[name]), requires_grad=False)
            changed[label] = few.scratch(hidden.shape[-1], torch.float32)
            changed[label][every] = skeleton.run(block.runner, hidden[rows, length])
            for name, parameter in kept.items():
                layer.get_submodule(name).weight = parameter
        done(index)
    heads = {name: make for name, make in outer.items() if not skeleton.outer()[name] or len(skeleton.outer()) == 1}
    return _compared(skeleton, last[rows][:, length], changed, heads)


def divergences_cost(
    skeleton: Skeleton, samples: int, tokens: int, changes: int, held: int, outer: int = 0
) -> tuple[float, float, float]:
    """Bytes of memory and of disk, and floating-point operations, of `divergences`.

    Args:
        samples, tokens: the windows.
        changes: of all blocks together.
        held: numbers of the weights that are tried in one block; outer: of the largest that is tried outside.
    """
    length = min(tokens, BATCH_TOKENS)
    windows = min(samples, max(1, BATCH_TOKENS // tokens))
    seen, each = windows * length, math.prod(carried(skeleton.blocks, windows, length))
    blocks = [[linear.weight.shape for linear in skeleton.linears(n).values()] for n in range(skeleton.blocks)]
    block = max(sum(rows * columns for rows, columns in shapes) for shapes in blocks)
    widest = max(max(shape) for shapes in blocks for shape in shapes)
    vocabulary, hidden = skeleton.config.vocab_size, skeleton.config.hidden_size
    # What entered the block and a copy that runs, the residual stream behind attention and its norm; gate, up and
    # their product.
    running = 4 * (block + held) + 4 * seen * (3 * widest + 4 * skeleton.width)
    comparing = 5 * 4 * max(LOGITS, 32 * vocabulary) + 4 * hidden * min(vocabulary, HEAD_ROWS)
    flops = 2.0 * each * changes * (skeleton.blocks / 2 * block + vocabulary * hidden)
    return max(running, comparing) + 4 * 4 * outer, 4 * skeleton.width * (changes * each + 2 * seen), flops


def _compared(
    skeleton: Skeleton, hidden: Tensor, changed: Mapping[str, Spill], heads: Mapping[str, Callable[[], Tensor]]
) -> dict[str, float]:
    """KL per token between the answers to what leaves the last block in the original and in each chain; a few tokens
    at a time. One of `heads` answers in place of the model's, to its own chain or the original."""
    found, answer = dict.fromkeys([*changed, *heads], 0.0), skeleton.answers()
    piece = max(32, LOGITS // skeleton.config.vocab_size)

    def compare(labels: Iterable[str], other: Callable[[Tensor], Tensor]) -> None:
        for row in range(len(hidden)):
            for start in range(0, hidden.shape[1], piece):
                part = slice(start, start + piece)
                reference = answer(hidden[row, part]).log_softmax(-1)
                for label in labels:
                    left = changed[label][row : row + 1][0] if label in changed else hidden[row]
                    logs = other(left[part]).log_softmax(-1)
                    found[label] += float(F.kl_div(logs, reference, log_target=True, reduction="sum"))

    compare([label for label in changed if label not in heads], answer)
    for name, make in heads.items():
        compare([name], skeleton.answers(make()))
    return {label: total / hidden[..., 0].numel() for label, total in found.items()}


def _observer(statistics: Statistics, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0].to(dtype))

    return hook
