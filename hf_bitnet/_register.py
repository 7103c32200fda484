"""Registers the transformers plug-in at the moment transformers loads its quantizers, and not before. Own.

transformers has no plug-in discovery, and importing its quantizer registry takes over a second. So `import hf_bitnet` only
leaves a note in the import system; when `transformers.quantizers.auto` is imported (by `from_pretrained`, say), the note
runs and `hf_bitnet.plugin` adds itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.Loader):
    """Loads the watched module with its own loader, then imports the plug-in."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(f"{__package__}.plugin")

    def __getattr__(self, name: str) -> object:
        # inspect, linecache and pkgutil ask the loader for sources
        return getattr(self.loader, name)


class _Watcher(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Arranges for `hf_bitnet.plugin` to be imported right after transformers' quantizer registry."""
    if _WATCHED in sys.modules:
        importlib.import_module(f"{__package__}.plugin")
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
