"""What a model family is, as data; nothing outside this file names one.

Names are those that modules of a block have in memory (`self_attn.q_proj`). In memory transformers 5 fuses experts into
three-dimensional parameters; compressor keeps one linear per expert (`experts.py`), named as on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ..errors import ModelError

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
BLOCKS = "layers"  # of a decoder, in memory and on disk
APART = "mtp."  # on disk, of what predicts a token further ahead where that is no layer behind the last one
_TEXT = "text_config"  # of a config.json whose model has other parts than the language model
_TOWER = "model.language_model"  # where that is in memory
# Where the language model lies on disk: its decoder and its head, for plain models and for those with other parts.
_PLAIN = {"model": "model", "lm_head": "lm_head"}
_TOWERS = (
    {_TOWER: "model.language_model", "lm_head": "lm_head"},
    {_TOWER: "language_model.model", "lm_head": "language_model.lm_head"},
    {_TOWER: "model", "lm_head": "lm_head"},
)


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input; `*` in a name stands for each expert.

    Attributes:
        linears: their names.
        reads: the norm whose output they read; or the linear, in whose last rows what they read is linear: values for
            the output projection, the upper projection for the lower one. Empty where it is neither, so that no scale
            can be moved across.
        beside: linears that read the same and stay as they are.
    """

    linears: tuple[str, ...]
    reads: str = ""
    beside: tuple[str, ...] = ()


Stage = tuple[Group, ...]  # groups that can be solved once the stages before are final


@dataclass(frozen=True)
class ExpertGroups:
    """How a router chooses among groups of experts before it chooses experts.

    Attributes:
        count: groups of equal size; 1 where there are none.
        chosen: groups to which a token may go.
        compared: experts of a group by which groups are compared.
    """

    count: int
    chosen: int
    compared: int


@dataclass(frozen=True)
class Mixture:
    """Where a family's experts are.

    Attributes:
        where, router: modules of a block.
        gates: modules that weigh shared experts, one number a token.
        shared: experts that every token enters, no coefficient multiplies, and `width` widens.
        rows: tensors beside the router's that have a row, or a number, for each expert.
        counts: keys of config.json that say how many experts there are; `also` is a name that older readers look for.
        width: the key that says how many neurons an expert has.
        top_k: the key that says how many experts a token goes to.
        fused: tensors of a block on disk that hold one matrix (or, where their names end in `_bias`, the biases) of
            every expert → the linears whose rows lie in it (`disk_experts.py`), one below the other.
        transposed: whether these matrices are `[in, out]` there.
        interleaved: whether rows of two linears come in turns there.
        scaled: whether coefficients multiply what enters an expert, not what leaves it.
    """

    where: str = "mlp.experts"
    router: str = "mlp.gate"
    gates: tuple[str, ...] = ("mlp.shared_expert_gate",)
    shared: str = "mlp.shared_experts"
    rows: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    also: tuple[str, ...] = ()
    width: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: bool = False
    interleaved: bool = False
    scaled: bool = False

    def number(self, name: str) -> int | None:
        """The routed expert that a linear belongs to, if it does."""
        inside = name.removeprefix(self.where + ".")
        return int(inside.split(".")[0]) if inside != name else None

    def groups(self, config: Any) -> ExpertGroups:
        """Those of a transformers config."""
        method = getattr(config, "topk_method", None)
        count = 1 if method == "greedy" else getattr(config, "n_group", None) or 1
        return ExpertGroups(
            count, getattr(config, "topk_group", None) or 1, 1 if method == "group_limited_greedy" else 2
        )


