"""What loading makes of damaged results: refused, or the numbers that were written.

``python -m benchmarks.damaged_results --cases 2000 --seed 0`` saves one result of every kind, of
two tiny models, damages one file a case (`benchmarks.damage`), or puts in its place the other
model's, loads the result, and prints a table: tried, refused, unchanged, wrong, traceback. The last
two must be 0; it ends with status 1 otherwise.
"""

import argparse
import hashlib
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import entangle
from benchmarks.damage import REFUSED, TRACEBACK, UNCHANGED, WRONG, damage
from entangle.allocation import load_allocation
from entangle.allocation.export import export, import_allocation
from entangle.errors import EntangleError
from entangle.models.loading import LanguageModel, as_language_model
from tests.tiny_models import TINY

Loader = Callable[[Path], object]


def make(folder: Path, name: str, seed: int) -> dict[str, Loader]:
    """Save one result of every kind; return what loads each, by its name in the folder."""
    generator = torch.Generator().manual_seed(seed)
    model = as_language_model(TINY[name]())
    ids = torch.randint(0, 100, (6, 16), generator=generator)
    text = torch.randint(0, 100, (3, 16), generator=generator)
    folder.mkdir()
    scores = entangle.score(model, ids, layers=[0, 1], proj="mlp", progress=False)
    scores.save(folder / "scores")
    few: dict[str, Any] = {"layers": [1], "proj": "mlp", "progress": False}
    entangle.ablate(
        model, ids, evaluation=text, selections=["top", "random"], strengths=0.9, seeds=2,
        experts=[1, 2], **few,
    ).save(folder / "ablation")  # fmt: skip
    entangle.decompose(
        model, ids, layers=1, proj="mlp", experts=[1, 2], token_pairs=20, progress=False
    ).save(folder / "decomposition")
    entangle.compare(
        model, ids, text, methods=["wanda", "expansion"], sparsity=0.5, experts=2,
        out=folder / "comparison",
    )  # fmt: skip
    entangle.expand(
        model, ids, experts=2, sparsity=0.5, out=folder / "expansion", keep=False, **few
    )
    allocation = entangle.allocate(scores, sparsity=0.5, model=model)
    allocation.save(folder / "allocation.safetensors")
    export(allocation, folder / "rows.safetensors", "safetensors")
    export(allocation, folder / "rows.csv", "csv")
    return {
        "scores": entangle.load_scores,
        "ablation": entangle.load_ablation,
        "decomposition": entangle.load_decomposition,
        "comparison": entangle.load_comparison,
        "expansion": lambda path: _expanded(path, model),
        "allocation.safetensors": load_allocation,
        "rows.safetensors": lambda path: import_allocation(path, "safetensors"),
        "rows.csv": lambda path: import_allocation(path, "csv"),
    }


def _expanded(path: Path, model: LanguageModel) -> object:
    return dict(entangle.load_expanded(path, base=model).module.state_dict())


def signature(value: object) -> str:
    """Return the SHA-256 of every number and name that a result holds."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: object) -> None:
    if isinstance(value, pd.DataFrame):
        found.update(repr(list(value.columns)).encode())
        for name in value.columns:
            found.update(repr(value[name].tolist()).encode("utf-8", "surrogatepass"))
    elif isinstance(value, torch.Tensor):
        _add(found, value.detach().float().numpy())
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, one in value.items():
            found.update(repr(key).encode("utf-8", "surrogatepass"))
            _add(found, one)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            if name != "manifest":  # what it says of a run is no number of the result
                _add(found, getattr(value, name))
    else:
        found.update(repr(value).encode("utf-8", "surrogatepass"))


def campaign(cases: int, seed: int, place: Path) -> Counter[tuple[str, str]]:
    """Damage and load; return how often each outcome was, by kind and outcome."""
    loaders = make(place / "one", "llama", 0)
    make(place / "other", "qwen3", 1)
    intact = {name: signature(load(place / "one" / name)) for name, load in loaders.items()}
    rng, found = random.Random(seed), Counter[tuple[str, str]]()
    for case in range(cases):
        name = rng.choice(sorted(loaders))
        source, work = place / "one" / name, place / "work" / name
        shutil.rmtree(place / "work", ignore_errors=True)
        work.parent.mkdir()
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, work)
        inside = sorted(path for path in work.rglob("*") if path.is_file())
        file = rng.choice(inside if source.is_dir() else [work])
        other = place / "other" / name / file.relative_to(work)
        if source.is_dir() and other.is_file() and rng.random() < 0.15:
            shutil.copyfile(other, file)
            told = f"{file.name}: that of another run"
        else:
            told = damage(rng, file)
        try:
            same = signature(loaders[name](work)) == intact[name]
            outcome = UNCHANGED if same else WRONG
        except EntangleError as error:
            outcome = REFUSED if "\n" not in str(error) else TRACEBACK
        except Exception as error:
            outcome, told = TRACEBACK, f"{told}: {type(error).__name__}: {error}"
        found[name, outcome] += 1
        if outcome in (WRONG, TRACEBACK):
            print(f"case {case}, {name}: {outcome}: {told[:300]}", file=sys.stderr)
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        found = campaign(arguments.cases, arguments.seed, Path(place))
    table = (
        pd.Series(found)
        .unstack(fill_value=0)
        .reindex(columns=[REFUSED, UNCHANGED, WRONG, TRACEBACK], fill_value=0)
    )
    table.insert(0, "tried", table.sum(axis=1))
    table.loc["all"] = table.sum()
    print(table.to_string())
    print(f"seed {arguments.seed}, {time.perf_counter() - start:.0f} s")
    return int(bool(sum(n for (_, outcome), n in found.items() if outcome in (WRONG, TRACEBACK))))


if __name__ == "__main__":
    sys.exit(main())
