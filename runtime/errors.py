"""One family of errors for people: every message says what is wrong, where, and what to do next."""

from __future__ import annotations


class CompressorError(Exception):
    """Anything a person can mend; the command line prints it without a traceback and exits with 2."""


class RecipeError(CompressorError):
    """The recipe, or what it asks of this model, makes no sense."""


class ModelError(CompressorError):
    """The model folder is missing something, damaged, or of a kind that is not supported."""


class ResourceError(CompressorError):
    """Disk, memory or a device does not suffice, or the output folder is in the way."""


class VerifyError(CompressorError):
    """An output is not what its manifest says."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, as a part of a line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"


def human_size(count: float) -> str:
    """Bytes for people: `2.41 GB`, `950.00 kB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
