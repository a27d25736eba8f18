"""What can be written in which format, and who reads it.

One table decides: a scheme that an outside reader takes is written for that reader; what no one else can say is written
natively. Only readers that a test here runs, or whose own documentation or issue tracker says so, are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import RecipeError
from ..runtime.operators import IntQuantized, Operator

COMPRESSED_TENSORS, NATIVE, PLAIN = "compressed-tensors", "compressor", "plain"
NATIVE_VERSION = 1


@dataclass(frozen=True)
class Readers:
    """Who reads one scheme in compressed-tensors, with the evidence."""

    names: tuple[str, ...]
    evidence: str


def compressed_tensors_readers(operator: Operator) -> Readers | None:
    """Readers of an operator as `pack-quantized`, or None where no outside reader takes it."""
    if not isinstance(operator, IntQuantized):
        return None
    columns = operator.shape[1]
    if columns % operator.span:
        return None  # compressed-tensors refuses rows that the group does not divide
    if operator.zeros is not None:
        # transformers 5.23 with compressed-tensors 0.19 or 0.20 expects zero points unpacked and refuses packed ones;
        # asymmetric experts fail in any case (huggingface/transformers#47430).
        return None
    if operator.bits in (4, 8):
        return Readers(("compressor", "transformers", "vLLM"), "tests/test_formats.py; vLLM's W4A16 / W8A16 schemes")
    return Readers(("compressor", "transformers"), "tests/test_formats.py")


def choose_format(wanted: str, operators: Mapping[str, Operator]) -> tuple[str, tuple[str, ...]]:
    """The format that all rewritten operators fit, and its readers.

    Args:
        wanted: `auto`, or a format asked for by name.
        operators: disk name → what the passes leave, rewritten linears only.

    Raises:
        RecipeError: the format asked for cannot hold an operator; the first one is named.
    """
    readers: set[str] | None = None
    for name, operator in operators.items():
        taken = compressed_tensors_readers(operator)
        if taken is None:
            if wanted == COMPRESSED_TENSORS:
                raise RecipeError(
                    f"output.format is {COMPRESSED_TENSORS!r}, which cannot hold {name} "
                    f"({describe(operator)}, {operator.shape[1]} columns); use 'auto' or another group_size"
                )
            return NATIVE, ("compressor",)
        readers = set(taken.names) if readers is None else readers & set(taken.names)
    if wanted == NATIVE:
        return NATIVE, ("compressor",)
    return COMPRESSED_TENSORS, tuple(sorted(readers or ()))


def describe(operator: Operator) -> str:
    """A short name for people: `int4 g128`."""
    if isinstance(operator, IntQuantized):
        group = "per row" if operator.group_size < 0 else f"g{operator.group_size}"
        return f"int{operator.bits} {group}" + ("" if operator.zeros is None else " asymmetric")
    return operator.kind


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
        config["model_type"] = NATIVE
        config["architectures"] = ["CompressorForCausalLM"]
        config["compressor"] = {
            "version": NATIVE_VERSION,
            "operators": [{**scheme, "targets": names} for scheme, names in schemes.values()],
        }
        return config
    only = len(schemes) == 1
    config["quantization_config"] = {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(dense),
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if only else names,
                "weights": {
                    "num_bits": scheme["bits"],
                    "type": "int",
                    "symmetric": scheme["symmetric"],
                    "strategy": "channel" if scheme["group_size"] < 0 else "group",
                    "group_size": None if scheme["group_size"] < 0 else scheme["group_size"],
                    "dynamic": False,
                },
            }
            for number, (scheme, names) in enumerate(schemes.values())
        },
    }
    return config
