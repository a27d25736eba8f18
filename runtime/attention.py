"""Attention whose KV cache holds latents.

Keys and values are cached as the few numbers that their projections go through (`LatentLinear`), before the rotary
embedding, in transformers' own `Cache` classes: `[batch, 1, tokens, r_k]` and `[batch, 1, tokens, r_v]`. Keys are made
again from them and rotated at their slot in the cache, as queries are: left padding shifts both alike, and scores
depend on the difference alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ModelError
from .latent_decode import LatentDecode
from .model.skeleton import Skeleton
from .schemes import StoredLinear

TILE = 1024  # cached tokens whose keys are made again at a time while decoding
_UNLIMITED = ("full_attention", "attention", "hybrid")  # kinds of layers that see all tokens
_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


def rope_obstacle(config: Any) -> str | None:
    """Why keys cannot be rotated again by their slot, or None where they can."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _ROPE:
        return f"its rotary embedding {kind!r} depends on more than the position; known: {', '.join(_ROPE)}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps the scores of attention (attn_logit_softcapping), which decoding from latents does not"
    if getattr(config, "clip_qkv", None) is not None:
        return "it clips keys and values (clip_qkv), which latents cannot follow"
    return None


def sliding(config: Any, index: int) -> bool:
    """Whether layer `index` sees a window of tokens only."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[index] not in _UNLIMITED
    return getattr(config, "sliding_window", None) is not None


class RotaryTable:
    """Cosines and sines of the slots of a cache, from the model's own rotary module; one for all layers.

    Threads may share one: each goes on with the tables it found or made, also where another puts longer ones in their
    place.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._halves: dict[torch.dtype, tuple[Tensor, tuple[Tensor, Tensor]]] = {}  # with the cosines they are of

    def _whole(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        known = self._tables.get(like.dtype)
        if known is None or len(known[0]) < length or known[0].device != like.device:
            slots = torch.arange(max(1024, 1 << (length - 1).bit_length()), device=like.device)
            kind = ["full_attention"] if hasattr(self._rotary, "layer_types") else []  # others have a window
            cosines, sines = self._rotary(like.new_empty(1), slots[None], *kind)
            known = self._tables[like.dtype] = cosines[0], sines[0]
        return known

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`[length, head_dim]` each, in the dtype and on the device of `like`."""
        cosines, sines = self._whole(length, like)
        return cosines[:length], sines[:length]

    def halves(self, length: int, like: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """`[length or more, head_dim / 2]` each: the pairs of `swizzles.pair_order`, all channels of a head."""
        cosines, sines = self._whole(length, like)
        known = self._halves.get(like.dtype)
        if known is None or known[0] is not cosines:
            width = cosines.shape[1] // 2
            rest = (0, head_dim // 2 - width)
            pairs = (
                nn.functional.pad(cosines[:, :width], rest, value=1.0).contiguous(),
                nn.functional.pad(sines[:, :width], rest).contiguous(),
            )
            known = self._halves[like.dtype] = cosines, pairs
        return known[1]


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The rotary embedding of `[..., tokens, head_dim]`, halves paired; of the leading dims only, where the tables are
    narrower."""
    width = cosines.shape[-1]
    half, result = width // 2, x.clone()
    result[..., :width].mul_(cosines)
    result[..., :half].addcmul_(x[..., half:width], sines[..., :half], value=-1)
    result[..., half:width].addcmul_(x[..., :half], sines[..., half:])
    return result


Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # of `[..., tokens, head_dim]`, as `rotated`


def rotation_of(attention: nn.Module, *, turns: bool) -> Turn:
    """How a family turns keys and queries: `rotated`, where that does the same; nothing where a layer does not."""
    if not turns:
        return lambda x, cosines, sines: x
    family = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    numbers = torch.arange(72.0).sin()  # without a pattern that a wrong pairing would keep
    x, tables = numbers[:24].view(1, 1, 3, 8), numbers[24:].view(2, 1, 3, 8)

    def own(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        turned: Tensor = family(x, x, cosines[None], sines[None])[1]
        return turned

    return rotated if torch.allclose(own(x, *tables[:, 0]), rotated(x, *tables[:, 0])) else own


class Cached(Protocol):
    """A projection as attention uses it: what it caches, and how to make its outputs from that."""

    rank: int
    groups: int
    bits: int
    keeps_latents: bool

    def packed(self, x: Tensor) -> Tensor: ...

    def unpacked(self, cached: Tensor, dtype: torch.dtype) -> Tensor: ...

    def raised(self, latents: Tensor) -> Tensor: ...


class PlainLatents(nn.Module):
    """A projection without latents beside one that has them: its outputs are cached, before the rotary embedding."""

    bits, keeps_latents = 16, False

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear, self.rank, self.groups = linear, linear.out_features, 1

    def packed(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result

    def unpacked(self, cached: Tensor, dtype: torch.dtype) -> Tensor:
        return cached.contiguous().view(dtype)

    def raised(self, latents: Tensor) -> Tensor:
        return latents


class LatentAttention(nn.Module):
    """A model's attention module with latents in the cache.

    Attributes:
        keys, values: the projections.
        key_bias: `[kv_heads * head_dim]`, added before the rotary embedding, or None.
        output_shift: `[hidden_size]`, what the bias of the values becomes behind `o_proj`, since the weights of a
            query's tokens sum to one; or None.
        value_up: `[kv_heads, head_dim, r]`, the values' `up` by head, or None where it is merged into `o_proj`, which
            is done if that makes `o_proj` no larger.
    """

    key_bias: Tensor | None
    output_shift: Tensor | None
    value_up: Tensor | None

    def __init__(self, source: Any, rotary: RotaryTable, *, turns: bool = True) -> None:
        super().__init__()
        config = source.config
        self.config, self.layer_idx, self.scaling = config, source.layer_idx, source.scaling
        self.head_dim, self.num_key_value_groups = source.head_dim, source.num_key_value_groups
        self.attention_dropout, self.is_causal = source.attention_dropout, True
        self.kv_heads = source.v_proj.out_features // self.head_dim
        self.q_proj, self.o_proj = source.q_proj, source.o_proj
        self.q_norm, self.k_norm = getattr(source, "q_norm", None), getattr(source, "k_norm", None)
        self._rotary, self._turn = rotary, rotation_of(source, turns=turns)
        self.keys, key_bias = _cached(source.k_proj)
        self.values, value_bias = _cached(source.v_proj)
        self.register_buffer("key_bias", key_bias, persistent=False)
        shift = None if value_bias is None else self._behind_output(value_bias)
        self.register_buffer("output_shift", shift, persistent=False)
        self.register_buffer("value_up", self._value_up(), persistent=False)
        width = self.values.rank // self.values.groups
        if self.value_up is not None and type(self.o_proj) is nn.Linear and width <= self.head_dim:
            self.o_proj, self.value_up = self._merged(self.o_proj), None
            del self.values.up
        self._kernel = LatentDecode.of(self) if self._turn is rotated else None

    def _behind_output(self, bias: Tensor) -> Tensor:
        heads = bias.float().view(self.kv_heads, 1, -1).expand(-1, self.num_key_value_groups, -1).reshape(1, -1)
        plain = not isinstance(self.o_proj, StoredLinear)
        shifted = nn.functional.linear(heads, self.o_proj.weight.float()) if plain else self.o_proj.product(heads)
        return shifted[0].to(bias.dtype)

    def _value_up(self) -> Tensor | None:
        if not self.values.keeps_latents:
            return None
        up: Tensor = self.values.up.whole(self.values.dtype)
        return up.reshape(self.kv_heads, self.head_dim, -1)

    def _merged(self, output: nn.Linear) -> nn.Linear:
        """`o_proj` for heads in the values' latents."""
        assert self.value_up is not None
        heads = output.weight.view(output.out_features, self.kv_heads, self.num_key_value_groups, self.head_dim)
        weight = torch.einsum("ogmd,gdr->ogmr", heads.float(), self.value_up.float()).flatten(1).to(output.weight.dtype)
        merged = nn.Linear(weight.shape[1], weight.shape[0], bias=output.bias is not None, device="meta")
        merged.weight, merged.bias = nn.Parameter(weight, requires_grad=False), output.bias
        return merged

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's own attention; `position_embeddings` are not used, slots of the cache are."""
        batch, length, _ = hidden_states.shape
        slots = torch.arange(length, device=hidden_states.device)
        if past_key_values is not None:
            slots = slots + past_key_values.get_seq_length(self.layer_idx)
        keys, values = (part.packed(hidden_states)[:, None] for part in (self.keys, self.values))
        if past_key_values is not None:
            if torch.uint8 in (keys.dtype, values.dtype):  # caches allocate both as the keys are: floats go as bytes
                keys, values = (part.contiguous().view(torch.uint8) for part in (keys, values))
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        cosines, sines = self._rotary(keys.shape[2], hidden_states)
        queries = self._heads(self.q_proj(hidden_states), self.q_norm)
        queries = self._turn(queries, cosines[slots], sines[slots])
        kind = self.config._attn_implementation
        if length == 1 and kind in ("sdpa", "eager"):
            output, weights = self._decode(queries, keys, values, attention_mask), None
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow to import, and here already

            interface = ALL_ATTENTION_FUNCTIONS.get_interface(kind, _eager)
            output, weights = interface(
                self, queries, self._keys(keys, slice(None), queries.dtype), self._values(values, queries.dtype),
                attention_mask, dropout=0.0, scaling=self.scaling, **kwargs,
            )  # fmt: skip
            output = output[..., : self.o_proj.in_features // queries.shape[1]]
        output = self.o_proj(output.reshape(batch, length, -1))
        return output if self.output_shift is None else output + self.output_shift, weights

    def _heads(self, flat: Tensor, norm: Any) -> Tensor:
        """`[batch, tokens, heads * head_dim]` → normed `[batch, heads, tokens, head_dim]`."""
        if norm is not None and norm.weight.shape[0] != self.head_dim:  # over all heads at once
            flat, norm = norm(flat), None
        heads = flat.unflatten(-1, (-1, self.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def _keys(self, cached: Tensor, slots: slice, dtype: torch.dtype) -> Tensor:
        """Rotated keys `[batch, kv_heads, tokens, head_dim]` of some slots."""
        keys = self.keys.raised(self.keys.unpacked(cached[:, 0, slots], dtype))
        if self.key_bias is not None:
            keys = keys + self.key_bias
        cosines, sines = self._rotary(cached.shape[2], keys)
        return self._turn(self._heads(keys, self.k_norm), cosines[slots], sines[slots])

    def _values(self, cached: Tensor, dtype: torch.dtype) -> Tensor:
        """Values by head; where `o_proj` takes latents, these, with zeros up to `head_dim`, for kernels want heads of
        one width."""
        latents = self.values.unpacked(cached[:, 0], dtype)
        if self.value_up is not None or not self.values.keeps_latents:
            return self._heads(self.values.raised(latents), None)
        heads = self._latent_heads(latents)
        return nn.functional.pad(heads, (0, self.head_dim - heads.shape[-1])).expand(-1, self.kv_heads, -1, -1)

    def _latent_heads(self, latents: Tensor) -> Tensor:
        """The latents that each key-value head reads: `[batch, kv_heads or 1, tokens, rank / groups]`."""
        heads = latents.unflatten(-1, (self.values.groups, -1)).transpose(1, 2)
        return heads if self.values.groups == 1 else heads.repeat_interleave(self.kv_heads // self.values.groups, 1)

    def _decode(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One token: `[batch, 1, heads, width]`, the keys made again a tile at a time."""
        batch, heads, _, _ = queries.shape
        grouped = queries.view(batch, self.kv_heads, -1, self.head_dim)
        total = keys.shape[2]
        kernel = self._kernel
        if kernel is not None and queries.dtype == kernel.dtype and (mask is None or mask.dtype == torch.bool):
            found = kernel(grouped, keys, values, mask, self._rotary.halves(total, queries, self.head_dim))
            return (found if self.value_up is None else found @ self.value_up.mT).reshape(batch, 1, heads, -1)
        tiles = (
            self._keys(keys, slice(start, min(start + TILE, total)), queries.dtype).contiguous() @ grouped.mT
            for start in range(0, total, TILE)
        )  # a tall product is several times as fast as a wide one
        scores = torch.cat(list(tiles), -2).mT.float() * self.scaling
        if mask is not None:
            visible = mask[:, :, :, :total]  # [batch or 1, 1, 1, tokens]
            hidden = torch.finfo(scores.dtype).min  # finite, for a row of padding sees nothing at all
            scores = scores.masked_fill(~visible, hidden) if mask.dtype == torch.bool else scores + visible
        shares = scores.softmax(-1).to(queries.dtype)
        latents = self.values.unpacked(values[:, 0], queries.dtype)
        if not self.values.keeps_latents:
            found = shares @ self._heads(latents, None)
        elif self.values.groups == 1:  # all heads read the same latents: one product
            found = (shares.flatten(1, 2) @ latents).unflatten(1, (self.kv_heads, -1))
        else:
            found = shares @ self._latent_heads(latents)
        if self.value_up is not None:
            found = found @ self.value_up.mT
        return found.reshape(batch, 1, heads, -1)


def _cached(linear: Any) -> tuple[Any, Tensor | None]:
    """A projection as attention uses it, and the bias that is added to its outputs."""
    if getattr(linear, "keeps_latents", False):
        return linear, linear.bias
    return PlainLatents(linear), None


def _eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """By the book; returns the weights too."""
    key, value = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (key, value))
    scores = query @ key.mT * kwargs["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def install_latent_attention(skeleton: Skeleton) -> None:
    """Let the blocks of a loaded model whose keys or values go through latents cache these.

    Raises:
        ModelError: the family's positions cannot be followed.
    """
    family, model = skeleton.family, skeleton.model
    found = []
    for layer in skeleton.layers:
        modules = dict(layer.named_modules())
        if any(getattr(modules.get(name), "keeps_latents", False) for name in (family.keys, family.values)):
            found.append(layer)
    if not found:
        return
    if why := rope_obstacle(skeleton.config):
        raise ModelError(f"this folder keeps latents in the KV cache, which the model does not allow: {why}")
    table = RotaryTable(skeleton.decoder.rotary_emb)
    for layer in found:
        source = layer.get_submodule(family.attention)
        latent = LatentAttention(source, table, turns=family.rotates(source))
        setattr(layer, family.attention, latent)
    # With None, `generate` sizes a static cache by what it is first given, not by the config's heads.
    model._get_static_cache_init_shape = lambda: None
    skeleton.decoder.register_forward_pre_hook(_check_positions, with_kwargs=True)


def _check_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse positions that are not those of the cache's slots, up to left padding."""
    positions, mask, past = (kwargs.get(key) for key in ("position_ids", "attention_mask", "past_key_values"))
    if positions is None or isinstance(mask, dict) or torch.compiler.is_compiling():
        return  # masks by kind of layer come from `generate`, whose positions are in order
    start = 0 if past is None else int(past.get_seq_length())
    length = positions.shape[-1]
    if mask is not None and mask.dim() != 2:  # says nothing of padding: after equal ones, each is the next
        steps = positions.diff(dim=-1)
        wrong = (steps != 1) & ((steps != 0) | (steps.cumsum(-1) > 0))
    else:
        expected = torch.arange(start, start + length, device=positions.device)
        visible = torch.ones_like(positions, dtype=torch.bool)
        if mask is not None:
            seen = mask[:, : start + length].to(positions.device)
            expected = expected - (seen.cumsum(-1) == 0).sum(-1, keepdim=True)
            visible = seen[:, start:].bool()
        wrong = positions - expected
        if past is None and not kwargs.get("use_cache"):
            first = visible.int().argmax(-1, keepdim=True).expand(len(wrong), 1)
            wrong = wrong - wrong.gather(-1, first)  # nothing is kept: only distances matter
        wrong = (wrong * visible).bool()
    if bool(wrong.any()):
        raise ModelError(
            "position_ids that jump (packed or edited sequences) cannot be followed by a cache of latents, which knows "
            "a token's slot only: give one sequence a row, padded on the left"
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a transformers cache holds."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
