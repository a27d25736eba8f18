"""Formats that folders are written in and read from, one file each; a new one is a file and its line here.

A scheme that an outside reader takes is written for that reader; what no one else can say is written natively. Some are
read alone, for models that come in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, RecipeError
from ..schemes import Operator
from .awq import Awq
from .base import OURS, Around, Format, WrittenFormat
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .fp8 import FbgemmFp8, Fp8
from .gptq import Gptq
from .modelopt import ModelOpt
from .mxfp4 import Mxfp4
from .native import Native
from .plain import Plain

__all__ = ["FORMATS", "NATIVE", "PLAIN", "Around", "Format", "WrittenFormat", "choose_format", "format_of"]

PLAIN, NATIVE = Plain(), Native()
FORMATS: dict[str, WrittenFormat] = {
    one.name: one for one in (PLAIN, CompressedTensors(), Fp8(), Gptq(), Awq(), NATIVE)
}  # in order of preference
SOURCES: tuple[Format, ...] = (
    FbgemmFp8(),
    ModelOpt(),
    Mxfp4(),
    BitsAndBytes(),
)  # which are read and not written


def choose_format(
    wanted: str, linears: Mapping[str, Operator], around: Around | None = None
) -> tuple[WrittenFormat, tuple[str, ...], str]:
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
            readers = one.readers(held, around)
            if around.untried:
                stock = ("transformers",) if around.rebuilt or one is PLAIN else ()
                readers = tuple(name for name in readers if name in (*OURS, *stock))
            return one, readers, obstacle if one is NATIVE else ""
        obstacle = found if one.telling else obstacle
    raise AssertionError(wanted)  # the native format holds everything, and recipes name no other


def format_of(path: Path, config: Mapping[str, Any]) -> Format:
    """The format of a folder, by its `config.json`.

    Raises:
        ModelError: it is quantized in one that is not read here.
    """
    known = [*FORMATS.values(), *SOURCES]
    claiming = next((one for one in known if one.claims(config)), None)
    if claiming is not None:
        return claiming
    if "quantization_config" in config:
        quantization = config["quantization_config"]
        reads = ", ".join(one.reads for one in known if one.reads)
        method = quantization.get("format") or quantization.get("quant_method")
        raise ModelError(f"{path}: quantized as {method!r}, which is not read here; {reads} are")
    return PLAIN
