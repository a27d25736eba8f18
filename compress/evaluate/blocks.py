"""How far an output is from its original, with one block of each in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...calibrate.capture import as_it_runs
from ...calibrate.chains import BATCH_TOKENS
from ...runtime import processes
from ...runtime.errors import VerifyError
from ...runtime.model.skeleton import HEAD_ROWS, Skeleton
from .measures import Evaluation, Reading, summary

LOGITS = 1 << 21  # numbers of logits at a time


@torch.no_grad()
def evaluate_blocks(
    original: Skeleton,
    output: Skeleton,
    texts: Mapping[str, Tensor],
    moved: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> tuple[dict[str, Evaluation], list[float]]:
    """Run two models over a few windows side by side; both compute in their skeleton's dtype.

    Where several processes are at work together, each reads its own windows.

    Args:
        texts: what it is → windows `[samples, tokens]`, all of one length.
        moved: what the residual stream of the original would be in the output, had it lost nothing.

    Returns:
        An evaluation against the original for each text; and for each block, by how much the residual stream that
        leaves it is off, `mean ‖x − x̃‖² / ‖x‖²` over tokens.

    Raises:
        VerifyError: a block of the output gives NaN or infinities.
    """
    windows = torch.cat(list(texts.values()))
    count = len(windows)
    if count < processes.size():
        with processes.alone():
            return evaluate_blocks(original, output, texts, moved)
    windows = windows[processes.own(count)]
    batch = max(1, BATCH_TOKENS // windows.shape[1])
    parts = [slice(start, start + batch) for start in range(0, len(windows), batch)]
    streams = [torch.cat([model.embed(windows[rows]).cpu() for rows in parts]) for model in (original, output)]
    drift = []
    for index in range(original.blocks):
        for model, stream in zip((original, output), streams, strict=True):
            model.checkpoint.expect(index, index + 1)
            # Of an original that is stored in few bits, what it decodes to counts.
            runner = model.runner(index, as_it_runs(model, index) if model is output else model.block(index))
            for rows in parts:
                stream[rows] = model.run(runner, stream[rows]).cpu()
            model.checkpoint.release()
        exact, found = streams
        pairs = ((output.stream(found[rows]), moved(original.stream(exact[rows]))) for rows in parts)
        damaged = not bool(found.isfinite().all())
        sums = torch.tensor([sum(_off(*pair) for pair in pairs), damaged], dtype=torch.float64)
        if processes.summed(sums)[1]:
            raise VerifyError(f"{output.checkpoint.path}: block {index} gives activations that are not finite")
        drift.append(float(sums[0]) / count)
    answer, reference = output.answers(), original.answers()
    reading = Reading(windows)
    exact, found = (stream[:, :-1].flatten(0, 1).split(tokens_at_a_time(original)) for stream in streams)
    for before, after in zip(exact, found, strict=True):
        reading.add(answer(after).log_softmax(-1), reference(before).log_softmax(-1))
    read = torch.cat(processes.gathered(reading.found), 1).split([len(ids) for ids in texts.values()], 1)
    return {name: summary(part) for name, part in zip(texts, read, strict=True)}, drift


def _off(found: Tensor, exact: Tensor) -> float:
    """`‖x − x̃‖² / ‖x‖²`, mean over the tokens of a window, summed over windows."""
    share: Tensor = (found - exact).square().sum(-1) / exact.square().sum(-1).clamp(min=1e-30)
    return float(share.mean(-1).sum())


def tokens_at_a_time(skeleton: Skeleton) -> int:
    """Whose logits are compared at once."""
    return max(32, LOGITS // int(skeleton.config.vocab_size))


def evaluation_memory(skeleton: Skeleton, tokens: int, *, decoded: bool) -> float:
    """Bytes that `evaluate_blocks` takes for so many tokens, beyond a block of each model.

    Args:
        decoded: whether the output's head has to be.
    """
    rows, hidden = skeleton.config.vocab_size, skeleton.config.hidden_size
    logits = 4.0 * 5 * min(tokens, tokens_at_a_time(skeleton)) * rows
    head = 4.0 * min(HEAD_ROWS, rows) * hidden + decoded * skeleton.checkpoint.dtype.itemsize * rows * hidden
    return 2 * 4.0 * tokens * skeleton.width + logits + head
