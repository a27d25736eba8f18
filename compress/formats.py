"""What can be written in which format, and who reads it.

One table decides: a scheme that an outside reader takes is written for that reader; what no one else can say is written
natively. Only readers that a test here runs, or whose own documentation or issue tracker says so, are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.layouts import expand24
from ..runtime.errors import RecipeError
from ..runtime.operators import W8A8, Armor, Dense, IntQuantized, Latent, LowRank, Operator, Sparse24, WithResidual

COMPRESSED_TENSORS, NATIVE, PLAIN = "compressed-tensors", "compressor", "dense"
NATIVE_VERSION = 1

# What a native folder holds for transformers to find us by, where its user trusts the code in it: no more than a name.
MODELING_FILE = "modeling_compressor.py"
MODELING = '''"""Opens this folder in transformers with `trust_remote_code=True`, where compressor is installed."""

from compressor.runtime import CompressorConfig, CompressorForCausalLM

__all__ = ["CompressorConfig", "CompressorForCausalLM"]
'''
_AUTO_MAP = {"AutoConfig": "CompressorConfig", "AutoModelForCausalLM": "CompressorForCausalLM"}


@dataclass(frozen=True)
class Readers:
    """Who reads one scheme in compressed-tensors, with the evidence."""

    names: tuple[str, ...]
    evidence: str


def compressed_tensors_readers(operator: Operator) -> Readers | None:
    """Readers of an operator in its own format, or None where no outside reader takes it."""
    if isinstance(operator, W8A8):
        return Readers(("compressor", "transformers", "vLLM"), "tests/test_w8a8.py; vLLM's W8A8 int8 / FP8 schemes")
    if not isinstance(operator, IntQuantized):
        return None
    columns = operator.shape[1]
    if columns % operator.span:
        return None  # compressed-tensors refuses rows that the group does not divide
    if operator.zeros is not None:
        # transformers 5.23 with compressed-tensors 0.19 or 0.20 expects zero points unpacked and refuses packed ones;
        # asymmetric experts fail in any case (huggingface/transformers#47430).
        return None
    if operator.bits in (4, 8) and operator.group_size in (-1, 32, 64, 128):
        return Readers(("compressor", "transformers", "vLLM"), "tests/test_formats.py; vLLM's W4A16 / W8A16 schemes")
    return Readers(("compressor", "transformers"), "tests/test_formats.py")


def choose_format(
    wanted: str, linears: Mapping[str, Operator], fused: Iterable[Sequence[str]] = (), *, one_tensor: bool = False
) -> tuple[str, tuple[str, ...], str]:
    """The format that all rewritten operators fit, its readers, and what keeps outside readers from it, if anything.

    Args:
        wanted: `auto`, or a format asked for by name.
        linears: disk name → what the passes leave, `Dense` where they leave it alone.
        fused: names that some readers put into one matrix (q, k, v; gate, up).
        one_tensor: whether the model as it is published has all experts of a block in one tensor, which transformers
            does not look for in parts.

    Raises:
        RecipeError: the format asked for cannot hold the result; what stands in the way is named.
    """
    untouched = all(isinstance(operator, Dense) for operator in linears.values())
    if wanted == PLAIN or (wanted == "auto" and untouched):
        return PLAIN, ("compressor", "transformers", "vLLM"), ""
    if wanted == COMPRESSED_TENSORS:
        linears = {name: as_written(operator, wanted) for name, operator in linears.items()}
    obstacle = _mixture(linears)
    if one_tensor and any(is_expert(name) and not isinstance(o, Dense) for name, o in linears.items()):
        obstacle = obstacle or "experts that lie in one tensor"
    readers = {"compressor", "transformers", "vLLM"}
    for name, operator in linears.items():
        if isinstance(operator, Dense):
            continue
        taken = compressed_tensors_readers(operator)
        if taken is None:
            obstacle = obstacle or f"{name} ({describe(operator)}, {operator.shape[1]} columns)"
        else:
            readers &= set(taken.names)
    if obstacle and wanted == COMPRESSED_TENSORS:
        raise RecipeError(
            f"output.format is {COMPRESSED_TENSORS!r}, whose readers cannot take {obstacle}; use 'auto', or change that"
        )
    if obstacle or wanted == NATIVE:
        return NATIVE, ("compressor",), obstacle
    if any(len({_scheme(linears[name]) for name in group}) > 1 for group in fused):
        readers -= {"vLLM"}
    return COMPRESSED_TENSORS, tuple(sorted(readers)), ""


def as_written(operator: Operator, chosen: str, dtype: torch.dtype = torch.float32) -> Operator:
    """What a format holds of an operator: plain weights of `dtype`, or the zeros of a 2:4 pattern as codes; a native
    folder holds it as it is."""
    if chosen == PLAIN and not isinstance(operator, Dense):
        meta = next(iter(operator.to_tensors().values())).is_meta
        return Dense(torch.empty(operator.shape, dtype=dtype, device="meta") if meta else operator.dense(dtype))
    if chosen == COMPRESSED_TENSORS and isinstance(operator, Sparse24) and isinstance(operator.values, IntQuantized):
        kept = operator.values
        size = kept.group_size if kept.group_size < 0 else 2 * kept.group_size
        if kept.codes.is_meta:
            codes = torch.empty(operator.shape, dtype=torch.int8, device="meta")
        else:
            codes = expand24(kept.codes, operator.indices)
        if kept.zeros is None:
            return IntQuantized(codes, kept.scales, None, kept.bits, size)
    return operator


def _scheme(operator: Operator) -> str:
    return repr(operator.scheme())


def is_expert(name: str) -> bool:
    """Whether a disk name is that of a linear of a routed expert."""
    return ".experts." in name


def _layout(scheme: Mapping[str, Any]) -> str:
    """What compressed-tensors calls the way a scheme's tensors are stored."""
    return f"{scheme['type']}-quantized" if scheme["kind"] == W8A8.kind else "pack-quantized"


