"""What `AutoModelForCausalLM` of transformers finds for native folders; importing this file lets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .errors import ModelError
from .formats import NATIVE


class CompressorConfig(PretrainedConfig):
    """`config.json` of a native folder: the original model's, under a type of its own so that no reader guesses."""

    model_type = NATIVE.name


# What transformers adds of its own, what says how to download a model, and what is so in any case.
_NO_MATTER = {
    "_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "cache_dir", "code_revision", "force_download",
    "local_files_only", "low_cpu_mem_usage", "proxies", "revision", "token", "trust_remote_code", "use_safetensors",
}  # fmt: skip


class CompressorForCausalLM:
    """What `AutoModelForCausalLM` finds for native folders: an entry that loads the original model's class."""

    config_class = CompressorConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **options: Any) -> Any:
        """Load a local native folder.

        Args:
            options: as transformers has them: `dtype`, `device_map` (a single device), `attn_implementation`,
                `output_loading_info`, `subfolder`, and `config`, that of the folder.

        Raises:
            ModelError: an option is not understood, whether it comes by name or in `config`.
        """
        from .loader import load  # which needs transformers whole

        folder = Path(pretrained_model_name_or_path, options.pop("subfolder", None) or "")
        options = {key: value for key, value in options.items() if value is not None and key not in _NO_MATTER}
        dtype, alias, device = (options.pop(key, None) for key in ("dtype", "torch_dtype", "device_map"))
        dtype = dtype or alias
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        attention, report = (options.pop(key, None) for key in ("attn_implementation", "output_loading_info"))
        own = CompressorConfig.from_pretrained(folder)
        config = options.pop("config", own)
        changed = _differences(own, config) - ({"dtype"} if dtype else set())
        if unknown := [*map(repr, args), *options, *sorted(changed)]:
            raise ModelError(
                f"{folder}: a compressed model is not loaded with {', '.join(unknown)}; leave that out "
                "(dtype, device_map, attn_implementation and output_loading_info are understood)"
            )
        model = load(folder, _one_device(device), dtype)
        if attention := attention or config._attn_implementation:
            model.set_attn_implementation(attention)
        return (model, _loading_info(folder)) if report else model


def _differences(own: PretrainedConfig, given: PretrainedConfig) -> set[str]:
    """Keys by which a config is not the folder's own, but for where it lies and how attention is computed."""
    ours, theirs = own.to_dict(), given.to_dict()
    changed = {key for key in ours.keys() | theirs.keys() if key[0] != "_" and ours.get(key) != theirs.get(key)}
    return changed if given._experts_implementation is None else changed | {"experts_implementation"}


def _one_device(wanted: Any) -> torch.device | None:
    """The device of a `device_map`; None where none is asked for."""
    places = set(wanted.values()) if isinstance(wanted, dict) else {wanted}
    if places in ({None}, {"auto"}):
        return None
    try:
        (place,) = places
        return torch.device(place)
    except (RuntimeError, TypeError, ValueError):
        raise ModelError(
            f"device_map={wanted!r}: a compressed model lies on one device; name that, as 'cpu' or 'cuda:0'"
        ) from None


def _loading_info(folder: Path) -> dict[str, Any]:
    """What transformers reports of a load: `load` refuses what is missing or of another shape."""
    from .model.skeleton import Skeleton
    from .stored import open_model

    skeleton = Skeleton(open_model(folder))
    beside = skeleton.beside()
    known = {part for name in skeleton.model.state_dict() for part in skeleton.family.lying(name)}
    unexpected = set(skeleton.checkpoint.tensors) - known.union(beside.values())
    return {"missing_keys": set(), "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}


# `AutoModelForCausalLM.from_pretrained` then understands native folders.
AutoConfig.register(NATIVE.name, CompressorConfig, exist_ok=True)
AutoModelForCausalLM.register(CompressorConfig, CompressorForCausalLM, exist_ok=True)
