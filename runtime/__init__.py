"""Load and run model folders: `from compressor.runtime import load`.

Importing this package lets transformers open native folders (`auto.py`): at once where transformers is there already,
else as soon as it is imported, for which errors and recipes need not wait: it takes seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import CompressorConfig, CompressorForCausalLM
    from .loader import load

__all__ = ["CompressorConfig", "CompressorForCausalLM", "load"]
_READER = "transformers"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".loader" if name == "load" else ".auto", __name__), name)


class _Registering(Loader):
    """Loads a module as another loader does, and then `auto`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
        self._loader.exec_module(module)
        import_module(".auto", __name__)


class _Waiting(MetaPathFinder):
    """Finds nothing, but for the one import it waits for, which may be asked about before it comes."""

    _looking = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _READER or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


if _READER in sys.modules:
    import_module(".auto", __name__)
else:
    sys.meta_path.insert(0, _Waiting())
