"""Models whose blocks get more than hidden states: several streams of them, something that is looked up for each token
in every block, keys and values that an earlier block made (Gemma 3n and 4, DeepSeek-V4).

All that goes along with a token is one row of numbers, `[streams · hidden_size | id | keys and values]`, so that what
carries hidden states over blocks need not know. The decoder itself makes the rest of what a block gets, from the ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..schemes import Operator

if TYPE_CHECKING:
    from .skeleton import Skeleton


_STREAMS = {"altup_num_inputs": 0, "hc_mult": -2}  # keys of config.json → which dimension they are for a block


def is_wide(config: Any) -> bool:
    """Whether a language model, by its transformers config, is one of them."""
    told = ("hidden_size_per_layer_input", "num_kv_shared_layers", *_STREAMS)
    return any(getattr(config, key, None) for key in told)


class _Done(Exception):
    """Ends a run of the decoder once what is wanted is known."""


class _Nothing(nn.Module):
    """In place of all blocks."""

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return hidden


class _Leaving(nn.Module):
    """A decoder behind its blocks."""

    def __init__(self, wide: Wide, decoder: nn.Module) -> None:
        super().__init__()
        self._wide, self._decoder = [wide], [decoder]

    def forward(self, inputs_embeds: Tensor, **options: Any) -> Any:
        return self._wide[0].left(self._decoder[0], inputs_embeds)


class Wide:
    """How such a model is run block by block.

    Attributes:
        width: numbers that go along with a token.
        streams: how many of these, the first ones, are its residual streams.
        changed: the embedding in the compressed chain, where that is another than the checkpoint's.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, config = skeleton, skeleton.config
        self.changed: Operator | None = None
        counts: list[tuple[int, int]] = [
            (getattr(config, key), axis) for key, axis in _STREAMS.items() if getattr(config, key, None)
        ]
        self._streams, self._axis = counts[0] if counts else (1, 0)
        self._hidden = config.hidden_size
        self._each = getattr(config, "hidden_size_per_layer_input", None) or 0
        self._shared: dict[str, tuple[int, int]] = {}  # kind of block → heads and numbers of each
        if getattr(config, "num_kv_shared_layers", 0):
            for layer in skeleton.layers:
                attention = layer.get_submodule(skeleton.family.attention)
                if attention.store_full_length_kv:
                    heads = attention.k_proj.out_features // attention.head_dim
                    self._shared[attention.layer_type] = (heads, attention.head_dim)
        self._sizes = [self._streams * self._hidden, 1, *(2 * h * d for h, d in self._shared.values())]
        self.width, self.streams = sum(self._sizes), self._sizes[0]

    def runner(self, index: int, block: nn.Module, compressed: bool) -> Any:
        """A decoder whose only layer is `block`, with what of its own parts that block needs."""
        runner = self._skeleton.runner_of([block])
        self._give(runner, index)
        runner.stored = self.changed if compressed else None
        for name, part in runner.named_children():  # which make streams of one and one of them, without weights
            if isinstance(part, nn.ModuleList) and name != self._skeleton.family.layers and part[0] is not block:
                setattr(runner, name, nn.ModuleList(nn.Identity() for _ in part))
        return runner

    def through(self, runner: Any, state: Tensor) -> Tensor:
        """`[batch, tokens, width]` through a runner's block."""
        streams, ids, shared = self._parts(state.to(self._skeleton.device))
        found: list[Tensor] = []

        def before(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if shared:
                options["shared_kv_states"].update(shared)
            if "input_ids" in options:
                options["input_ids"] = ids
            return (streams, *args[1:]), options

        def after(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
            if not isinstance(output, Tensor):
                raise ModelError("its blocks hand on more than hidden states, keys and values")
            found.append(self._row(output, ids, options.get("shared_kv_states", {})))
            raise _Done

        block = runner.layers[0]
        with self._watched(block, before, after):
            self._run(runner, ids, runner.stored)
        return found[0]

    def enter(self, ids: Tensor, stored: Operator | None) -> Tensor:
        """Token ids `[batch, tokens]` → what enters block 0, `[batch, tokens, width]`.

        Args:
            stored: the embedding, where it is another than the checkpoint's.
        """
        decoder, ids = self._whole(), ids.to(self._skeleton.device)
        found: list[Tensor] = []

        def before(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            found.append(self._row(args[0], ids, {}))
            raise _Done

        with self._watched(decoder.layers[0], before, None):
            self._run(decoder, ids, stored)
        return found[0]

    def leaving(self, norm: nn.Module) -> nn.Module:
        """What puts out, for `[batch, tokens, width]` that left the last block as `inputs_embeds`, what the decoder
        does.

        Args:
            norm: behind the last block.
        """
        decoder = self._whole()
        setattr(decoder, self._skeleton.family.norm, norm)
        return _Leaving(self, decoder)

    def left(self, decoder: Any, state: Tensor) -> Any:
        """The decoder's output."""
        streams, ids, _ = self._parts(state)

        def before(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            return (streams, *args[1:]), options

        with self._watched(decoder.layers[0], before, None):
            return self._run(decoder, ids)

    def _whole(self) -> Any:
        """A decoder that does nothing in place of its blocks."""
        decoder = self._skeleton.runner_of([_Nothing()])
        self._give(decoder, 0)
        for name, part in decoder.named_children():
            if any(tensor.is_meta for tensor in part.state_dict().values()) and not isinstance(part, nn.Embedding):
                setattr(decoder, name, self._skeleton.outer_part(name))
        return decoder

    def _give(self, decoder: Any, index: int) -> None:
        """Let a decoder of one block have of its own weights those that are for block `index`."""
        each, skeleton = self._each, self._skeleton
        if self._shared:
            decoder.config.num_kv_shared_layers = 0  # of a decoder of one layer; a block knows whether it shares
        if not each:
            return
        own = slice(index * each, (index + 1) * each)
        table = copy.deepcopy(decoder.embed_tokens_per_layer)
        table.padding_idx = None
        decoder.embed_tokens_per_layer, decoder.own = table, own
        rows = skeleton.checkpoint.rows(
            skeleton.decoder_name("per_layer_model_projection.weight"), torch.arange(own.start, own.stop)
        )
        decoder.per_layer_model_projection = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        decoder.per_layer_model_projection.weight = nn.Parameter(rows.to(skeleton.device), requires_grad=False)
        decoder.per_layer_projection_norm = skeleton.outer_part("per_layer_projection_norm")

    def _run(self, decoder: Any, ids: Tensor, stored: Operator | None = None) -> Any:
        """Run a decoder over ids, of whose tables it has no more rows than these."""
        skeleton, embedding = self._skeleton, self._skeleton.family.embedding
        found, places = ids.unique(return_inverse=True)
        setattr(decoder, embedding, skeleton.table(embedding, found, stored))
        if self._each:
            name = skeleton.decoder_name("embed_tokens_per_layer.weight")
            inside = torch.where(found < skeleton.checkpoint.tensors[name].shape[0], found, 0)
            rows = skeleton.checkpoint.rows(name, inside.cpu())[:, decoder.own].to(skeleton.device)
            decoder.embed_tokens_per_layer.weight = nn.Parameter(rows, requires_grad=False)
        with suppress(_Done):
            return decoder(input_ids=places, use_cache=False)

    @contextmanager
    def _watched(self, block: nn.Module, before: Any, after: Any) -> Iterator[None]:
        handles = [block.register_forward_pre_hook(before, with_kwargs=True)]
        if after is not None:
            handles.append(block.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _row(self, streams: Tensor, ids: Tensor, shared: Any) -> Tensor:
        """All that goes along with each token, float32 `[batch, tokens, width]`."""
        own = streams.movedim(self._axis, -2).flatten(-2) if self._streams > 1 else streams
        parts = [own, ids.unsqueeze(-1)]
        for kind, (heads, numbers) in self._shared.items():
            if kind in shared:
                parts += [part.transpose(1, 2).flatten(2) for part in shared[kind]]
            else:
                parts.append(streams.new_zeros(*ids.shape, 2 * heads * numbers))
        return torch.cat([part.float() for part in parts], -1)

    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, ...]]]:
        """The streams as a block takes them, ids, and what is shared."""
        streams, ids, *kept = state.split(self._sizes, -1)
        shared: dict[str, tuple[Tensor, ...]] = {}
        for (kind, (heads, numbers)), part in zip(self._shared.items(), kept, strict=True):
            pair = part.unflatten(-1, (2, heads, numbers)).movedim(2, 0).transpose(2, 3)
            shared[kind] = (pair[0], pair[1])
        if self._streams > 1:
            streams = streams.unflatten(-1, (self._streams, self._hidden)).movedim(-2, self._axis)
        return streams, ids.squeeze(-1).long(), shared
