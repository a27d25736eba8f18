"""What a model family is, as data: which linears read the same input, in which order, and how disk names differ.

Blocks are `model.layers.<i>.` on disk and in memory for every family here. In memory transformers 5 fuses experts into
three-dimensional parameters; compressor keeps one linear per expert (`runtime/experts.py`), named as on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ModelError

Stage = tuple[tuple[str, ...], ...]  # groups of linears; a group shares one input
# Parts of a block that end in a linear: once that is final, the rest of the part need not be computed again.
ROUTER, EXPERTS = "mlp.gate", "mlp.experts"  # in memory, in every family
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of config.json
QUERIES, KEYS, VALUES = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"  # in memory and on disk
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
# `*` stands for each expert; names a block does not have are skipped, so dense and sparse blocks share one list.
_MLP: tuple[Stage, ...] = (
    (
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ),
    (
        ("mlp.down_proj",),
        ("mlp.experts.*.down_proj",),
        ("mlp.shared_expert.down_proj",),
        ("mlp.shared_experts.down_proj",),
    ),
)


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        stages: groups of linears in execution order; all groups of a stage can be solved once the stages before are.
        disk_segments: name segments in memory → on disk, where they differ (a bijection).
    """

    stages: tuple[Stage, ...]
    disk_segments: Mapping[str, str] = field(default_factory=dict)

    def disk_name(self, name: str) -> str:
        """A tensor or module name of the model in memory → its name in the checkpoint."""
        return ".".join(self.disk_segments.get(segment, segment) for segment in name.split("."))

    def memory_name(self, name: str) -> str:
        """The inverse of `disk_name`."""
        inverse = {disk: memory for memory, disk in self.disk_segments.items()}
        return ".".join(inverse.get(segment, segment) for segment in name.split("."))


_STANDARD = Architecture(_ATTENTION + _MLP)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _STANDARD,
    "mistral": _STANDARD,
    "qwen2": _STANDARD,
    "qwen3": _STANDARD,
    "qwen2_moe": _STANDARD,
    "qwen3_moe": _STANDARD,
    "olmoe": _STANDARD,
    "mixtral": Architecture(
        _ATTENTION + _MLP,
        {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "deepseek_v2": Architecture(_MLA + _MLP),
    "deepseek_v3": Architecture(_MLA + _MLP),
}
REFUSED = {"gpt_oss": "its experts are stored fused and interleaved (MXFP4 on the hub), which no pass handles yet"}


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