def _mixture(linears: Mapping[str, Operator]) -> str:
    """What is not written in one layout, or what of a model with experts transformers would read wrongly: it takes them
    to be compressed, decodes all of them by one scheme, and all other linears by one (5.23,
    `integrations/compressed_tensors.py`)."""
    stored = [operator for operator in linears.values() if not isinstance(operator, Dense)]
    if len({_layout(operator.scheme()) for operator in stored}) > 1:
        return "weights for products of 8 bits beside others"
    if any(is_expert(name) and isinstance(o, W8A8) and o.codes.dtype == torch.int8 for name, o in linears.items()):
        return "experts of unpacked integers"
    experts = {_scheme(operator) for name, operator in linears.items() if is_expert(name)}
    others = {_scheme(o) for name, o in linears.items() if not is_expert(name) and not isinstance(o, Dense)}
    if len(experts) > 1:
        return "experts stored in different ways"
    if experts and len(others) > 1:
        return "linears beside experts that are stored in different ways"
    if any(is_expert(name) and isinstance(operator, Dense) for name, operator in linears.items()):
        return "experts left as they are"
    return ""


def describe(operator: Operator) -> str:
    """A short name for people: `int4 g128`."""
    if isinstance(operator, IntQuantized):
        return _describe_codes(operator, operator.group_size)
    if isinstance(operator, W8A8):
        return "w8a8 int8" if operator.codes.dtype == torch.int8 else "w8a8 fp8"
    if isinstance(operator, Sparse24):
        values = operator.values
        return f"2:4 {_describe_codes(values, 2 * values.group_size)}" if isinstance(values, IntQuantized) else "2:4"
    if isinstance(operator, Armor):
        sizes = sorted(set(operator.block_sizes))
        wrappers = "" if isinstance(operator.a, Dense) else f" {describe(operator.a).split()[0]}"
        return f"armor b{'/'.join(map(str, sizes))}{wrappers} {describe(operator.core)}"
    if isinstance(operator, WithResidual):
        return f"{describe(operator.base)} + {describe(operator.residual)}"
    if isinstance(operator, LowRank):
        stored = "" if isinstance(operator.down, Dense) else f" {describe(operator.down).split()[0]}"
        groups = f" in {operator.groups} groups" if operator.groups > 1 else ""
        cached = f", cached int{operator.bits}" if isinstance(operator, Latent) and operator.bits < 16 else ""
        return f"rank {operator.rank}{groups}{stored}{cached}"
    return operator.kind


def _describe_codes(codes: IntQuantized, group_size: int) -> str:
    group = "per row" if group_size < 0 else f"g{group_size}"
    return f"int{codes.bits} {group}" + ("" if codes.zeros is None else " asymmetric")


def format_config(
    chosen: str, source: Mapping[str, Any], operators: Mapping[str, Operator], dense: Iterable[str]
) -> dict[str, Any]:
    """`config.json` of the output.

    Args:
        source: the original `config.json`.
        operators: disk name → rewritten operator.
        dense: names of the linears (and the embedding and head) that stay as they were.
    """
    config = dict(source)
    schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, operator in operators.items():
        scheme = operator.scheme()
        schemes.setdefault(repr(scheme), (scheme, []))[1].append(name)
    if chosen == NATIVE:
        config["base_model_type"] = config["model_type"]
        config["base_architectures"] = config.get("architectures")
        config["model_type"] = NATIVE
        config["architectures"] = ["CompressorForCausalLM"]
        if "auto_map" in config:
            config["base_auto_map"] = config["auto_map"]
        module = MODELING_FILE.removesuffix(".py")
        config["auto_map"] = {entry: f"{module}.{name}" for entry, name in _AUTO_MAP.items()}
        config["compressor"] = {
            "version": NATIVE_VERSION,
            "operators": [{**scheme, "targets": names} for scheme, names in schemes.values()],
        }
        return config
    if chosen == PLAIN:
        return config
    only = len(schemes) == 1
    config["quantization_config"] = {
        "quant_method": COMPRESSED_TENSORS,
        "format": _layout(next(iter(schemes.values()))[0]),
        "quantization_status": "compressed",
        "ignore": sorted(dense),
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if only else ["re:.*[.]experts[.].*"] if is_expert(names[0]) else names,
                **_arguments(scheme),
            }
            for number, (scheme, names) in enumerate(schemes.values())
        },
    }
    return config


def _arguments(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """A scheme in the words of compressed-tensors."""
    if scheme["kind"] == W8A8.kind:
        number = {"num_bits": 8, "type": scheme["type"], "symmetric": True}
        return {
            "weights": {**number, "strategy": "channel", "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True},
        }
    size = None if scheme["group_size"] < 0 else scheme["group_size"]
    number = {"num_bits": scheme["bits"], "type": "int", "symmetric": scheme["symmetric"]}
    return {"weights": {**number, "strategy": "group" if size else "channel", "group_size": size, "dynamic": False}}
