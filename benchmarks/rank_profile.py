"""Where the time of a rank goes: seconds of every phase, in the thread that leads it.

Phases are functions of the package that are wrapped while something is measured; a phase does not
count what another one takes within it. On a GPU each waits for the device before it begins and when
it ends, except those that run once a layer and pass.
"""

import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import pandas as pd

PHASES = {
    "begin": (
        "scoring.score:agree_on", "scoring.score:make_manifest", "experts.expand:agree_on",
        "experts.expand:make_manifest", "experts.expand:structural_copy",
        "experiments.experiment:agree_on", "experiments.experiment:make_manifest",
    ),
    "look at the model": ("recording.recorder:look_at", "experts.build:look_at"),
    "forward passes": ("recording.recorder:Recorder.run", "experts.build:record_inputs"),
    "counts of a sketch": ("scoring.sketched:_Passes.update",),
    "wait for places": ("scoring.spread:FirstPlaces.fetch",),
    "agree on places": ("scoring.sketched:share_places",),
    "pool counts": ("scoring.sketched:pool_counts",),
    "measure and share": ("scoring.sketched:share_summaries", "scoring.sketched:_Passes.summarise"),
    "tables": ("scoring.score:neuron_table", "scoring.score:layer_table"),
    "share inputs": ("experts.build:share_inputs",),
    "fit routers": ("experts.solver:ExpertSettings.fit",),
    "wait for a router": ("experts.build:share_router",),
    "gram of all tokens": ("experts.solver:whole_gram", "experts.build:whole_gram"),
    "grams": ("experts.solver:ClusterTokens.grams", "experts.build:cluster_grams"),
    "factors": ("experts.solver:_Group._factor",),
    "prune": ("experts.solver:prune_part",),
    "errors": ("experts.solver:squared_errors",),
    "join experts": ("experts.build:join_experts",),
    "pack and report": ("experts.build:share_packing", "experts.expand:block_rows"),
    "prepare arms": ("experiments.compare:Comparing.prepare",),
}  # fmt: skip
OFTEN = ("counts of a sketch", "wait for places")
"""Phases that do not wait for a GPU."""

Seconds = dict[str, tuple[float, float]]
"""By phase, wall time and the leading thread's processor time."""


class Profile:
    """Counts seconds by phase."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._open: list[str] = []
        self._last = self._now()

    @property
    def seconds(self) -> Seconds:
        """What was found so far."""
        return {name: (one[0], one[1]) for name, one in self._found.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs in the block for a phase, and no longer for the one around it."""
        self._turn(name)
        self._open.append(name)
        try:
            yield
        finally:
            self._turn(name)
            self._open.pop()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def _turn(self, name: str) -> None:
        if name not in OFTEN:
            synchronise()
        now = self._now()
        if self._open:
            for i in (0, 1):
                self._found[self._open[-1]][i] += now[i] - self._last[i]
        self._last = now


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wrapped(function: Callable[..., Any], name: str, profile: Profile) -> Callable[..., Any]:
    leads = threading.get_ident()

    @wraps(function)
    def timed(*given: Any, **settings: Any) -> Any:
        if threading.get_ident() != leads:
            return function(*given, **settings)
        with profile.phase(name):
            return function(*given, **settings)

    return timed


@contextmanager
def profiled() -> Iterator[Profile]:
    """Count the seconds of all `PHASES` while the block runs; the rest is ``the rest``."""
    profile = Profile()
    with ExitStack() as stack:
        for name, places in PHASES.items():
            for place in places:
                module, _, path = place.partition(":")
                owner: Any = importlib.import_module(f"entangle.{module}")
                *outer, last = path.split(".")
                for one in outer:
                    owner = getattr(owner, one)
                made = _wrapped(getattr(owner, last), name, profile)
                stack.enter_context(patch.object(owner, last, made))
        with profile.phase("the rest"):
            yield profile


def profile_table(columns: Mapping[str, Seconds]) -> pd.DataFrame:
    """Return seconds by phase, with processor seconds in brackets, a column a rank."""
    names: Sequence[str] = [
        name for name in (*PHASES, "the rest") if any(name in one for one in columns.values())
    ]
    cells = {
        title: [f"{one[name][0]:.2f} ({one[name][1]:.2f})" if name in one else "" for name in names]
        for title, one in columns.items()
    }
    whole = {
        title: [f"{sum(wall for wall, _ in one.values()):.2f}"] for title, one in columns.items()
    }
    return pd.DataFrame(
        {title: cells[title] + whole[title] for title in columns}, index=[*names, "in all"]
    )
