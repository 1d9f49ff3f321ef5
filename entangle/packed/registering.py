"""Tell transformers of packed experts once it is imported, and not a moment before.

``import entangle`` calls `install`; the quantiser is registered when transformers' list of them
(`LIST`) has been imported, or at once where it is there already.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIST = "transformers.quantizers.auto"
"""The module that knows all quantisers."""


def install() -> None:
    """Register the quantiser now or, if transformers is not imported yet, when it is."""
    if LIST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("entangle.packed.huggingface")  # which may be what imports the list


class _Finder(MetaPathFinder):
    """Finds the list as the other finders do, and lets `_Loader` load it; then it is gone."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != LIST:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads the list as its own loader does, then registers the quantiser."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        _register()
