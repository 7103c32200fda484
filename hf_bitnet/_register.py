"""Registers the transformers plug-in at the moment transformers loads its quantizers, and not before. Own.

transformers has no plug-in discovery, and importing its quantizer registry takes over a second. So `import hf_bitnet` only
leaves a note in the import system; when `transformers.quantizers.auto` is imported (by `from_pretrained`, say), the note
runs and `hf_bitnet.plugin` adds itself. One method of transformers is extended, too: a quantized model that is pushed gets our
card (`hub/pushed.py`, which is imported at the first push). In the same way, peft learns of our experts and of packed weights
when it is imported (`plugin/adapters.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _ExtendAfter(importlib.abc.Loader):
    """Loads the watched module with its own loader, then extends it."""

    def __init__(self, loader: importlib.abc.Loader, extend: Callable[[ModuleType], None]) -> None:
        self.loader, self.extend = loader, extend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.extend(module)

    def __getattr__(self, name: str) -> object:
        # inspect, linecache and pkgutil ask the loader for sources
        return getattr(self.loader, name)


class _Watcher(importlib.abc.MetaPathFinder):
    """Attributes:
    watched: name of a module. extend: what is done to it once it is loaded.
    """

    def __init__(self, watched: str, extend: Callable[[ModuleType], None]) -> None:
        self.watched, self.extend = watched, extend

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ExtendAfter(spec.loader, self.extend)
        return spec


def extend_what_loads() -> None:
    """Arranges for the modules of `_EXTENSIONS` to be extended as soon as they are loaded, or at once."""
    watching = {finder.watched for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for name, extend in _EXTENSIONS.items():
        if name in sys.modules:
            extend(sys.modules[name])
        elif name not in watching:
            sys.meta_path.insert(0, _Watcher(name, extend))


def _extend_transformers(_: ModuleType) -> None:
    importlib.import_module(f"{__package__}.plugin")
    mixin = importlib.import_module("transformers.utils.hub").PushToHubMixin
    original = mixin._upload_modified_files  # push_to_hub and save_pretrained(push_to_hub=True) both end there

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, repo_id: str, *others: Any, **named: Any) -> Any:
        pushed = importlib.import_module(f"{__package__}.hub.pushed")
        pushed.put_card(self, working_dir, repo_id, named.get("token"))
        return original(self, working_dir, repo_id, *others, **named)

    mixin._upload_modified_files = upload


def _extend_conversions(conversions: ModuleType) -> None:
    importlib.import_module(f"{__package__}.plugin.adapters").leave_separate_experts(conversions)


def _extend_tuners(tuners: ModuleType) -> None:
    importlib.import_module(f"{__package__}.plugin.adapters").refuse_merges_into_packed_layers(tuners)


_EXTENSIONS = {
    "transformers.quantizers.auto": _extend_transformers,
    "peft.utils.transformers_weight_conversion": _extend_conversions,
    "peft.tuners.tuners_utils": _extend_tuners,
}