def _always(attention: Any) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        stages: groups of linears in execution order.
        experts: where experts are, in blocks that have any.
        attention: the module of a block that mixes tokens, and returns its weights beside its output.
        keys, values: projections whose outputs are cached; empty where something else is.
        ends: parts of a block that end in a linear: once that is final, the rest of the part is not computed again.
        segments: segments of names in memory → on disk, where they differ (a bijection); several may be joined by
            dots, and `*` stands for a number.
        transposed: linears (`*` for numbers) whose weights are `[in, out]` in plain folders.
        joined: ends of names → those of the tensors on disk that lie below one another in one in memory.
        places: prefixes of names in memory → on disk, of the decoder and of the head; empty for a decoder alone.
        layers, embedding, norm: attributes of the decoder: the list of its blocks, what is in front of the first, and
            what is behind the last.
        offset_norms: whether norms multiply by one more than their weight.
        centered: whether norms of the residual stream subtract the mean.
        residual: the key of the config with the factor on what attention and MLP add; empty for none.
        entry: the decoder's attribute with the factor on what enters the first block; empty for none.
        entrance: further attributes of the decoder that only what enters the first block goes through: positions that
            are added, a norm of the embedding.
        wide: whether blocks get more than hidden states (`wide.py`).
        rotates: whether an attention module turns queries and keys by their position.
        turns: whether rotations can be folded into it.
        rebuilt: whether transformers builds it with linears that have no weights of their own, as those in few bits.
        found: whether it was found by running it (`probe.py`), so that nobody tried it with other engines.
    """

    stages: tuple[Stage, ...]
    experts: Mixture = Mixture()
    attention: str = "self_attn"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    ends: Mapping[str, str] = field(default_factory=lambda: {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"})
    segments: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=lambda: _PLAIN)
    layers: str = BLOCKS
    embedding: str = "embed_tokens"
    norm: str = "norm"
    offset_norms: bool = False
    centered: bool = False
    residual: str = ""
    entry: str = ""
    entrance: tuple[str, ...] = ()
    wide: bool = False
    rotates: Callable[[Any], bool] = _always
    turns: bool = True
    rebuilt: bool = True
    found: bool = False

    @property
    def decoder(self) -> str:
        """The decoder in memory."""
        return next(iter(self.places))

    @property
    def head(self) -> str:
        """The output head in memory."""
        return list(self.places)[1]

    @property
    def blocks(self) -> str:
        """What the names of all blocks start with on disk."""
        return f"{self.places[self.decoder]}.{self.layers}.".removeprefix(".")

    def disk_name(self, name: str) -> str:
        """A tensor or module name of the model in memory → its name in the checkpoint."""
        return renamed(self.placed(name), self.segments)

    def lying(self, name: str) -> tuple[str, ...]:
        """A tensor's name in memory → those in the checkpoint of what lies below one another in it: one, mostly."""
        disk = self.disk_name(name)
        for end, parts in self.joined.items():
            if disk.endswith(f".{end}"):
                return tuple(disk.removesuffix(end) + part for part in parts)
        return (disk,)

    def placed(self, name: str) -> str:
        """A name in memory with the place that it has on disk."""
        for memory, disk in self.places.items():
            if f"{name}.".startswith(memory + "."):
                return (disk + name.removeprefix(memory)).removeprefix(".")
        return name

    def memory_name(self, name: str) -> str:
        """The inverse of `disk_name`."""
        name = renamed(name, {disk: memory for memory, disk in self.segments.items()})
        for memory, disk in self.places.items():
            if disk and f"{name}.".startswith(disk + "."):
                return memory + name.removeprefix(disk)
        bare = not self.places[self.decoder]
        return f"{self.decoder}.{name}" if bare else name

    def expert(self, name: str) -> int | None:
        """The number of the routed expert that a linear of a block, named as on disk, is part of; None for others."""
        return self.experts.number(self.inside(name))

    def split(self, name: str) -> int | None:
        """The dimension of a linear, named as inside a block, that engines share out among GPUs.

        Returns:
            1, its columns, of what ends attention or an MLP; None of what a norm within attention reads, which every
            GPU has whole; else 0.
        """
        name = starred(name)
        reads = {one: group.reads for stage in self.stages for group in stage for one in group.linears}
        if name in self.ends.values() or (reads.get(name) and "norm" not in reads[name]):
            return 1
        within = {norm.removesuffix("layernorm") for norm in reads.values() if "." in norm and "norm" in norm}
        return None if any(name.startswith(prefix) for prefix in within) else 0

    def inside(self, name: str) -> str:
        """The name that a tensor or module, named as on disk, has inside its block in memory."""
        return self.memory_name(name).removeprefix(f"{self.decoder}.{self.layers}.").split(".", 1)[1]


def starred(name: str) -> str:
    """A name with `*` in place of numbers: of layers, or of experts."""
    return re.sub(r"\.\d+\.", ".*.", name)


