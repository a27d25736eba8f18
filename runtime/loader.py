"""Load a model folder, plain or compressed, as a transformers model that runs the stored form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .attention import install_latent_attention
from .errors import ModelError
from .formats import NATIVE
from .model.experts import pack_experts
from .model.skeleton import Skeleton
from .schemes import StoredEmbedding, looked_up, stored_linear
from .stored import StoredModel, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model on `meta`, put compressed linears in place of dense ones, map the tensors in.

    Args:
        path: a folder that `apply` wrote, or a plain Hugging Face folder.
        device: where it runs; default: the GPU if there is one, else the CPU.
        dtype: of activations and dense weights; default: the checkpoint's.

    Raises:
        ModelError: the folder is damaged, incomplete or of an unknown family.
    """
    checkpoint = open_model(Path(path))
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype or checkpoint.dtype
    skeleton = Skeleton(checkpoint, kind, target)
    model, family = skeleton.model, skeleton.family
    if isinstance(checkpoint, StoredModel):
        for disk_name in checkpoint.schemes:
            _put_stored(skeleton, checkpoint, disk_name, target, kind)
    state, beside = {}, skeleton.beside()
    for name, tensor in model.state_dict().items():
        disk_name = beside.get(name) or family.disk_name(name)
        if tensor.is_meta and disk_name in checkpoint.tensors:
            stored = checkpoint.tensor(disk_name)
            state[name] = stored.to(target, skeleton.tensor_dtype(name, stored.dtype))
    model.load_state_dict(state, assign=True, strict=False)
    _tie(model, state, family.disk_name("lm_head.weight") in checkpoint.tensors)
    model.get_output_embeddings().register_forward_pre_hook(_without_gaps)
    pack_experts(model)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"{path}: {left[0]} is not found in the folder, or lies there in a form that is not read here")
    if (checkpoint.path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    if isinstance(checkpoint, StoredModel):
        install_latent_attention(skeleton)
        model.save_pretrained = _cannot_be_saved
    return model.requires_grad_(False).eval()


def _put_stored(
    skeleton: Skeleton, checkpoint: StoredModel, disk_name: str, target: torch.device, kind: torch.dtype
) -> None:
    """Put what runs a compressed matrix in its place: a linear's, the embedding's, or that of embedding and head."""
    model, name = skeleton.model, skeleton.family.memory_name(disk_name)
    bias = checkpoint.tensor(disk_name + ".bias").to(target) if disk_name + ".bias" in checkpoint.tensors else None
    tensors = {part: tensor.to(target) for part, tensor in checkpoint.parts(disk_name).items()}
    scheme = checkpoint.schemes[disk_name]
    place, old = name, model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        model.set_submodule(name, StoredEmbedding(old, looked_up(tensors, scheme), kind))
        place = "lm_head"
        if skeleton.family.disk_name("lm_head.weight") in checkpoint.tensors:
            return
    model.set_submodule(place, stored_linear(tensors, scheme, bias, kind))


def _tie(model: Any, state: Mapping[str, Tensor], own_head: bool) -> None:
    """Let the head have the embedding's weight, unless it has one of its own, whatever the config says (as transformers
    does); what is stored otherwise has it already."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    plain = isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    if plain and (not own_head or torch.equal(embedding.weight, state["lm_head.weight"])):
        model.tie_weights()


def _without_gaps(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What a head reads of a prompt, `hidden[:, -1:]`, as rows one behind the other.

    Rows with gaps times a weight that wants no gradient are a batched product to torch, for which oneDNN copies the
    weight, the largest of the model.
    """
    (hidden,) = inputs
    return (hidden.flatten(0, -2).contiguous().view(hidden.shape),)


def _cannot_be_saved(*args: Any, **options: Any) -> None:
    raise ModelError(
        "a loaded compressed model is not saved again: copy its folder, or decode it by `compressor export`"
    )


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
    skeleton = Skeleton(open_model(folder))
    beside = skeleton.beside()
    known = {beside.get(name) or skeleton.family.disk_name(name) for name in skeleton.model.state_dict()}
    unexpected = set(skeleton.checkpoint.tensors) - known
    return {"missing_keys": set(), "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}


# `AutoModelForCausalLM.from_pretrained` then understands native folders.
AutoConfig.register(NATIVE.name, CompressorConfig, exist_ok=True)
AutoModelForCausalLM.register(CompressorConfig, CompressorForCausalLM, exist_ok=True)
