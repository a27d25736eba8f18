"""What a model still knows far from the beginning: perplexity by position, and numbers hidden in a long text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

_NEEDLE = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_CITIES = ("Oslo", "Rome")
_CITY_NEEDLE = "\nThe key to {city} is {key}. Remember it: the key to {city} is {key}.\n"
_CITY_QUESTION = "\nWhat is the key to {city}? The key to {city} is"
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
class Shared:
    """Of two numbers hidden in `tokens` tokens that were read once: mean log probabilities in nats of the answers to a
    first question and to a second one, which finds in the cache what the first left there; and of the second where all
    was read anew, without a cache. A cache that keeps what one question needs loses what the next one does."""

    tokens: int
    first: float
    second: float
    anew: float
    exact: float  # share of the second answers whose every token was the likeliest
    exact_anew: float


@dataclass(frozen=True)
class LongEvaluation:
    spans: list[Span]
    retrievals: list[Retrieval]
    shared: list[Shared] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_long(model: Any, tokenizer: Any, windows: Tensor, *, shared: bool = False) -> LongEvaluation:
    """Perplexity over spans of positions, each twice as long as the one before, and retrieval in texts of a quarter,
    half and the whole of a window's length, where there is room.

    Args:
        windows: int64 `[samples, tokens]`, at least 128 tokens.
        shared: also ask a second question on the cache that answered a first.
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
    filler = windows.flatten()
    found = [_retrieve(model, tokenizer, filler, size) for size in lengths]
    twice = 4 * len(_ids(tokenizer, (_CITY_NEEDLE + _CITY_QUESTION).format(key=10000, city="Oslo")))
    roomy = [size for size in lengths if shared and size >= twice]
    return LongEvaluation(spans, found, [_share(model, tokenizer, filler, size) for size in roomy])


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
            needle, (whole, answer) = _ids(tokenizer, _NEEDLE.format(key=key)), _asked(tokenizer, _QUESTION, key)
            room = length - len(needle) - len(whole)
            start = int(torch.randint(0, len(filler) - length + 1, (), generator=generator))
            text = filler[start : start + room].tolist()
            place = int(depth * room)
            for hidden, results in ((needle, found), ([], without)):
                ids = torch.tensor([*text[:place], *hidden, *text[place:], *whole])
                output = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=len(answer) + 1)
                probability, right = _scored(output, answer)
                results.append(probability)
                if hidden:
                    exact.append(right)
    count = len(exact)
    return Retrieval(length, sum(exact) / count, sum(found) / count, sum(without) / count)


@torch.no_grad()
def _share(model: Any, tokenizer: Any, filler: Tensor, length: int) -> Shared:
    generator = torch.Generator().manual_seed(length)
    scores: dict[str, list[tuple[float, bool]]] = {"first": [], "second": [], "anew": []}
    for depth in _DEPTHS:
        for _ in range(_KEYS):
            keys = [str(number) for number in torch.randint(10000, 100000, (2,), generator=generator).tolist()]
            needles = [_ids(tokenizer, _CITY_NEEDLE.format(city=city, key=key)) for city, key in _both(keys)]
            asked = [_asked(tokenizer, _CITY_QUESTION.format(city=city), key) for city, key in _both(keys)]
            room = length - sum(len(needle) for needle in needles) - sum(len(whole) for whole, _ in asked)
            start = int(torch.randint(0, len(filler) - length + 1, (), generator=generator))
            text, place = filler[start : start + room].tolist(), int(depth * room)
            context = [*needles[0], *text[:place], *needles[1], *text[place:]]
            past = None
            for part in torch.tensor(context).split(_TOKENS):
                ids = part[None].to(model.device)
                past = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
            read = torch.tensor(context)
            for name, (whole, answer) in zip(("first", "second"), asked, strict=True):
                ids, kept = torch.tensor(whole), len(answer) + 1
                read = torch.cat([read, ids])
                output = model(
                    input_ids=ids[None].to(model.device), past_key_values=past, use_cache=True, logits_to_keep=kept
                )
                past = output.past_key_values
                scores[name].append(_scored(output, answer))
            output = model(input_ids=read[None].to(model.device), use_cache=False, logits_to_keep=kept)
            scores["anew"].append(_scored(output, answer))
    means = {name: sum(value for value, _ in found) / len(found) for name, found in scores.items()}
    right = {name: sum(exact for _, exact in found) / len(found) for name, found in scores.items()}
    return Shared(length, means["first"], means["second"], means["anew"], right["second"], right["anew"])


def _both(keys: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(_CITIES, keys, strict=True))


def _asked(tokenizer: Any, question: str, key: str) -> tuple[list[int], list[int]]:
    """Token ids of a question with its answer, and those of the answer."""
    bare, whole = _ids(tokenizer, question), _ids(tokenizer, f"{question} {key}")
    same = next((n for n, (a, b) in enumerate(zip(whole, bare, strict=False)) if a != b), len(bare))
    return whole, whole[same:]


def _scored(output: Any, answer: Sequence[int]) -> tuple[float, bool]:
    """The mean log probability of an answer's tokens, of which `output` has the logits and one more, and whether each
    was the likeliest."""
    logs, wanted = output.logits[0, :-1].float().cpu().log_softmax(-1), torch.tensor(answer)
    return float(logs.gather(-1, wanted[:, None]).mean()), bool((logs.argmax(-1) == wanted).all())


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