def renamed(name: str, segments: Mapping[str, str]) -> str:
    """A name with other segments; the longest that fit count, and what was put in is not renamed again. A `*` in a
    segment stands for a number."""
    if not segments:
        return name

    def other(found: re.Match[str]) -> str:
        if found[0] in segments:
            return segments[found[0]]
        numbers = iter(_NUMBER.findall(found[0]))
        return re.sub(r"\*", lambda star: next(numbers), segments[_NUMBER.sub("*", found[0])])

    return _any_of(tuple(segments)).sub(other, name)


@lru_cache(maxsize=256)
def _any_of(segments: tuple[str, ...]) -> re.Pattern[str]:
    longest = [re.escape(one).replace(r"\*", r"(?:\d+|\*)") for one in sorted(segments, key=len, reverse=True)]
    return re.compile("|".join(rf"(?<![^.]){one}(?![^.])" for one in longest))


def block_index(name: str, blocks: str) -> int | None:
    """The block that a tensor named as on disk belongs to; None for embeddings, the final norm and the head.

    Args:
        blocks: what names of all blocks start with, as `Family.blocks`.
    """
    number, _, rest = name.removeprefix(blocks).partition(".") if name.startswith(blocks) else ("", "", "")
    return int(number) if number.isdigit() and rest else None


def _attention(reads: str = "input_layernorm") -> tuple[Stage, ...]:
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (Group(projections, reads),), (Group(("self_attn.o_proj",), "self_attn.v_proj"),)


def _gated(part: str, reads: str) -> tuple[Group, Group]:
    """A gated MLP's two groups."""
    return (
        Group((f"{part}.gate_proj", f"{part}.up_proj"), reads),
        Group((f"{part}.down_proj",), f"{part}.up_proj"),
    )


def _mlp(reads: str = "post_attention_layernorm", sparse: str = "mlp") -> tuple[Stage, ...]:
    """What a block does not have is skipped, so dense and sparse blocks share one list."""
    shared = [f"{sparse}.shared_expert", f"{sparse}.shared_experts"]
    parts = [_gated(part, reads) for part in ("mlp", f"{sparse}.experts.*", *shared)]
    return tuple(first for first, _ in parts), tuple(second for _, second in parts)


def _rows(*groups: Group) -> tuple[Stage, ...]:
    """Stages of one group each."""
    return tuple((group,) for group in groups)


