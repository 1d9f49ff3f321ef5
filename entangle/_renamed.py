"""Import paths of the version before, for one release: what moved is found where it is now."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, tuple[str, ...]] = {
    "ablation": ("experiments", "results.contrasts", "experts.routed_rows"),
    "analysis": ("experiments.predictors", "experiments.damage", "experiments.outliers"),
    "calibration": ("texts",),
    "decomposition": ("results.decomposition", "modes.decompose"),
    "expansion": ("experts",),
    "expansion.compare": ("experiments.compare", "results.comparison"),
    "plotting.axes": ("plotting.scores", "plotting.outputs"),
    "plotting.changes": ("plotting.clusters", "plotting.pairs"),
    "plotting.components": ("plotting.predictors",),
    "plotting.figures": ("plotting.outputs", "plotting.scores"),
    "plotting.router_map": ("plotting.clusters",),
    "plotting.separated": ("plotting.pairs",),
    "routing": ("experts.router",),
    "scoring.scores": ("results.scores",),
}
"""Old public modules of the package, and the modules that hold their names now."""


class _Moved(ModuleType):
    """A module whose names are looked up where they are now, with a note."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):
            for home in MOVED[self.__name__.removeprefix("entangle.")]:
                found = getattr(importlib.import_module(f"entangle.{home}"), name, None)
                if found is not None:
                    message = f"{self.__name__}.{name} is now in entangle.{home}"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class Finder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`; installed by ``import entangle``."""

    def find_spec(
        self,
        name: str,
        path: object,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Return a spec for a module that moved, None for all others."""
        old = name.removeprefix("entangle.")
        if old == name or old not in MOVED:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that looks names up."""
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is."""


def install() -> None:
    """Let old import paths be found."""
    if not any(isinstance(one, Finder) for one in sys.meta_path):
        sys.meta_path.append(Finder())
