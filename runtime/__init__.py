"""Load and run model folders: `from compressor.runtime import load`."""

from .loader import CompressorConfig, CompressorForCausalLM, load, register

register()

__all__ = ["CompressorConfig", "CompressorForCausalLM", "load"]