_MLA = (
    (Group(("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "input_layernorm"),),
    (
        Group(("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
        Group(("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),
    ),
    (Group(("self_attn.o_proj",)),),
)
_FUSED_MLP = _rows(
    Group(("mlp.gate_up_proj",), "post_attention_layernorm"), Group(("mlp.down_proj",), "mlp.gate_up_proj")
)
_STANDARD = Family(_attention() + _mlp())
_POST_NORM = Family(_attention("") + _mlp(""))  # norms follow attention and MLP, so that these read the residual stream
_SANDWICH = Family(_attention() + _mlp("pre_feedforward_layernorm"), offset_norms=True)
_DEEPSEEK = Family(_MLA + _mlp(), keys="", values="")
_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

FAMILIES: dict[str, Family] = {
    "llama": _STANDARD,
    "mistral": _STANDARD,
    "qwen2": _STANDARD,
    "qwen2_5_vl_text": _STANDARD,
    "qwen3": _STANDARD,
    "qwen3_vl_text": _STANDARD,
    "seed_oss": _STANDARD,
    "ernie4_5": _STANDARD,
    "smollm3": replace(_STANDARD, rotates=lambda attention: bool(attention.use_rope)),
    "granite": replace(_STANDARD, residual="residual_multiplier", entry="embedding_multiplier"),
    "olmo2": _POST_NORM,
    "exaone4": replace(
        _POST_NORM, rotates=lambda attention: attention.sliding_window is None or bool(attention.is_sliding)
    ),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "cohere2": Family(
        _attention() + _mlp("input_layernorm"),
        centered=True,
        rotates=lambda attention: attention.sliding_window is not None,
    ),
    "glm4": Family(_attention() + _FUSED_MLP),
    "phi3": Family(
        _rows(Group(("self_attn.qkv_proj",), "input_layernorm"), Group(("self_attn.o_proj",), "self_attn.qkv_proj"))
        + _FUSED_MLP,
        keys="",
        values="",
    ),
    "starcoder2": Family(
        _attention() + _rows(Group(("mlp.c_fc",), "post_attention_layernorm"), Group(("mlp.c_proj",))),
        ends={"self_attn": "self_attn.o_proj", "mlp": "mlp.c_proj"},
        centered=True,
    ),
    "qwen2_moe": _STANDARD,
    "qwen3_moe": replace(_STANDARD, experts=Mixture(also=("num_experts", "num_local_experts"))),
    "olmoe": replace(_STANDARD, experts=Mixture(width="intermediate_size")),
    "glm4_moe": _STANDARD,
    "mixtral": replace(_STANDARD, segments=_MIXTRAL, experts=Mixture(width="intermediate_size")),
    "phimoe": replace(
        _STANDARD,
        segments={**_MIXTRAL, "router": "gate"},
        experts=Mixture(router="mlp.router", width="intermediate_size"),
        centered=True,
    ),
    "granitemoe": Family(
        _attention() + _mlp(sparse="block_sparse_moe"),
        Mixture(
            where="block_sparse_moe.experts",
            router="block_sparse_moe.router",
            width="intermediate_size",
            fused={
                "block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
                "block_sparse_moe.output_linear.weight": ("down_proj",),
            },
        ),
        segments={"router": "router.layer"},
        residual="residual_multiplier",
        entry="embedding_multiplier",
    ),
    "gpt2": Family(
        _rows(
            Group(("attn.c_attn",), "ln_1"),
            Group(("attn.c_proj",), "attn.c_attn"),
            Group(("mlp.c_fc",), "ln_2"),
            Group(("mlp.c_proj",)),
        ),
        attention="attn",
        keys="",
        values="",
        ends={"attn": "attn.c_proj", "mlp": "mlp.c_proj"},
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        places={"transformer": "transformer", "lm_head": "lm_head"},
        layers="h",
        embedding="wte",
        norm="ln_f",
        centered=True,
        entrance=("wpe",),
        rebuilt=False,
        found=True,
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `config.json` says of the language model."""
    return config.get(_TEXT) or config


def with_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that says something else of the language model."""
    if config.get(_TEXT):
        return {**config, _TEXT: {**config[_TEXT], **changes}}
    return {**config, **changes}


def family_of(config: Mapping[str, Any], names: Collection[str], found: Callable[[], Family]) -> Family:
    """The family of a model folder.

    Args:
        config: its `config.json`; of a model that sees or hears, the part that is about its language model counts.
        names: of its tensors, by which it is found where the language model lies.
        found: finds a family that is not described here.

    Raises:
        ModelError: the family is not found.
    """
    model_type = text_config(config).get("model_type")
    family = FAMILIES.get(str(model_type)) or found()
    if config.get(_TEXT):
        return replace(family, places=_places(names))
    first = f"{family.layers}.0."
    if any(name.startswith(first) for name in names) and not any(name.startswith(family.blocks) for name in names):
        family = replace(family, places={**family.places, family.decoder: ""})  # as a decoder is stored alone
    return _as_named(family, names) if family.found else family


def _as_named(family: Family, names: Collection[str]) -> Family:
    """With names that are on disk what they are in memory, though transformers writes others: it reads both."""
    inside = {starred(name) for name in names if name.startswith(family.blocks)}
    kept = {name for name in inside if family.disk_name(family.memory_name(name)) != name}
    same = {name.removeprefix(family.blocks).rpartition(".")[0] for name in kept}
    return replace(family, segments={**family.segments, **{name: name for name in same}})


def _places(names: Collection[str]) -> Mapping[str, str]:
    """Where a language model beside other parts lies on disk."""
    first = f".{BLOCKS}.0."
    for places in _TOWERS:
        if any(name.startswith(places[_TOWER] + first) for name in names):
            return places
    raise ModelError(
        f"the language model of this model is not found: no tensor starts with "
        f"{' or '.join(places[_TOWER] + first for places in _TOWERS)}"
    )


def blocks_of(names: Collection[str]) -> str:
    """What the names of all blocks start with on disk, for a model of whatever family."""
    known = [places[_TOWER] for places in _TOWERS]
    found = (f"{place}.{BLOCKS}." for place in known if any(name.startswith(f"{place}.{BLOCKS}.") for name in names))
    return next(found, f"model.{BLOCKS}.")
