"""How good a model is, and how far from another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime.attention import cache_bytes
from ...runtime.errors import ModelError


@dataclass(frozen=True)
class Divergence:
    """Of a model from its base on the same tokens: KL(base ‖ model) per token in nats, and agreement of the argmax."""

    base_perplexity: float
    perplexity_ratio: float
    ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """Perplexity over windows; errors are standard errors over windows."""

    tokens: int
    perplexity: float
    perplexity_error: float
    against: Divergence | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Any, windows: Tensor, base: Any = None, batch_tokens: int = 2048, passed: Callable[[int], None] | None = None
) -> Evaluation:
    """Perplexity of a causal model, and its divergence from `base`.

    Args:
        model, base: transformers models over the same vocabulary.
        windows: int64 `[samples, tokens]`; each is read on its own, its first token is not predicted.
        passed: told how many more windows are behind.
    """
    sizes = [each.config.get_text_config().vocab_size for each in (model, base) if each is not None]
    if len(set(sizes)) > 1:
        raise ModelError(
            f"the models have {sizes[0]:,} and {sizes[1]:,} tokens in their vocabularies: compare a model with the one "
            "it came from"
        )
    batch, reading = max(1, batch_tokens // windows.shape[1]), Reading(windows)
    for ids in windows.split(batch):
        logs = _log_probabilities(model, ids).flatten(0, 1)
        reading.add(logs, None if base is None else _log_probabilities(base, ids).flatten(0, 1))
        if passed is not None:
            passed(len(ids))
    return summary(reading.found, compared=base is not None)


class Reading:
    """What a model, and its base if there is one, make of windows `[samples, tokens]`, whose first tokens are not
    predicted; log probabilities come a few tokens at a time, in the order of the windows."""

    def __init__(self, windows: Tensor) -> None:
        self._samples, self._targets, self._seen = len(windows), windows[:, 1:].flatten(), 0
        # Own loss, the base's, divergence, agreement. At once: small tensors that stay, made between large ones that
        # go, keep the allocator from giving these back.
        self._found = torch.zeros(4, len(self._targets), dtype=torch.float64)

    def add(self, logs: Tensor, reference: Tensor | None = None) -> None:
        """Log probabilities of the next tokens to be predicted, `[tokens, vocabulary]`, and the base's alike."""
        rows = slice(self._seen, self._seen + len(logs))
        self._seen = rows.stop
        targets, (own, other, divergence, agreement) = self._targets[rows, None].to(logs.device), self._found[:, rows]
        own.copy_(-logs.gather(-1, targets)[:, 0])
        if reference is not None:
            other.copy_(-reference.gather(-1, targets)[:, 0])
            divergence.copy_(F.kl_div(logs, reference, log_target=True, reduction="none").sum(-1))
            agreement.copy_(logs.argmax(-1) == reference.argmax(-1))

    @property
    def found(self) -> Tensor:
        """Of each token the model's loss, the base's, KL(base ‖ model) and agreement, `[4, samples, tokens - 1]`."""
        return self._found.view(4, self._samples, -1)


def summary(found: Tensor, *, compared: bool = True) -> Evaluation:
    """What figures of single tokens come to.

    Args:
        found: as `Reading.found`, of some windows.
        compared: whether there is a base.
    """
    losses, base_losses, divergences, _ = found.mean(-1)
    perplexity = float(losses.mean().exp())
    error, count = perplexity * _standard_error(losses), found[0].numel()
    if not compared:
        return Evaluation(count, perplexity, error)
    tokens, agreements = found[2:].flatten(1)
    ratio = float((losses - base_losses).mean().exp())
    against = Divergence(
        base_perplexity=float(base_losses.mean().exp()),
        perplexity_ratio=ratio,
        ratio_error=ratio * _standard_error(losses - base_losses),
        kl_mean=float(tokens.mean()),
        kl_error=_standard_error(divergences),
        kl_median=float(tokens.median()),
        kl_p99=float(tokens.sort().values[int(0.99 * (tokens.numel() - 1))]),
        top1_agreement=float(agreements.mean()),
    )
    return Evaluation(count, perplexity, error, against)


@torch.no_grad()
def cache_per_token(model: Any, ids: Tensor) -> float:
    """Bytes that the model's KV cache really takes for each of the tokens `[1, tokens]`, at most 32 of them."""
    ids = ids[:, :32].to(model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return cache_bytes(cache) / ids.shape[1]


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float().cpu().log_softmax(-1)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
