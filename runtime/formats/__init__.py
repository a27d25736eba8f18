"""Formats that folders are written in and read from, one file each; a new one is a file and its line here.

A scheme that an outside reader takes is written for that reader; what no one else can say is written natively.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, RecipeError
from ..schemes import Operator
from .awq import Awq
from .base import Around, Format
from .compressed_tensors import CompressedTensors
from .gptq import Gptq
from .native import Native
from .plain import Plain

__all__ = ["FORMATS", "NATIVE", "PLAIN", "Around", "Format", "choose_format", "format_of"]

PLAIN, NATIVE = Plain(), Native()
FORMATS: dict[str, Format] = {
    one.name: one for one in (PLAIN, CompressedTensors(), Gptq(), Awq(), NATIVE)
}  # in order of preference


def choose_format(
    wanted: str, linears: Mapping[str, Operator], around: Around | None = None
) -> tuple[Format, tuple[str, ...], str]:
    """The format that all rewritten operators fit, its readers, and what keeps outside readers from it, if anything.

    Args:
        wanted: `auto`, or a format asked for by name.
        linears: disk name → what the passes leave, `Dense` where they leave it alone.

    Raises:
        RecipeError: the format asked for cannot hold the result; what stands in the way is named.
    """
    around, obstacle = around or Around(), ""
    for one in FORMATS.values():
        if wanted != one.name and not (wanted == "auto" and one.automatic):
            continue
        held = linears
        if wanted == one.name:
            held = {name: one.as_written(operator) for name, operator in linears.items()}
        found = one.obstacle(held, around)
        if found and wanted == one.name:
            raise RecipeError(
                f"output.format is {wanted!r}, whose readers cannot take {found}; use 'auto', or change that"
            )
        if not found:
            return one, one.readers(held, around), obstacle if one is NATIVE else ""
        obstacle = found
    raise AssertionError(wanted)  # the native format holds everything, and recipes name no other


def format_of(path: Path, config: Mapping[str, Any]) -> Format:
    """The format of a folder, by its `config.json`.

    Raises:
        ModelError: it is quantized in one that is not read here.
    """
    claiming = next((one for one in FORMATS.values() if one.claims(config)), None)
    if claiming is not None:
        return claiming
    if "quantization_config" in config:
        quantization = config["quantization_config"]
        reads = " and ".join(one.reads for one in FORMATS.values() if one.reads)
        method = quantization.get("format") or quantization.get("quant_method")
        raise ModelError(f"{path}: quantized as {method!r}, which is not read here; {reads} are")
    return PLAIN
