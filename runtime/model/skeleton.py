"""The shape of a model without its weights, from which single blocks are built and run.

transformers' own modules do the arithmetic: a block is run by the family's decoder with that block as its only layer:
masks, windows and rotary embeddings are exactly the family's. What lies before the first block and behind the last one
is the family's own model with no layers at all.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...kernels.dispatch import cpu_capability, products_dtype
from ..errors import ModelError, first_line
from ..schemes import Operator
from .checkpoint import Checkpoint
from .experts import plain_linears, unfuse_experts
from .families import BLOCKS, Group, Stage, starred
from .parts import HEAD_ROWS, Head, Zero, compute_buffers, set_layer_types, without_autocast
from .trace import is_norm
from .wide import Wide


def meta_model(checkpoint: Checkpoint) -> Any:
    """The language model of a checkpoint on `meta`, experts as separate linears, with all parts around it."""
    model = stock_model(model_config(checkpoint), checkpoint.path / "config.json", torch.float32)
    unfuse_experts(model)
    plain_linears(model)
    return model.eval()


def stock_model(config: Any, file: Path, dtype: torch.dtype) -> Any:
    """The model of a config on `meta`, as transformers has it.

    Args:
        file: that the config is from.
    """
    plain = config.get_text_config() is config
    try:
        with torch.device("meta"):
            kind = AutoModelForCausalLM if plain else AutoModelForImageTextToText
            return kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its models do
        raise ModelError(f"{file}: transformers cannot build the model ({first_line(error)})") from None


def model_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint, from the dictionary that was read."""
    return config_of(checkpoint.config, checkpoint.path / "config.json")


def config_of(content: Mapping[str, Any], file: Path) -> Any:
    """The transformers config that a `config.json` says, but for how weights are stored."""
    config = {key: value for key, value in content.items() if key != "quantization_config"}
    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        return kind.from_dict(kind._decode_special_floats(config))  # as infinities are written
    except KeyError:
        told = f"model_type {config.get('model_type')!r} is not a family that transformers knows"
        raise ModelError(f"{file}: {told}") from None
    except Exception as error:  # transformers raises whatever its config classes do
        raise ModelError(f"{file}: transformers cannot read it ({first_line(error)})") from None


