"""The native format, which holds every operator; `docs/format.md` describes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ModelError
from ..schemes import Operator
from .base import OURS, Around, Schemes, WrittenFormat, targets

VERSION = 1

# What a native folder holds for transformers to find us by, where its user trusts the code in it: no more than a name.
_MODULE = "modeling_compressor"
_MODELING = '''"""Opens this folder in transformers with `trust_remote_code=True`, where compressor is installed."""

from compressor.runtime import CompressorConfig, CompressorForCausalLM

__all__ = ["CompressorConfig", "CompressorForCausalLM"]
'''
_AUTO_MAP = {"AutoConfig": "CompressorConfig", "AutoModelForCausalLM": "CompressorForCausalLM"}
_KEPT = {"model_type": "base_model_type", "architectures": "base_architectures", "auto_map": "base_auto_map"}


class Native(WrittenFormat):
    """Operators as they are, under a model type of their own so that no reader guesses."""

    name: ClassVar[str] = "compressor"
    files: ClassVar[Mapping[str, str]] = {f"{_MODULE}.py": _MODELING}

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        return ""

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        return OURS

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        config = dict(source)
        config["base_model_type"] = config["model_type"]
        config["base_architectures"] = config.get("architectures")
        config["model_type"] = self.name
        config["architectures"] = ["CompressorForCausalLM"]
        if "auto_map" in config:
            config["base_auto_map"] = config["auto_map"]
        config["auto_map"] = {entry: f"{_MODULE}.{name}" for entry, name in _AUTO_MAP.items()}
        operators = [{**scheme, "targets": names} for scheme, names in targets(linears)]
        config["compressor"] = {"version": VERSION, "operators": operators}
        return config

    def claims(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("model_type") == self.name)

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        native = config.get("compressor", {})
        if native.get("version") != VERSION:
            raise ModelError(
                f"{path}: format version {native.get('version')}, but this release reads {VERSION}; upgrade compressor"
            )
        return {
            name: {key: value for key, value in entry.items() if key != "targets"}
            for entry in native["operators"]
            for name in entry["targets"]
        }

    def original(self, config: Mapping[str, Any]) -> dict[str, Any]:
        theirs = {key: config[kept] for key, kept in _KEPT.items() if kept in config}
        ours = {"compressor", *_KEPT, *_KEPT.values()} - set(theirs)
        return {key: theirs.get(key, value) for key, value in config.items() if key not in ours}
