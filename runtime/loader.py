"""Load a model folder, plain or compressed, as a transformers model that runs the stored form."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import install_latent_attention
from .errors import ModelError, first_line
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
        modules = dict(model.named_modules())
        for disk_name in checkpoint.schemes:
            module = modules.get(family.memory_name(disk_name))
            if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
                continue  # of a layer that is not run, or something that is no product, which gets it decoded
            try:
                _put_stored(skeleton, checkpoint, disk_name, target, kind)
            except (KeyError, IndexError, ValueError) as error:
                raise ModelError(f"{path}: {disk_name} is not whole ({error})") from None
    state, beside = {}, skeleton.beside()
    for name, tensor in model.state_dict().items():
        lying = (beside[name],) if name in beside else family.lying(name)
        if tensor.is_meta and all(part in checkpoint.tensors for part in lying):
            state[name] = skeleton.held(name, lying, tensor)
    model.load_state_dict(state, assign=True, strict=False)
    _tie(model, state, family.head, family.disk_name(f"{family.head}.weight") in checkpoint.tensors)
    model.get_output_embeddings().register_forward_pre_hook(_without_gaps)
    pack_experts(model)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(f"{path}: {left[0]} is not found in the folder, or lies there in a form that is not read here")
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.path)
    if isinstance(checkpoint, StoredModel):
        install_latent_attention(skeleton)
        model.save_pretrained = _cannot_be_saved
    return model.requires_grad_(False).eval()


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(folder)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            ids = getattr(found, key)
            if not all(isinstance(one, int) for one in (ids if isinstance(ids, list) else [ids]) if one is not None):
                raise ValueError(f"{key} is {reprlib.repr(ids)}")
        return found
    except Exception as error:  # transformers raises whatever its checks do
        told = f"transformers cannot read it ({first_line(error)}); mend it or delete it"
        raise ModelError(f"{folder}/generation_config.json: {told}") from None


def _put_stored(
    skeleton: Skeleton, checkpoint: StoredModel, disk_name: str, target: torch.device, kind: torch.dtype
) -> None:
    """Put what runs a compressed matrix in its place: a linear's, the embedding's, or that of embedding and head."""
    model, name = skeleton.model, skeleton.family.memory_name(disk_name)
    tensors = {part: tensor.to(target) for part, tensor in checkpoint.operator_tensors(disk_name).items()}
    scheme = checkpoint.schemes[disk_name]
    place, old = name, model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        model.set_submodule(name, StoredEmbedding(old, looked_up(tensors, scheme), kind))
        place = skeleton.family.head
        if skeleton.family.disk_name(f"{place}.weight") in checkpoint.tensors:
            return
    own = skeleton.family.disk_name(f"{place}.bias")
    bias = checkpoint.tensor(own).to(target) if own in checkpoint.tensors else None
    model.set_submodule(place, stored_linear(tensors, scheme, bias, kind))


def _tie(model: Any, state: Mapping[str, Tensor], name: str, own_head: bool) -> None:
    """Let the head have the embedding's weight, unless it has one of its own, whatever the config says (as transformers
    does); what is stored otherwise has it already."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    plain = isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    if plain and (not own_head or torch.equal(embedding.weight, state[f"{name}.weight"])):
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
