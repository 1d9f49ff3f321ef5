"""Work that several ranks share out, and one process does alone: what comes of it, by digest."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from entangle.cli import options
from entangle.cli.main import main
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, perplexity
from entangle.experiments.compare import compare
from entangle.experts import block_files, build, checkpoint, spread
from entangle.experts.expand import expand
from entangle.experts.prune import prune
from entangle.models import streaming
from entangle.models.loading import as_language_model, load_model
from entangle.models.streaming import is_streamed
from entangle.ranks import Ranks, current, place_of, started
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.texts import calibration_set
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY, own_generator

FULL, FEW = "full", "few"


class _Block(nn.Module):
    """Sends each token to one of five experts, or to none, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))
        self.down = nn.Linear(8, 16)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.zeros(*x.shape[:-1], 8, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            own = ids % 5 == number
            if bool(own.any()):
                y[own] = expert(x[own])
        return x + self.down(torch.relu(y))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """A mixture whose last expert sees tokens of the later sequences only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(112, 16)
        self.layers = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x, seldom = self.embedding(ids), (ids % 5 == 3) & (ids[:, :1] < 60)
        for block in self.layers:
            x = block(x, ids - seldom.long())
        return x  # type: ignore[no-any-return]


def mixture() -> nn.Module:
    with own_generator(0):
        return Mixture().eval()


def texts() -> tuple[CalibrationSet, EvaluationText]:
    ids = torch.randint(4, 112, (12, 16), generator=torch_rng(0, "test tokens"))
    ids[:, 0] = torch.arange(4, 112, 9)  # the first tokens rise
    others = torch.randint(4, 90, (5, 16), generator=torch_rng(1, "evaluation"))
    return CalibrationSet(ids, "random ids", {}), EvaluationText(others, "random ids", {})


def digest(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        content = part.to_csv(float_format="%.17g") if isinstance(part, pd.DataFrame) else str(part)
        found.update(content.encode())
    return found.hexdigest()


def of_scores(scores: NeuronScores) -> str:
    histograms = [
        [name, one.first_bin, *(a.tobytes() for a in (one.counts, one.location, one.low, one.high))]
        for name, one in sorted(scores.histograms.items())
    ]
    return digest(scores.frame, scores.layers, histograms, scores.manifest["settings"])


def of_folder(folder: Path, *, ending: str = "") -> str:
    files = (path for path in sorted(folder.rglob(f"*{ending}")) if path.is_file())
    return digest(
        [(path.name, path.read_bytes()) for path in files if path.name not in ("run.json",)]
    )


def scored(kinds: str) -> Iterator[tuple[str, str]]:
    text, _ = texts()
    makers: list[tuple[str, Callable[[], nn.Module]]] = [("llama", TINY["llama"])]
    makers.append(("mixture", mixture))
    for name, make in makers:
        for dtype in (torch.float32, torch.bfloat16) if kinds == FULL else (torch.bfloat16,):
            model = as_language_model(make().to(dtype))
            for method in ("sketch", "exact") if kinds == FULL else ("sketch",):
                settings: Any = {"method": method, "batch_size": 1, "progress": False}
                yield (
                    f"{name} {method} {dtype}",
                    of_scores(score(model, text, proj=None, **settings)),
                )


def short(folder: Path) -> Iterator[tuple[str, str]]:
    """Score and expand on two sequences, fewer than there are ranks."""
    text = CalibrationSet(texts()[0].ids[:2], "random ids", {})
    model, out = as_language_model(TINY["llama"]()), folder / "short"
    for method in ("sketch", "exact"):
        found = score(model, text, proj=None, method=method, batch_size=1, progress=False)
        yield f"two sequences, {method}", of_scores(found)
    settings: Any = {"experts": 2, "layers": 0, "restarts": 1, "keep": False, "progress": False}
    yield "two sequences", digest(expand(model, text, sparsity=0.5, out=out, **settings).layers)
    if current().rank == 0:
        yield "two sequences, files", of_folder(out)


def streamed(folder: Path) -> Iterator[tuple[str, str]]:
    """Score and expand models that come block by block, and measure their perplexity."""
    text, evaluation = texts()
    where = folder / "llama"
    if current().rank == 0:
        made = TINY["llama"]().to(torch.bfloat16)
        made.save_pretrained(where, max_shard_size="20KB")  # type: ignore[operator]
    current().exchange("written")
    model = load_model(where, device="cpu", stream=True)
    assert is_streamed(model.module)
    for method in ("sketch", "exact"):
        found = score(model, text, proj=None, method=method, batch_size=1, progress=False)
        yield f"streamed {method}", digest(found.frame.drop(columns="model"), found.layers)
    yield "streamed loss", digest(perplexity(model, evaluation, batch_size=1).window_losses)
    out = folder / "streamed"
    expand(model, text, experts=3, sparsity=0.5, restarts=1, out=out, keep=False, progress=False)
    if current().rank == 0:
        yield "streamed files", of_folder(out, ending=".safetensors")


def built(kinds: str, folder: Path) -> Iterator[tuple[str, str]]:
    text, evaluation = texts()
    model = as_language_model(TINY["llama"]())
    several: dict[str, dict[str, Any]] = {
        "three experts": {"experts": 3},
        "one expert": {"experts": 1, "layers": 0},
        "codes": {"experts": 2, "bits": 4, "router": "random", "layers": 0},
    }
    few: dict[str, Any] = {"experts": 4, "format": "delta"}
    if kinds != FULL:
        vars(build)["_GRAM_BYTES"] = 0  # clusters are solved without all their grams at once
    for name, settings in several.items() if kinds == FULL else [("few", few)]:
        out = folder / name.replace(" ", "-")
        made = expand(
            model, text, sparsity=0.5, evaluation=evaluation, out=out, keep=False, restarts=2,
            progress=False, **settings,
        )  # fmt: skip
        assert made.perplexity is not None
        yield f"{name} table", digest(made.layers, made.perplexity.window_losses.tolist())
        if current().rank == 0:
            yield f"{name} files", of_folder(out)
    if kinds == FULL:
        pruned = prune(model, text, sparsity=0.5, layers=1, out=folder / "pruned", progress=False)
        weights = pruned.model.module.state_dict()
        yield "pruned", digest([one.tolist() for one in weights.values()])
        yield "perplexity", digest(perplexity(model, evaluation, batch_size=1).window_losses)
        arms: Any = {"methods": ("wanda", "expansion"), "sparsity": (0.5, 0.8), "experts": 2}
        found = compare(model, text, evaluation, **arms, out=folder / "compared")
        yield "compared", digest(found.frame.drop(columns="seconds"), found.windows)


def work(kinds: str, folder: Path) -> dict[str, str]:
    """Do all of it, in batches of two sequences."""
    calibration_set._TOKENS_IN_A_PASS = 32
    spread._ROWS = 24
    streaming._SMALL = 100
    found = {**dict(scored(kinds)), **dict(built(kinds, folder))}
    return found | dict(streamed(folder) if kinds == FULL else short(folder))


def _disagrees(ranks: Ranks) -> str:
    try:
        ranks.agree({"same": 1, "calibration": ranks.rank == 1})
    except InvalidInput as error:
        return str(error)
    return ""


def run(kinds: str, folder: Path, command: list[str]) -> None:
    """Do it as one of several ranks, and write what came of it; then run a command, or die."""
    torch.set_num_threads(1)
    wrote: list[str] = []
    write = block_files.write_block

    def noted(path: Path, expanded: Any) -> None:
        wrote.append(path.name)
        write(path, expanded)

    vars(checkpoint)["write_block"] = noted
    with started(place_of(os.environ)) as ranks:
        found = work(kinds, folder)
        content = {
            "found": found,
            "wrote": wrote,
            "refusal": _disagrees(ranks),
            "part": list(ranks.part(7)),
        }
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(content))
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if kinds == FULL:
        sys.exit(main(command))
    if ranks.rank == 2:
        vars(options)["load_model"] = lambda _arguments: os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(main(command))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
