"""Registers the transformers plug-in at the moment transformers loads its quantizers, and not before. Own.

transformers has no plug-in discovery, and importing its quantizer registry takes over a second. So `import hf_bitnet` only
leaves a note in the import system; when `transformers.quantizers.auto` is imported (by `from_pretrained`, say), the note
runs and `hf_bitnet.plugin` adds itself. One method of transformers is extended, too: a quantized model that is pushed gets our
card (`hub/pushed.py`, which is imported at the first push).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_WATCHED = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.Loader):
    """Loads the watched module with its own loader, then imports the plug-in."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _extend_transformers()

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
        _extend_transformers()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _extend_transformers() -> None:
    importlib.import_module(f"{__package__}.plugin")
    mixin = importlib.import_module("transformers.utils.hub").PushToHubMixin
    original = mixin._upload_modified_files  # push_to_hub and save_pretrained(push_to_hub=True) both end there

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, repo_id: str, *others: Any, **named: Any) -> Any:
        pushed = importlib.import_module(f"{__package__}.hub.pushed")
        pushed.put_card(self, working_dir, repo_id, named.get("token"))
        return original(self, working_dir, repo_id, *others, **named)

    mixin._upload_modified_files = upload
