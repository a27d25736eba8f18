"""Pico models of every family, made on the spot, and a tokenizer to go with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.calibrate.statistics import Statistics
from compressor.compress.events import BlockDone, Event

_COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
_SCALED = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}  # fmt: skip
_PATCHES = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _MOE,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True, "attention_bias": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **_SCALED},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "phi3": {},
    "gpt2": {"n_inner": 96, "n_positions": 256, "bos_token_id": 0, "num_key_value_heads": 4},
    "glm4": {"attention_bias": True},
    "olmo2": {},
    "granite": _SCALED,
    "smollm3": {"no_rope_layers": [1, 0]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "starcoder2": {"use_bias": True},
    "ernie4_5": {},
    "exaone4": _SLIDING,
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "cohere2": {**_SLIDING, "logit_scale": 0.25},
    "llava": {
        "text_config": {"model_type": "llama", **_COMMON},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "image_token_index": 5,
    },
    "gemma3": {
        "text_config": {**_COMMON, **_SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": _VISION,
        "image_token_index": 5,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_COMMON, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_VISION},
        "image_token_index": 5,
    },
    "qwen2_5_vl": {"text_config": {**_COMMON, **_THREE_AXES}, "vision_config": _PATCHES},
    "qwen3_vl": {
        "text_config": {**_COMMON, **_THREE_AXES},
        "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0]},
    },
}


def build_model(family: str, folder: Path, **changes: Any) -> Path:
    """A random model of a family, with a byte-level tokenizer of 128 ids."""
    torch.manual_seed(0)
    own = FAMILIES[family]
    config = CONFIG_MAPPING[family](**{**({} if "text_config" in own else _COMMON), **own, **changes})
    model = stock_class(config).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(changes.get("dtype", torch.bfloat16)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def stock_class(config: Any) -> Any:
    """The automatic class of transformers that builds the whole model of a config."""
    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


@torch.no_grad()
def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What stock transformers answers to token ids `[samples, tokens]`; the folder has all tensors that it wants, and
    none besides."""
    kind = stock_class(AutoConfig.from_pretrained(folder))
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def known(moment: torch.Tensor, tokens: int = 10**9) -> Statistics:
    """Statistics of inputs with a second moment, in a chain where nothing was lost before."""
    zeros = torch.zeros(moment.shape)
    lost = {"cross": zeros, "held_moment": zeros, "held_cross": zeros}
    return Statistics(tokens, {"moment": moment.float(), **lost})


def interrupt(event: Event) -> None:
    """A listener that stops a run, as Ctrl-C does, once a block is done."""
    if isinstance(event, BlockDone):
        raise KeyboardInterrupt


def benchmark(name: str) -> Any:
    """The module of `benchmarks/<name>.py`."""
    script = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_folders(found: Path, expected: Path) -> None:
    """Two outputs of one job: every file but the timings has the same bytes."""
    names = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert names == {path.relative_to(found) for path in found.rglob("*") if path.is_file()}
    for name in names:
        if name.name not in ("timings.jsonl", "report.html"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:127]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")


def at_once(target: Callable[..., object], args: tuple[Any, ...], daemon: bool) -> Any:
    """In place of a thread, one that is done when it has started."""
    return SimpleNamespace(start=partial(target, *args), daemon=daemon)
