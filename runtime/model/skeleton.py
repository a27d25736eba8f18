"""The shape of a model without its weights, from which single blocks are built and run.

transformers' own modules do the arithmetic: a block is run by the family's base model with that block as its only
layer, so masks, sliding windows and rotary embeddings are exactly the family's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ...kernels.dispatch import cpu_capability, products_dtype
from ..errors import ModelError
from .checkpoint import Checkpoint
from .experts import unfuse_experts
from .families import Stage

HEAD_ROWS = 16384  # of the output head, in float32 at a time


def meta_model(config: Any) -> Any:
    """The causal language model of a transformers config on `meta`, experts as separate linears."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises whatever its models do
        raise ModelError(f"config.json: transformers cannot build the model ({error!r})") from None
    unfuse_experts(model)
    return model.eval()


def restore_buffers(model: nn.Module, config: Any, device: torch.device | str = "cpu") -> None:
    """Compute again, on `device`, what checkpoints do not store: the rotary frequencies."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config).to(device))


def model_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint, from the dictionary that was read."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises whatever its config classes do
        raise ModelError(f"{checkpoint.path}/config.json: transformers cannot read it ({error})") from None


def calibration_dtype(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> torch.dtype:
    """What blocks compute in while calibrating: the checkpoint's bfloat16 on GPUs and processors that are fast at it.

    Hidden states and statistics stay float32 in any case.
    """
    if checkpoint.dtype != torch.bfloat16:
        return torch.float32
    return products_dtype(cpu_capability()) if torch.device(device).type == "cpu" else torch.bfloat16


def _without_autocast(router: nn.Module, device: str) -> None:
    """Let a router compute in float32: rounding would send tokens to other experts."""
    forward = router.forward

    def exact(hidden: Tensor) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(hidden.float())

    router.forward = exact


class Skeleton:
    """A checkpoint's model on `meta`, and the means to run it one block at a time on `device`.

    Blocks hold their weights in `dtype`; with bfloat16 they run under autocast, so that the residual stream and the
    norms stay float32.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.config = model_config(checkpoint)
        self.dtype = dtype
        self.device = torch.device(device)
        self.model: Any = meta_model(self.config)
        self._check_tensors()

    @property
    def blocks(self) -> int:
        return len(self.model.model.layers)

    def tensor_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What a tensor, by its name in memory, is held in: the family may ask for float32 in any case."""
        if not stored.is_floating_point:
            return stored
        kept = set(self.model._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            kept |= set(self.model._keep_in_fp32_modules or ())
        return torch.float32 if kept.intersection(name.split(".")) else self.dtype

    def _check_tensors(self) -> None:
        """Refuse a checkpoint that lacks a tensor of the model; what it has besides is carried along."""
        expected = {
            self.architecture.disk_name(name): tuple(tensor.shape) for name, tensor in self.model.state_dict().items()
        }
        where = self.checkpoint.path
        if self.config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        for name, shape in expected.items():
            if name not in self.checkpoint.tensors:
                raise ModelError(f"{where}: {name} is missing, which {self.config.model_type} needs; is it all there?")
            if self.checkpoint.tensors[name].shape != shape:
                found = list(self.checkpoint.tensors[name].shape)
                raise ModelError(f"{where}: {name} has shape {found}, config.json says {list(shape)}")

    def disk_name(self, index: int, name: str) -> str:
        """A name inside block `index` in memory → its name in the checkpoint."""
        return self.architecture.disk_name(f"model.layers.{index}.{name}")

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Disk name (without `.weight`) → meta linear, for every linear that a block's stages name."""
        return {
            self.disk_name(index, name): self.model.model.layers[index].get_submodule(name)
            for stage in self.stages(index)
            for group in stage
            for name in group
        }

    def stages(self, index: int) -> list[Stage]:
        """The block's groups of linears in execution order, `*` written out, absent ones left out (memory names)."""
        present = {
            name for name, module in self.model.model.layers[index].named_modules() if isinstance(module, nn.Linear)
        }
        prefix = self.architecture.experts + "."
        experts = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in present if name.startswith(prefix)})
        stages = []
        for stage in self.architecture.stages:
            groups: list[tuple[str, ...]] = []
            for group in stage:
                numbers: list[int | str] = list(experts) if "*" in group[0] else [""]
                groups += [tuple(name.replace("*", str(number)) for name in group) for number in numbers]
            kept = [tuple(name for name in group if name in present) for group in groups]
            if any(kept):
                stages.append(tuple(group for group in kept if group))
        return stages

    def block(self, index: int) -> Any:
        """Block `index` with its weights."""
        layer = copy.deepcopy(self.model.model.layers[index])
        state = {name: self.checkpoint.tensor(self.disk_name(index, name)) for name in layer.state_dict()}
        state = {name: tensor.to(self.device, self.tensor_dtype(name, tensor.dtype)) for name, tensor in state.items()}
        layer.load_state_dict(state, assign=True)
        for module in layer.modules():
            if isinstance(module, nn.LayerNorm):  # unlike the families' own norms, it takes no mixture of dtypes
                module.float()
        router = self.architecture.router
        if any(name.startswith(router + ".") for name in state):
            _without_autocast(layer.get_submodule(router).float(), self.device.type)
        return layer.requires_grad_(False)

    def router(self, index: int, numbers: Sequence[int]) -> Any:
        """The router of a block as if it had some experts only: hidden states `[tokens, hidden_size]` → logits,
        coefficients `[tokens, top_k]`, and indices into `numbers`."""
        where = self.architecture.router
        router = copy.deepcopy(self.model.model.layers[index].get_submodule(where))
        for name, old in router.state_dict(keep_vars=True).items():
            stored = self.checkpoint.tensor(self.disk_name(index, f"{where}.{name}"))
            tensor = stored.to(self.device, torch.float32)[list(numbers)]
            setattr(router, name, nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor)
        router.num_experts = len(numbers)
        return router.requires_grad_(False)

    def block_like(self, index: int, block: nn.Module) -> Any:
        """A second module of the same block that shares the weights of the first until they are replaced."""
        layer = copy.deepcopy(self.model.model.layers[index])
        layer.load_state_dict(block.state_dict(), assign=True)
        return layer.requires_grad_(False)

    def runner(self, index: int, block: nn.Module) -> Any:
        """A base model whose only layer is `block`: call it with `inputs_embeds`, read `last_hidden_state`."""
        base = copy.copy(self.model.model)
        base._modules = dict(base._modules)
        base.config = copy.copy(self.config)
        base.config.num_hidden_layers = 1
        if getattr(self.config, "layer_types", None):
            base.config.layer_types = [self.config.layer_types[index]]
        base.layers = nn.ModuleList([block])
        base.norm = nn.Identity()
        base.embed_tokens = None
        if hasattr(base, "embedding_multiplier"):  # what enters a block is multiplied already
            base.embedding_multiplier = 1.0
        restore_buffers(base, self.config, self.device)
        return base

    def forward(self, runner: Any, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, tokens, hidden_size]` through a runner's block."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return runner(inputs_embeds=hidden.to(self.device), use_cache=False).last_hidden_state.float()

    @torch.no_grad()
    def run(self, runner: Any, hidden: Tensor) -> Tensor:
        """`forward` where no gradient is wanted."""
        return self.forward(runner, hidden)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """What leaves the last block → float32 `[..., vocab_size]`; the head is converted a part at a time."""
        norm = copy.deepcopy(self.model.model.norm)
        norm.load_state_dict({name: self._float(f"model.norm.{name}") for name in norm.state_dict()}, assign=True)
        normed = norm(hidden.to(self.device).float())
        own = "lm_head.weight" in self.checkpoint.tensors
        head = self.checkpoint.tensor("lm_head.weight" if own else "model.embed_tokens.weight")
        parts = (nn.functional.linear(normed, part.to(self.device, torch.float32)) for part in head.split(HEAD_ROWS))
        logits = torch.cat(list(parts), -1)
        if "lm_head.bias" in self.checkpoint.tensors:
            logits += self._float("lm_head.bias")
        return logits / getattr(self.config, "logits_scaling", 1.0)

    def _float(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self.architecture.disk_name(name)).to(self.device, torch.float32)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[batch, tokens]` → what enters block 0, `[batch, tokens, hidden_size]`."""
        table = self.checkpoint.tensor(self.architecture.disk_name("model.embed_tokens.weight"))
        embedded = nn.functional.embedding(ids, table).to(self.device, torch.float32)
        return embedded * getattr(self.config, "embedding_multiplier", 1.0)
