"""What a model family is, as data: which linears read the same input, in which order, and how disk names differ.

Blocks are `model.layers.<i>.` on disk and in memory for every family here. In memory transformers 5 fuses experts into
three-dimensional parameters; compressor keeps one linear per expert (`runtime/model/experts.py`), named as on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError

Stage = tuple[tuple[str, ...], ...]  # groups of linears; a group shares one input
SHARED = "mlp.shared_experts"  # that every token enters, no coefficient multiplies, and `moe_intermediate_size` widens
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of config.json
QUERIES, KEYS, VALUES = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"  # in memory and on disk
# Parts of a block that end in a linear: once that is final, the rest of the part need not be computed again.
PARTS = {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}

_ATTENTION: tuple[Stage, ...] = (
    ((QUERIES, KEYS, VALUES),),
    (("self_attn.o_proj",),),
)
_MLA: tuple[Stage, ...] = (
    (("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),),
    (("self_attn.q_b_proj",), ("self_attn.kv_b_proj",)),
    (("self_attn.o_proj",),),
)


def _mlp(sparse: str = "mlp") -> tuple[Stage, ...]:
    """`*` stands for each expert; what a block does not have is skipped, so dense and sparse blocks share one list."""
    experts, shared = f"{sparse}.experts.*", [f"{sparse}.shared_expert", f"{sparse}.shared_experts"]
    parts = ["mlp", experts, *shared]
    return tuple((f"{part}.gate_proj", f"{part}.up_proj") for part in parts), tuple(
        (f"{part}.down_proj",) for part in parts
    )


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        stages: groups of linears in execution order; all groups of a stage can be solved once the stages before are.
        disk_segments: name segments in memory → on disk, where they differ (a bijection).
        router, experts: modules of a block, in memory.
        fused: tensors of a block on disk that hold one matrix of every expert → the linears whose rows lie in it, one
            below the other (`runtime/model/disk_experts.py`).
    """

    stages: tuple[Stage, ...]
    disk_segments: Mapping[str, str] = field(default_factory=dict)
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def disk_name(self, name: str) -> str:
        """A tensor or module name of the model in memory → its name in the checkpoint."""
        return ".".join(self.disk_segments.get(segment, segment) for segment in name.split("."))

    def memory_name(self, name: str) -> str:
        """The inverse of `disk_name`."""
        padded = f".{name}."
        for memory, disk in self.disk_segments.items():
            padded = padded.replace(f".{disk}.", f".{memory}.")
        return padded[1:-1]


_STANDARD = Architecture(_ATTENTION + _mlp())
_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _STANDARD,
    "mistral": _STANDARD,
    "qwen2": _STANDARD,
    "qwen3": _STANDARD,
    "qwen2_moe": _STANDARD,
    "qwen3_moe": _STANDARD,
    "olmoe": _STANDARD,
    "glm4_moe": _STANDARD,
    "mixtral": Architecture(_ATTENTION + _mlp(), _MIXTRAL),
    "phimoe": Architecture(_ATTENTION + _mlp(), {**_MIXTRAL, "router": "gate"}, router="mlp.router"),
    "granitemoe": Architecture(
        _ATTENTION + _mlp("block_sparse_moe"),
        {"router": "router.layer"},
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        fused={
            "block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
            "block_sparse_moe.output_linear.weight": ("down_proj",),
        },
    ),
    "deepseek_v2": Architecture(_MLA + _mlp()),
    "deepseek_v3": Architecture(_MLA + _mlp()),
}
_SCALED_INPUTS = (
    "its router scales what enters an expert, not what leaves it, so that no second moment of an expert's inputs can "
    "be weighted as for other families"
)
REFUSED = {
    "gpt_oss": "its experts have biases, an activation of their own, and rows of gate and up in turns (MXFP4 on the "
    "hub), none of which a linear of one expert can say",
    "llama4": _SCALED_INPUTS,
    "llama4_text": _SCALED_INPUTS,
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of a `config.json`.

    Raises:
        ModelError: the family is unknown or refused; the message lists the known ones.
    """
    model_type = config.get("model_type")
    if model_type in REFUSED:
        raise ModelError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"model_type {model_type!r} is not a known family; known: {known}")
    return ARCHITECTURES[model_type]
