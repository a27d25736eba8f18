"""A model like another, small enough to be run at once: the same code paths, a few numbers wide, random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .families import starred

HIDDEN, INNER, EXPERT, SHARED, HEAD, VOCABULARY = 64, 96, 32, 96, 16, 128
_HEADS, _KEPT, _EXPERTS, _CHOSEN = 4, 2, 4, 2
_LAYERS, _DEEPEST = 6, 12  # at most: of as many kinds, and in a row
FEW = 8  # outputs of a linear that puts out a number a head, or less
_SHARING = "num_kv_shared_layers"  # as many of the last layers use what earlier ones made
_STARTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SAME = ("word_embed_proj_dim", "embedding_size")  # where they are the hidden size
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")

_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "mlp_hidden_size", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), EXPERT),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), SHARED
    ),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "attention_head_dim"), HEAD),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_n_group", "moe_topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "hidden_size_per_layer_input": HEAD, "vocab_size_per_layer_input": VOCABULARY,
    "qk_head_dim": HEAD, "vocab_size": VOCABULARY, "sliding_window": 8,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rotary_dim": 8,
    "mamba_d_head": HEAD, "mamba_head_dim": HEAD, "mamba_d_ssm": 2 * HIDDEN, "mamba_expand": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 2 * HIDDEN // HEAD),
    "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 0,
}  # fmt: skip


def small_config(config: Any) -> tuple[Any, dict[str, int]]:
    """A transformers config of a language model, made small, with layers of as many kinds as it has; and these kinds,
    with the first layer of each.

    Raises:
        Exception: whatever transformers says of what it makes no sense of.
    """
    own = config.to_dict()
    told = {key: value for key, value in own.items() if not isinstance(getattr(type(config), key, None), property)}
    found = {key: _SIZES[key] for key in told if key in _SIZES and told[key] not in (None, 0)}
    found |= {key: _CHOSEN for key in TOP_K if key in told}
    if told.get("qk_rope_head_dim") is not None and "head_dim" in told:
        found["head_dim"] = _SIZES["qk_rope_head_dim"]
    found |= {key: HIDDEN for key in _SAME if told.get(key) is not None and told[key] == config.hidden_size}
    if (kept := told.get("num_key_value_heads")) is not None:
        found["num_key_value_heads"] = _HEADS if kept == told.get("num_attention_heads") else _KEPT
    layers, (_, kinds) = config.num_hidden_layers, outline(config)
    lists = [key for key, value in told.items() if isinstance(value, list) and len(value) == layers > 1]
    chosen = _chosen(layers, kinds, [told[key] for key in lists])
    found["num_hidden_layers"] = len(chosen)
    for key in lists:
        same = key in _SIZES and all(isinstance(value, int) for value in told[key])
        found[key] = [_SIZES[key] if same else told[key][index] for index in chosen]
    if isinstance(shared := told.get(_SHARING), int):
        found[_SHARING] = sum(index >= layers - shared for index in chosen)
    if lists:  # layers from which on something else begins
        starts = {key: told[key] for key in _STARTS if isinstance(told.get(key), int)}
        found |= {key: sum(index < start for index in chosen) for key, start in starts.items()}
    for key, value in told.items():
        if isinstance(value, dict) and "rope" not in key:
            found[key] = _made_small(value)
        if isinstance(value, dict) and value and all(str(number).isdigit() for number in value):
            numbers = {int(number): each for number, each in value.items()}
            found[key] = {place: _made_small(numbers[i]) for place, i in enumerate(chosen) if i in numbers}
    return CONFIG_MAPPING[told["model_type"]].from_dict({**told, **found, "dtype": "float32"}), _first(kinds)


def _made_small(told: Any) -> Any:
    """What a config says of one layer."""
    return {key: _SIZES.get(key, value) for key, value in told.items()} if isinstance(told, dict) else told


def outline(config: Any) -> tuple[int, list[str]]:
    """How many weights a model has, and of what kind each of its layers is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = next((list(part) for part in lists if len(part) == config.num_hidden_layers), list[nn.Module]())
    kinds = [repr((type(block).__name__, sorted({starred(name) for name in block.state_dict()}))) for block in blocks]
    return sum(parameter.numel() for parameter in model.parameters()), kinds


def _first(kinds: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, index)
    return found


def _chosen(layers: int, kinds: Sequence[str], said: Sequence[Sequence[Any]]) -> list[int]:
    """Numbers of layers among which all kinds are: by what is said of each, and by what they hold. Where nothing is
    said, all up to the last that is new."""
    new = sorted(_first([repr((kind, [each[index] for each in said])) for index, kind in enumerate(kinds)]).values())
    if said:
        return new[:_LAYERS] if len(new) > 1 else [0, 1]
    return list(range(min(layers, max(2, new[-1] + 1 if new else 2), _DEEPEST)))


def small_model(config: Any) -> Any:
    """Random weights in float32, gains of norms near one, by a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    stored = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and not tensor.is_floating_point() and tensor.dim() == 2:  # such as experts by a token's id
            tensor.data = torch.randint(0, 2, tensor.shape, generator=generator, dtype=tensor.dtype)
        if name not in stored or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator) * 0.1
        constant = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
        # What is a gain, or some constant, stays near to that, but equals no other.
        tensor.data = noise if not constant else tensor.detach() * (1 + noise) + noise * (tensor == 0)
    return model.requires_grad_(False).eval()
