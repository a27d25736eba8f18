"""What a model still knows far from the beginning: perplexity by position, and a number hidden in a long text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_NEEDLE = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_DEPTHS = (0.1, 0.5, 0.9)  # of the text before the question
_TOKENS = 256  # whose logits are made at a time
_KEYS = 4  # hidden one after the other at each depth


@dataclass(frozen=True)
class Span:
    """Perplexity of the tokens at positions `start` to `end - 1`."""

    start: int
    end: int
    perplexity: float


@dataclass(frozen=True)
class Retrieval:
    """Of a number hidden in `tokens` tokens: how often each of its tokens was the likeliest, and their mean log
    probability in nats, `lost` without the needle."""

    tokens: int
    exact: float
    logprob: float
    lost: float


@dataclass(frozen=True)
class LongEvaluation:
    spans: list[Span]
    retrievals: list[Retrieval]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_long(model: Any, tokenizer: Any, windows: Tensor) -> LongEvaluation:
    """Perplexity over spans of positions, each twice as long as the one before, and retrieval in texts of a quarter,
    half and the whole of a window's length, where there is room.

    Args:
        windows: int64 `[samples, tokens]`, at least 128 tokens.
    """
    length = windows.shape[1]
    losses = torch.stack([_losses(model, ids) for ids in windows]).double().mean(0)
    spans, start = [], 0
    for end in [length >> shift for shift in range(max(0, (length // 64).bit_length() - 1), -1, -1)]:
        part = losses[max(start - 1, 0) : end - 1]  # the loss of a token stands one place before it
        spans.append(Span(start, end, math.exp(part.mean())))
        start = end
    least = 2 * len(_ids(tokenizer, (_NEEDLE + _QUESTION).format(key=10000)))
    lengths = [length // part for part in (4, 2, 1) if length // part >= least]
    return LongEvaluation(spans, [_retrieve(model, tokenizer, windows.flatten(), size) for size in lengths])


@torch.no_grad()
def _losses(model: Any, ids: Tensor) -> Tensor:
    """The loss of each token but the first, `[tokens - 1]`; some tokens at a time, those before in the cache."""
    past, found = None, list[Tensor]()
    for part, wanted in zip(ids[:-1].split(_TOKENS), ids[1:, None].split(_TOKENS), strict=True):
        output = model(input_ids=part[None].to(model.device), past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits[0].float().log_softmax(-1).cpu().gather(-1, wanted)[:, 0])
    return -torch.cat(found)


@torch.no_grad()
def _retrieve(model: Any, tokenizer: Any, filler: Tensor, length: int) -> Retrieval:
    generator = torch.Generator().manual_seed(length)
    exact: list[bool] = []
    found: list[float] = []
    without: list[float] = []
    for depth in _DEPTHS:
        for _ in range(_KEYS):
            key = str(int(torch.randint(10000, 100000, (), generator=generator)))
            question, needle = _ids(tokenizer, _QUESTION), _ids(tokenizer, _NEEDLE.format(key=key))
            whole = _ids(tokenizer, f"{_QUESTION} {key}")
            answer = whole[
                next((n for n, (a, b) in enumerate(zip(whole, question, strict=False)) if a != b), len(question)) :
            ]
            room = length - len(needle) - len(whole)
            start = int(torch.randint(0, len(filler) - length + 1, (), generator=generator))
            text = filler[start : start + room].tolist()
            place = int(depth * room)
            for hidden, results in ((needle, found), ([], without)):
                ids = torch.tensor([*text[:place], *hidden, *text[place:], *whole])
                output = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=len(answer) + 1)
                logs = output.logits[0, :-1].float().cpu().log_softmax(-1)
                wanted = torch.tensor(answer)
                results.append(float(logs.gather(-1, wanted[:, None]).mean()))
                if hidden:
                    exact.append(bool((logs.argmax(-1) == wanted).all()))
    count = len(exact)
    return Retrieval(length, sum(exact) / count, sum(found) / count, sum(without) / count)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
