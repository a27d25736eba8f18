"""Load and run model folders: `from compressor.runtime import load`."""

from .loader import load, register

register()

__all__ = ["load"]