def calibration_dtype(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> torch.dtype:
    """What blocks compute in while calibrating: the checkpoint's bfloat16 on GPUs and processors that are fast at it.

    Hidden states and statistics stay float32 in any case.
    """
    if checkpoint.dtype != torch.bfloat16:
        return torch.float32
    return products_dtype(cpu_capability()) if torch.device(device).type == "cpu" else torch.bfloat16


class Skeleton:
    """A checkpoint's model on `meta`, and the means to run it one block at a time on `device`.

    Blocks hold their weights in `dtype`; with bfloat16 they run under autocast, so that the residual stream and the
    norms stay float32.

    Attributes:
        config: the transformers config of the language model.
        model: the whole model; `decoder` is the part of it that has the blocks.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.dtype = dtype
        self.device = torch.device(device)
        checkpoint.block_names()  # of which no number is built that is not there
        self.model: Any = meta_model(checkpoint)
        self.config = self.model.config.get_text_config()
        self._check_routing()
        self._check_tensors()
        compute_buffers(self.model, self.device)  # once it is known that they are no larger than the weights say

    def _check_routing(self) -> None:
        """
        Raises:
            ModelError: a token would go to more experts than there are, or to none.
        """
        experts = self.family.experts
        found = (getattr(self.config, name, None) for name in experts.counts)
        counts = [count for count in found if isinstance(count, int) and count > 0]
        chosen = getattr(self.config, experts.top_k, None)
        if counts and chosen is not None and not (isinstance(chosen, int) and 0 < chosen <= max(counts)):
            said = f"{experts.top_k} is {reprlib.repr(chosen)}, of {max(counts)} experts"
            raise ModelError(f"{self.checkpoint.path}/config.json: {said}")

    @cached_property
    def decoder(self) -> Any:
        return self.model.get_submodule(self.family.decoder)

    @cached_property
    def wide(self) -> Wide | None:
        """How blocks are run that get more than hidden states."""
        return Wide(self) if self.family.wide else None

    @property
    def width(self) -> int:
        """Numbers that go over blocks with each token: a hidden state, mostly no more."""
        return int(self.config.hidden_size) if self.wide is None else self.wide.width

    def stream(self, row: Tensor) -> Tensor:
        """The residual stream in `[..., width]`."""
        return row if self.wide is None else row[..., : self.wide.streams]

    @property
    def layers(self) -> Any:
        """The blocks on `meta`."""
        return self.decoder.get_submodule(self.family.layers)

    @property
    def copies(self) -> bool:
        """Whether a block's weights take memory of their own: elsewhere they are pages of the checkpoint's files."""
        return self.dtype != self.checkpoint.dtype or self.device.type != "cpu" or self.checkpoint.anew

    @property
    def blocks(self) -> int:
        return len(self.layers)

    @property
    def experts_per_token(self) -> int:
        """How many routed experts a token goes to."""
        return int(getattr(self.config, self.family.experts.top_k))

    @property
    def tied(self) -> bool:
        """Whether config.json says that the head is the embedding."""
        return bool(self.model.config.tie_word_embeddings or self.config.tie_word_embeddings)

    @property
    def residual_scale(self) -> float:
        """The factor on what attention and MLP add to the residual stream."""
        return float(getattr(self.config, self.family.residual)) if self.family.residual else 1.0

    def tensor_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What a tensor, by its name in memory, is held in: the family may ask for float32 in any case."""
        if not stored.is_floating_point:
            return stored
        kept = set(self.model._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            kept |= set(self.model._keep_in_fp32_modules or ())
        return torch.float32 if kept.intersection(name.split(".")) else self.dtype

    def held(self, name: str, lying: Sequence[str], like: Tensor) -> Tensor:
        """A tensor of the checkpoint as the model holds it in place of one on `meta`.

        Args:
            name: in memory.
            lying: of what it is made on disk, `Family.lying`.

        Raises:
            ModelError: it is of integers where the model has numbers.
        """
        parts = [self.checkpoint.tensor(part) for part in lying]
        stored = parts[0] if len(parts) == 1 else torch.cat(parts)
        if like.is_floating_point() and not stored.is_floating_point():
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(f"{self.checkpoint.path}: {lying[0]} is of {kind}, and no floating-point numbers")
        return stored.to(self.device, self.tensor_dtype(name, stored.dtype))

    def _check_tensors(self) -> None:
        """Refuse a checkpoint that lacks a tensor of the language model; what it has besides is carried along."""
        own = tuple(f"{place}." for place in self.family.places)
        head, where, tensors = f"{self.family.head}.weight", self.checkpoint.path, self.checkpoint.tensors
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(own) or (self.tied and name == head):
                continue
            lying = self.family.lying(name)
            if lost := [part for part in lying if part not in tensors]:
                needs = f"{lost[0]} is missing, which {self.config.model_type} needs"
                raise ModelError(f"{where}: {needs}; is it all there?")
            shapes = [tensors[part].shape for part in lying]
            found = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if found != tuple(tensor.shape):
                told = " and ".join(lying)
                raise ModelError(f"{where}: {told} has shape {list(found)}, config.json says {list(tensor.shape)}")

    def beside(self) -> dict[str, str]:
        """Name in memory → on disk, of every tensor that is not the language model's, by transformers' own renaming."""
        own = tuple(f"{place}." for place in self.family.places.values())
        names = [name for name in self.checkpoint.tensors if not name.startswith(own)]
        if not names or self.model.base_model is self.decoder:
            return {}
        from transformers.conversion_mapping import get_model_conversion_mapping  # slow to import, and rarely wanted
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [rule for rule in get_model_conversion_mapping(self.model) if isinstance(rule, WeightRenaming)]
        known, prefix = self.model.state_dict(), self.model.base_model_prefix
        return {rename_source_key(name, renamings, [], prefix, known)[0]: name for name in names}

    def disk_name(self, index: int, name: str) -> str:
        """A name inside block `index` in memory → its name in the checkpoint."""
        found = self.family.disk_name(f"{self.family.decoder}.{self.family.layers}.{index}.{name}")
        return found if index < self.blocks else self.checkpoint.lying(found)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Disk name (without `.weight`) → meta linear, for every linear that a block's stages name."""
        return {
            self.disk_name(index, name): self.layers[index].get_submodule(name)
            for stage in self.stages(index)
            for group in stage
            for name in group.linears
        }

    def outer(self) -> dict[str, bool]:
        """Disk name (without `.weight`) of the embedding and, where it has a matrix of its own, of the output head →
        whether its rows are looked up, not multiplied."""
        names = {self.decoder_name(self.family.embedding): True, self.family.disk_name(self.family.head): False}
        return {name: rows for name, rows in names.items() if f"{name}.weight" in self.checkpoint.tensors}

    def stages(self, index: int) -> list[Stage]:
        """The block's groups of linears in execution order, `*` written out, absent ones left out (memory names)."""
        modules = dict(self.layers[index].named_modules())
        present = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        experts = sorted({number for name in present if (number := self.family.experts.number(name)) is not None})
        stages = []
        for stage in self._of_one_block(present):
            groups: list[Group] = []
            for group in stage:
                numbers = [str(number) for number in experts] if "*" in group.linears[0] else [""]
                for digits in numbers:
                    names = [name.replace("*", digits) for name in group.linears]
                    kept = tuple(name for name in names if name in present)
                    reads = group.reads.replace("*", digits)
                    if kept:
                        beside = tuple(name for name in group.beside if name in present)
                        groups.append(Group(kept, reads if reads in modules else "", beside))
            if groups:
                stages.append(tuple(groups))
        return stages

    def _of_one_block(self, present: Collection[str]) -> list[Stage]:
        """The family's stages without linears, of groups that the block has in part, that it has in a whole one."""
        stars = {starred(name) for name in present}
        groups = [group for stage in self.family.stages for group in stage]
        whole = {name for group in groups if stars.issuperset(group.linears) for name in group.linears}

        def left(group: Group) -> Group:
            if stars.issuperset(group.linears):
                return group
            return replace(group, linears=tuple(name for name in group.linears if name not in whole))

        cut = [tuple(left(group) for group in stage) for stage in self.family.stages]
        return [tuple(group for group in stage if group.linears) for stage in cut]

    def unnamed(self, index: int) -> list[str]:
        """Disk names of the block's matrices that no group names, so that no pass can rewrite them; those of routers
        and of what weighs shared experts, which stay as they are, are not among them."""
        experts = self.family.experts
        exempt = tuple(f"{name}." for name in (experts.router, *experts.gates))
        named = set(self.linears(index))
        matrices = [
            self.disk_name(index, name.removesuffix(".weight"))
            for name, tensor in self.layers[index].state_dict().items()
            if tensor.dim() == 2 and not name.startswith(exempt)
        ]
        return [name for name in matrices if name not in named]

    def block(self, index: int, like: int | None = None, without: Container[str] = ()) -> Any:
        """Block `index` with its weights.

        Args:
            like: a block of which it is another one, where the model has none of this number.
            without: tensors inside it that stay on `meta`, for others to take their place.
        """
        layer = copy.deepcopy(self.layers[index if like is None else like])
        wanted = layer.state_dict()
        place = f"{self.family.decoder}.{self.family.layers}.{index}"
        lying = {name: map(self.checkpoint.lying, self.family.lying(f"{place}.{name}")) for name in wanted}
        state = {name: self.held(name, tuple(lying[name]), t) for name, t in wanted.items() if name not in without}
        layer.load_state_dict(state, strict=not without, assign=True)
        for module in layer.modules():
            if isinstance(module, nn.LayerNorm):  # unlike the families' own norms, it takes no mixture of dtypes
                module.float()
        return self._exact_router(layer)

    def _exact_router(self, layer: nn.Module) -> Any:
        router = self.family.experts.router
        if router in dict(layer.named_modules()):
            without_autocast(layer.get_submodule(router).float(), self.device.type)
        return layer.requires_grad_(False)

    def router(self, index: int, numbers: Sequence[int]) -> Any:
        """The router of a block as if it had some experts only: hidden states `[tokens, hidden_size]` → logits,
        coefficients `[tokens, top_k]`, and indices into `numbers`."""
        where = self.family.experts.router
        router = copy.deepcopy(self.layers[index].get_submodule(where))
        count = len(self.layers[index].get_submodule(self.family.experts.where))
        for name, old in router.state_dict(keep_vars=True).items():
            stored = self.checkpoint.tensor(self.disk_name(index, f"{where}.{name}"))
            tensor = stored.to(self.device, torch.float32)
            if len(tensor) == count:
                tensor = tensor[list(numbers)]
            place, _, leaf = name.rpartition(".")
            part = nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor
            setattr(router.get_submodule(place), leaf, part)
        router.num_experts = len(numbers)
        return router.requires_grad_(False)

    def block_like(self, index: int, block: nn.Module) -> Any:
        """A second module of the same block that shares the weights of the first until they are replaced."""
        layer = copy.deepcopy(self.layers[index])
        layer.load_state_dict(block.state_dict(), assign=True)
        return self._exact_router(layer)

    def runner(self, index: int, block: nn.Module, *, compressed: bool = False) -> Any:
        """A decoder whose only layer is `block`: call it with `inputs_embeds`, read `last_hidden_state`.

        Args:
            compressed: whether it is for the chain that follows what passes make of the model.
        """
        runner = self.runner_of([block]) if self.wide is None else self.wide.runner(index, block, compressed)
        if getattr(self.config, "layer_types", None):
            set_layer_types(runner.config, [self.config.layer_types[index]])
        return runner

    def runner_of(self, blocks: Sequence[nn.Module]) -> Any:
        """The decoder with other blocks, without its embedding and its final norm; what is given to it as
        `inputs_embeds` enters the first block as it is."""
        decoder, family = copy.copy(self.decoder), self.family
        own = {family.embedding, family.norm, family.layers}
        decoder._modules = {
            name: module if name in own else copy.deepcopy(module) for name, module in self.decoder._modules.items()
        }
        setattr(decoder, family.embedding, None)
        decoder.config = copy.copy(self.config)
        decoder.config.num_hidden_layers = len(blocks)
        for name in {family.layers, BLOCKS}:  # by which what runs a block finds it
            setattr(decoder, name, nn.ModuleList(blocks))
        setattr(decoder, family.norm, nn.Identity())
        if family.entry:  # what enters a block is multiplied already
            setattr(decoder, family.entry, 1.0)
        for name in family.entrance:
            setattr(decoder, name, nn.Identity() if is_norm(getattr(self.decoder, name)) else Zero())
        return decoder

    def forward(self, runner: Any, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, tokens, width]` through a runner's block."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.wide is not None:
                return self.wide.through(runner, hidden)
            return runner(inputs_embeds=hidden.to(self.device), use_cache=False).last_hidden_state.float()

    @torch.no_grad()
    def run(self, runner: Any, hidden: Tensor) -> Tensor:
        """`forward` where no gradient is wanted."""
        return self.forward(runner, hidden)

    @torch.no_grad()
    def embed(self, ids: Tensor, stored: Operator | None = None) -> Tensor:
        """Token ids `[batch, tokens]` → what enters block 0, float32 `[batch, tokens, width]`.

        Args:
            stored: the embedding `[vocab_size, hidden_size]`, where it is another than the checkpoint's.
        """
        if self.wide is not None:
            return self.wide.enter(ids, stored)
        found, places = ids.unique(return_inverse=True)
        decoder = self.runner_of([])
        setattr(decoder, self.family.embedding, self.table(self.family.embedding, found, stored))
        if self.family.entry:
            setattr(decoder, self.family.entry, getattr(self.decoder, self.family.entry))
        for place in self.family.entrance:
            setattr(decoder, place, self.outer_part(place))
        entered: Tensor = decoder(input_ids=places.to(self.device), use_cache=False).last_hidden_state
        return entered

    def table(self, place: str, which: Tensor, stored: Operator | None = None) -> nn.Module:
        """A table of the decoder that ids are looked up in, of some of its rows, in float32.

        Args:
            stored: the table, where it is another than the checkpoint's.
        """
        table: Any = copy.deepcopy(self.decoder.get_submodule(place))
        table.padding_idx = None
        if stored is None:
            rows = self.checkpoint.rows(self.decoder_name(f"{place}.weight"), which.cpu())
        else:
            rows = stored.rows(which.to(self.device)).dense()
        table.weight = nn.Parameter(rows.to(self.device, torch.float32), requires_grad=False)
        return table

    def logits(self, hidden: Tensor) -> Tensor:
        """What leaves the last block → float32 `[..., vocab_size]`; the head is converted a part at a time."""
        return self.answers()(hidden)

    def answers(self, table: Tensor | None = None, *, graph: bool = False) -> Callable[[Tensor], Tensor]:
        """`logits` for many calls; a head that is stored in another form is decoded once, and held.

        Args:
            table: `[vocab_size, hidden_size]`, in place of the head's.
            graph: whether gradients of hidden states may be asked for.
        """
        norm = self.outer_part(self.family.norm)
        if self.wide is None:
            decoder = self.runner_of([])
            setattr(decoder, self.family.norm, norm)
        else:
            decoder = self.wide.leaving(norm)
        head = self._head(table)
        whole = self._causal(decoder, head)

        def answer(hidden: Tensor) -> Tensor:
            with torch.set_grad_enabled(graph):
                batched = hidden.to(self.device, torch.float32).reshape(1, -1, hidden.shape[-1])
                if whole is None:
                    logits = head(decoder(inputs_embeds=batched, use_cache=False).last_hidden_state)
                else:
                    logits = whole(inputs_embeds=batched, use_cache=False).logits
                return logits.reshape(*hidden.shape[:-1], -1)

        return answer

    def _causal(self, decoder: nn.Module, head: nn.Module) -> Any:
        """The model whose code says what follows its decoder, with another one; None where only the head does."""
        if self.model.base_model is self.decoder:
            whole, place = copy.copy(self.model), self.family.decoder
        elif self.model.config is self.config:
            return None
        else:  # beside other parts, the language model answers as it would alone
            try:
                with torch.device("meta"):
                    whole = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
            except ValueError:  # it is never alone
                return None
            place = whole.base_model_prefix
        whole._modules = {**whole._modules, place: decoder, self.family.head: head}
        return whole

    def outer_part(self, place: str) -> nn.Module:
        """A part of the decoder beside its blocks, in float32."""
        part: nn.Module = copy.deepcopy(self.decoder.get_submodule(place))
        state = {name: self.checkpoint.tensor(self.decoder_name(f"{place}.{name}")) for name in part.state_dict()}
        part.load_state_dict({name: t.to(self.device, torch.float32) for name, t in state.items()}, assign=True)
        return part

    def head_table(self) -> str:
        """The tensor that the output head multiplies by: its own, or the embedding's."""
        own = self.family.disk_name(f"{self.family.head}.weight")
        return own if own in self.checkpoint.tensors else self.decoder_name(f"{self.family.embedding}.weight")

    def _head(self, changed: Tensor | None = None) -> Head:
        tensors = self.checkpoint.tensors
        bias, table = self.family.disk_name(f"{self.family.head}.bias"), self.head_table()
        own = self.checkpoint.tensor(bias) if bias in tensors else None
        if changed is not None:
            return Head(changed, own, self.device)
        if not self.checkpoint.by_rows(table):
            return Head(self.checkpoint.tensor(table), own, self.device)
        decoded = torch.empty(tensors[table].shape, dtype=tensors[table].dtype)
        for part in torch.arange(len(decoded)).split(HEAD_ROWS):
            decoded[part] = self.checkpoint.rows(table, part).to(decoded.dtype)
        return Head(decoded, own, self.device)

    def decoder_name(self, name: str) -> str:
        """A name inside the decoder in memory → its name in the checkpoint."""
        return self.family.disk_name(f"{self.family.decoder}.{name}")
