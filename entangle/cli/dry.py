"""``--dry-run``: what a command will take, from its own work on a few tokens and blocks.

Time, memory and disk of a run are sums of a few counts (multiplications of the blocks, of the head,
of grams and solves, outputs, arms), each times what one of them takes here and now. That is
measured: the command's own function runs on copies of the model that end after one and two blocks,
on little text, into a folder that goes again; the least squares of what was measured, none below
zero (Lawson and Hanson, 1974), give each count's share. Bytes that are known (hidden states,
records, files of weights) are added as they are. Processor seconds are told from one another; wall
time is theirs times the ratio that the trials had.
"""

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present
from entangle.errors import InvalidInput, MemoryLimit, Unavailable
from entangle.memory import free_on_gpu, free_ram, give_back

if TYPE_CHECKING:
    from entangle.evaluation import EvaluationText
    from entangle.models.layers import Layer
    from entangle.models.loading import LanguageModel
    from entangle.texts.calibration_set import CalibrationSet

    Texts = tuple["CalibrationSet | None", "EvaluationText | None"]

FLOPS = 4e10
"""Most multiplications and additions of a trial's pass over a block."""
SOLVED = 2e11
"""Of a trial's solves, where a layer allows."""
MOST_TOKENS = 2048
"""Of a trial."""
_HIGH_WATER = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """A run of a command: the one that is asked for, or a trial."""

    model: "LanguageModel"
    layers: "tuple[Layer, ...]"
    """Those that are scored, pruned, …"""
    text: "CalibrationSet | None"
    """To calibrate on."""
    windows: "EvaluationText | None"
    """To evaluate on."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What else it is asked for; every command has its own."""
    budget: int = 2**62
    """Bytes that hidden states and records may take before they spill."""

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return 0 if self.text is None else self.text.n_tokens

    @property
    def evaluated(self) -> int:
        """Tokens of the windows."""
        return 0 if self.windows is None else int(self.windows.windows.numel())

    def forward(self, passes: float, windows: float = 0.0) -> float:
        """Return the operations of so many passes of the text, and of the windows."""
        found = 0.0
        for text, times in ((self.text, passes), (self.windows, windows)):
            if text is not None and times:
                n = self.tokens if text is self.text else self.evaluated
                found += times * n * self.per_token(text.seq_len)
        return found

    def per_token(self, seq_len: int) -> float:
        """Return the operations of all blocks on a token of a sequence of some length."""
        return 2.0 * sum(self.weights.values()) + 4.0 * seq_len * self.width * len(self.weights)

    @property
    def weights(self) -> dict[int, int]:
        """Weights of the linear layers of every block."""
        from entangle.models.layers import find_blocks, list_layers

        found = dict.fromkeys(range(len(find_blocks(self.model.module)[1])), 0)
        for layer in list_layers(self.model.module):
            if layer.block is not None:
                found[layer.block] += math.prod(layer.shape)
        return found

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return min(layer.in_features for layer in self.layers) if self.layers else 1

    @property
    def inputs(self) -> "list[Layer]":
        """One layer of every distinct input: neighbours of a block that are equally wide."""
        found: list[Layer] = []
        for layer in self.layers:
            last = found[-1] if found else None
            same = last is not None and last.block == layer.block
            if not (same and last is not None and last.in_features == layer.in_features):
                found.append(layer)
        return found

    @property
    def neurons(self) -> int:
        """Rows of the layers."""
        return sum(layer.out_features for layer in self.layers)

    @property
    def head(self) -> float:
        """Multiplications of the head for one token."""
        return float(self.model.vocab_size * self.width)


@dataclass(frozen=True)
class Counts:
    """What time, memory and disk of a job are linear in, and what is known of them."""

    time: Mapping[str, float]
    peak: Mapping[str, float]
    disk: Mapping[str, float]
    held: float = 0.0
    """Bytes of memory that are known."""
    written: float = 0.0
    """Bytes of disk that are known."""
    passes: tuple[float, float] = (0, 0)
    """How often the text, and the windows, pass the blocks."""


@dataclass(frozen=True)
class Subject:
    """A command, as its trials see it."""

    run: Callable[[Job, Path], object]
    """Does a job, and writes into a folder that does not exist."""
    counts: Callable[[Job], Counts]
    sizes: Callable[[Job], Sequence[Mapping[str, Any]]] = lambda _job: ({},)
    """What of ``given`` its trials vary."""


@dataclass(frozen=True)
class Spent:
    """What a job took, or will."""

    cpu: float
    """Seconds."""
    wall: float
    """Seconds."""
    peak: int
    """Most bytes of the process."""
    device: int
    """Most bytes on a GPU, 0 without one."""
    disk: int
    """Bytes written and left."""


# --- trials -------------------------------------------------------------------------------------


def first_blocks(model: "LanguageModel", count: int) -> "LanguageModel":
    """Return a model that ends after so many blocks, sharing all tensors."""
    from entangle.experts.build import structural_copy
    from entangle.models.layers import find_blocks
    from entangle.models.loading import LanguageModel

    module = structural_copy(model.module)
    del find_blocks(module)[1][count:]
    config: Any = getattr(module, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = count
    return LanguageModel(module, model.tokenizer, model.name, "memory", None)


def _like(model: "LanguageModel", layers: "Sequence[Layer]", most: int) -> "tuple[Layer, ...]":
    """Return the layers of a short model that are as those of the first block with some."""
    from entangle.models.layers import find_blocks, list_layers

    own = {layer.name: layer for layer in list_layers(model.module)}
    start = find_blocks(model.module)[0]
    first = min((one.block for one in layers if one.block is not None), default=0)
    endings = [one.name[len(f"{start}.{first}.") :] for one in layers if one.block == first]
    names = [f"{start}.{block}.{ending}" for block in range(most) for ending in endings]
    outside = [one.name for one in layers if one.block is None]
    return tuple(own[name] for name in (*names, *outside) if name in own)


def _cut(job: Job, blocks: int, share: float, given: Mapping[str, Any]) -> Job:
    """Return a trial on the first blocks, and a share of the tokens that a trial may have."""
    model = first_blocks(job.model, blocks)
    small = Job(model, _like(model, job.layers, blocks), None, None)
    most = FLOPS / max(1.0, small.per_token(64) / blocks)
    tokens = int(max(64, min(MOST_TOKENS, most)) * share)
    layers = small.layers
    if given.get("solves"):
        layers = _solvable(layers)
    text = None if job.text is None else _few(job.text, tokens)
    windows = None if job.windows is None else _window(job.windows, tokens)
    return Job(model, layers, text, windows, {**job.given, **given}, job.budget)


def _few(text: "CalibrationSet", tokens: int) -> "CalibrationSet":
    """Return the starts of up to 16 sequences."""
    from entangle.texts.calibration_set import CalibrationSet

    n = min(16, text.n_seq)
    ids = text.ids[:n, : max(8, tokens // n)].contiguous()
    return CalibrationSet(ids, text.source, text.settings)


def _window(text: "EvaluationText", tokens: int) -> "EvaluationText":
    from entangle.evaluation import EvaluationText

    length = min(text.seq_len, max(8, tokens // 2))
    n = min(2, text.n_windows)
    ids = text.windows[:n, :length].contiguous()
    return EvaluationText(ids, text.source, text.settings, around=text.around)


def _solvable(layers: "tuple[Layer, ...]") -> "tuple[Layer, ...]":
    """Leave out layers that take long to solve, if others are left."""
    cheap = tuple(one for one in layers if _solving(one) <= SOLVED)
    least = min(map(_solving, layers), default=0.0)
    return cheap or tuple(one for one in layers if _solving(one) == least)[:2]


def _solving(layer: "Layer", rows: float | None = None) -> float:
    """Return the multiplications of solving some rows of a layer once, all by default."""
    rows = layer.out_features if rows is None else rows
    return layer.in_features**2 * (layer.in_features + rows)


@contextmanager
def _peak(device: Any) -> Iterator[Callable[[], tuple[int, int]]]:
    """Watch the most memory of the block: of the process, and of a GPU."""
    import torch

    give_back()
    with suppress(OSError):
        _HIGH_WATER.write_text("5")
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    yield lambda: (high_water(), torch.cuda.max_memory_allocated(device) if gpu else 0)


def high_water() -> int:
    """Return the most bytes that this process has held."""
    from entangle.runs.provenance import peak_memory_bytes

    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes()


def spent(subject: Subject, job: Job, folder: Path) -> Spent:
    """Do a job, and return what it took."""
    with _peak(job.model.device) as peak:
        cpu, wall = time.process_time(), time.perf_counter()
        found = subject.run(job, folder / "made")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        del found
        host, device = peak()
    disk = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    shutil.rmtree(folder / "made", ignore_errors=True)
    return Spent(cpu, wall, host, device, disk)


def fitted(
    counts: Sequence[Mapping[str, float]], found: Sequence[float], job: Mapping[str, float]
) -> float:
    """Return what a job takes, by what trials with other counts took.

    Parameters
    ----------
    counts
        Of each trial, by name.
    found
        What each took; the relative error counts.
    job
        Counts of the job. One that no trial has is left out.
    """
    import numpy as np
    from scipy.optimize import nnls

    names = ["start", *{name: None for one in counts for name in one}]
    table = np.array([[1.0, *(one.get(name, 0.0) for name in names[1:])] for one in counts])
    scale = table.max(0)
    kept = scale > 0
    table, scale = table[:, kept] / scale[kept], scale[kept]
    wanted = np.array([1.0, *(job.get(name, 0.0) for name in names[1:])])[kept] / scale
    target = np.maximum(np.array(found, float), 1e-9)
    solved, _ = nnls(table / target[:, None], np.ones(len(target)))
    return float(wanted @ solved)


def estimate(subject: Subject, job: Job, *, before: tuple[float, float, int]) -> tuple[Spent, float]:
    """Return what a job will take, and the seconds that finding it took.

    Parameters
    ----------
    subject, job
        What is to be done.
    before
        Processor and wall seconds, and most bytes, of what comes before it (imports, loading).
    """
    begin = time.perf_counter()
    trials = [
        _cut(job, blocks, share, {**given, "solves": True})
        for given in subject.sizes(job)
        for blocks, share in ((1, 0.25), (1, 1.0), (2, 0.25), (2, 1.0))
    ]
    hashing, base, n_bytes = _hashed(trials, job), _resident(job), _weights_bytes(job)
    with tempfile.TemporaryDirectory(prefix="entangle-dry-") as name:
        warm = spent(subject, trials[0], Path(name))
        took = [spent(subject, one, Path(name)) for one in trials]
    counts, whole = [subject.counts(one) for one in trials], subject.counts(job)
    times = [one.time for one in counts]
    gpu = job.model.device.type == "cuda"
    measured = [one.wall if gpu else one.cpu for one in took]
    first = max(0.0, (warm.wall if gpu else warm.cpu) - measured[0])
    seconds = first + hashing + fitted(times, measured, whole.time)
    ratio = 1.0 if gpu else sum(one.wall for one in took) / max(1e-9, sum(measured))
    peaks = [one.peak for one in counts]
    host = [max(1.0, one.peak - base - c.held) for one, c in zip(took, counts, strict=True)]
    device = [max(1.0, one.device - c.held) for one, c in zip(took, counts, strict=True)]
    disk = [max(1.0, one.disk - c.written) for one, c in zip(took, counts, strict=True)]
    on_gpu = int(n_bytes + whole.held + fitted(peaks, device, whole.peak)) if gpu else 0
    in_ram = fitted(peaks, host, whole.peak) + (0.0 if gpu else whole.held)
    found = Spent(
        cpu=before[0] + seconds,
        wall=before[1] + seconds * ratio,
        peak=int(max(before[2], base + in_ram)),
        device=on_gpu,
        disk=int(whole.written + fitted([one.disk for one in counts], disk, whole.disk)),
    )  # fmt: skip
    return found, time.perf_counter() - begin


def _resident(job: Job) -> int:
    """Return the bytes of the process with all of the model that is to lie in RAM."""
    import psutil

    give_back()
    rss = int(psutil.Process().memory_info().rss)
    parameters = [p for p in job.model.module.parameters() if p.device.type == "cpu"]
    return max(rss, sum(p.numel() * p.element_size() for p in parameters))


def _weights_bytes(job: Job) -> int:
    return sum(p.numel() * p.element_size() for p in job.model.module.parameters())


def _hashed(trials: Sequence[Job], job: Job) -> float:
    """Give the trials' models their digests; return what that of the whole model will take."""
    found = 0.0
    for number, one in enumerate(trials):
        begin = time.process_time()
        assert one.model.digest  # noqa: S101
        if number == 0:
            found = (time.process_time() - begin) / max(1, _weights_bytes(one))
    return found * _weights_bytes(job)


# --- the commands -------------------------------------------------------------------------------


def _stored(job: Job, *, records: "Sequence[Layer]", states: int = 2) -> float:
    """Return the bytes of hidden states and of records, which spill beyond the budget."""
    size = job.model.dtype.itemsize
    held = states * (job.tokens + job.evaluated) * job.width * size
    return float(min(job.budget, held + sum(job.tokens * one.in_features for one in records) * size))


def _pass(job: Job) -> float:
    """Return the numbers of a pass: tokens at once times the widest activation."""
    widest = max((max(one.shape) for one in job.layers), default=1)
    tokens = 0 if job.text is None else min(job.tokens, job.text.per_pass * job.text.seq_len)
    return float(max(tokens, _window_tokens(job)) * widest)


def _window_tokens(job: Job) -> int:
    from entangle.evaluation.perplexity import windows_by_default

    if job.windows is None:
        return 0
    asked = job.given.get("batch_size")
    at_once = asked or windows_by_default(job.windows.seq_len, job.model.vocab_size)
    return min(job.windows.n_windows, at_once) * job.windows.seq_len


def _logits(job: Job) -> float:
    return float(_window_tokens(job) * job.model.vocab_size)


def _names(job: Job) -> dict[str, Any]:
    return {"layers": [one.name for one in job.layers], "proj": None}


def _run_score(job: Job, out: Path) -> object:
    from entangle.scoring.score import score

    found = score(
        job.model, job.text, **_names(job), method=job.given["method"], md=job.given["md"],
        memory=job.given["memory"], batch_size=job.given["batch_size"], progress=False,
    )  # fmt: skip
    found.save(out)
    return found


def _count_score(job: Job) -> Counts:
    from entangle.memory import work_bytes

    held = 0.0
    if job.given["method"] == "exact":
        work = work_bytes(job.budget)
        largest = max(one.out_features for one in job.layers) * job.tokens * 16
        held = min(job.budget - work, _stored(job, records=job.inputs, states=0))
        held += min(work, largest)
    time_of = {
        "forward": job.forward(1), "outputs": float(job.tokens * job.neurons),
        "neurons": float(job.neurons),
    }  # fmt: skip
    peak = {"pass": _pass(job), "neurons": float(job.neurons)}
    return Counts(time_of, peak, {"neurons": float(job.neurons)}, held=held, passes=(1, 0))


def _run_evaluate(job: Job, out: Path) -> object:
    from entangle.cli.evaluate import DENSE, KIND, save
    from entangle.evaluation import evaluate_models, perplexity_table
    from entangle.runs.provenance import make_manifest

    assert job.windows is not None  # noqa: S101
    found = evaluate_models(
        [(DENSE, job.model)], job.windows, batch_size=job.given["batch_size"], progress=False
    )
    manifest = make_manifest(
        KIND, models={DENSE: job.model.describe()}, evaluation=job.windows.describe()
    )
    save(str(out), perplexity_table(found), found, manifest, force=False)
    return found


def _count_evaluate(job: Job) -> Counts:
    """Count windows, and the first one's start twice: with its special tokens and without."""
    assert job.windows is not None  # noqa: S101
    twice = 1 + 2 * min(512, job.windows.seq_len) / job.evaluated
    time_of = {"forward": job.forward(0, twice), "head": twice * job.evaluated * job.head}
    peak = {"pass": _pass(job), "logits": _logits(job)}
    return Counts(time_of, peak, {"windows": float(job.windows.n_windows)}, passes=(0, 1))


def _run_build(job: Job, out: Path) -> object:
    from entangle.experts.expand import expand
    from entangle.experts.prune import prune

    own = job.given
    settings = {**own["build"], **_names(job), "memory": own["memory"], "progress": False}
    if own["plain"]:
        return prune(job.model, job.text, evaluation=job.windows, out=out, **settings)
    return expand(
        job.model, job.text, evaluation=job.windows, out=out, experts=own["experts"], keep=False,
        router=own["router"], format=own["format"], values=own["values"], **settings,
    )  # fmt: skip


def _built(job: Job, experts: float, *, evaluated: float) -> dict[str, float]:
    """Count what building all layers with some experts takes."""
    wide = float(sum(one.in_features**2 for one in job.inputs))
    return {
        "forward": job.forward(2, evaluated),
        "gram": job.tokens * wide,
        "solve": sum(_solving(one) for one in job.layers) * experts,
        "cluster": job.tokens * float(len(job.inputs)) * experts if experts > 1 else 0.0,
        "router": float(len(job.inputs)) if experts > 1 else 0.0,
        "head": evaluated * job.evaluated * job.head,
    }


def _count_build(job: Job) -> Counts:
    own, k = job.given, float(job.given["experts"])
    time_of = _built(job, k, evaluated=float(job.windows is not None))
    for experts in own.get("beside", ()):  # plain pruning, measured as well
        more = _built(job, experts, evaluated=1.0)
        time_of = {name: value + more[name] for name, value in time_of.items()}
    if own.get("dense"):
        time_of["forward"] += job.forward(0, 1)
        time_of["head"] += job.evaluated * job.head
    size = job.model.dtype.itemsize
    weights = [math.prod(one.shape) for one in job.layers]
    by_block: dict[int | None, int] = {}
    for one in job.layers:
        by_block[one.block] = by_block.get(one.block, 0) + math.prod(one.shape)
    records = [one for one in job.inputs if one.block == job.inputs[0].block]
    held = _stored(job, records=records)
    dense = _weights_bytes(job)
    if own["plain"]:
        held += sum(weights) * size
        written, disk = dense, {"layers": float(len(weights))}
    else:
        written, disk = dense - sum(weights) * size, {"experts": k * sum(weights)}
    peak = {
        "pass": _pass(job), "logits": _logits(job),
        "grams": k * max(one.in_features**2 for one in job.layers),
        "experts": k * max(by_block.values()),
    }  # fmt: skip
    passes = (2.0 + 2 * len(own.get("beside", ())), float(bool(job.evaluated)) * (
        1 + len(own.get("beside", ())) + bool(own.get("dense"))))  # fmt: skip
    return Counts(time_of, peak, disk, held=held, written=float(written), passes=passes)


def _sizes_build(job: Job) -> list[dict[str, Any]]:
    """Vary the experts: two and three in place of many."""
    k = int(job.given["experts"])
    own = {"beside": (), "dense": False}
    return [{**own, "experts": one} for one in ((k,) if k <= 2 else (2, min(k, 4)))]


def _run_compare(job: Job, out: Path) -> object:
    from entangle.experiments.compare import compare

    own = job.given
    return compare(
        job.model, job.text, job.windows, methods=own["methods"], sparsity=own["sparsity"],
        experts=own["experts"], memory=own["memory"], out=out, progress=False, **own["masks"],
    )  # fmt: skip


def _count_compare(job: Job) -> Counts:
    from entangle.activation import ACTIVATION_METHODS
    from entangle.experiments.compare import DSNOT, arms

    own = job.given
    planned = own.get("arms") or arms(own["methods"], own["sparsity"], own["experts"])
    time_of: dict[str, float] = {
        "arms": float(len(planned)), "forward": job.forward(0, 1),
        "head": job.evaluated * job.head * (1 + len(planned)),
    }  # fmt: skip
    passes, fits = 0.0, set[str]()
    for arm in planned:
        name = arm.method
        if name in ACTIVATION_METHODS:
            time_of[f"masks {name}"] = time_of.get(f"masks {name}", 0.0) + job.forward(0, 1)
            if name not in fits:
                time_of[f"fit {name}"] = job.forward(1)
            passes, fits = passes + (name not in fits), {*fits, name}
            continue
        kind = "solve" if name.startswith("expansion") else f"solve {name}"
        for key, value in _built(job, arm.experts, evaluated=1.0).items():
            if key != "head":
                key = kind if key == "solve" else key
                key = f"{key} {name}" if name.startswith(DSNOT) and key == "gram" else key
                time_of[key] = time_of.get(key, 0.0) + value
        passes += 2
    k = max((arm.experts for arm in planned), default=1)
    built = _count_build(replace(job, given={"experts": k, "plain": False}))
    return Counts(
        time_of, built.peak, {"arms": float(len(planned)), "windows": len(planned) * job.evaluated},
        held=built.held, passes=(passes, 1.0 + len(planned)),
    )  # fmt: skip


def _sizes_compare(job: Job) -> list[dict[str, Any]]:
    """One trial a method; several numbers of experts where a router is fitted."""
    found: list[dict[str, Any]] = []
    for method in job.given["methods"]:
        routed = method.startswith("expansion")
        for k in (2, 4) if routed else (1,):
            found.append({
                "methods": [method], "sparsity": job.given["sparsity"][:1], "experts": [k],
                "arms": None,
            })  # fmt: skip
    return found


def _run_decompose(job: Job, out: Path) -> object:
    from entangle.modes.decompose import decompose

    own = job.given
    found = decompose(
        job.model, job.text, **_names(job), experts=own["experts"], memory=own["memory"],
        progress=False, **own["settings"],
    )  # fmt: skip
    found.save(out)
    return found


def _count_decompose(job: Job) -> Counts:
    experts = job.given["experts"]
    last = max((one.block or 0 for one in job.layers), default=0) + 1
    routed = [k for k in experts if k > 1]
    time_of = {
        "forward": job.forward(last / len(job.weights)),
        "solve": sum(_solving(one) for one in job.layers) * float(sum(experts)),
        "outputs": float(job.tokens * job.neurons * (1 + len(experts))),
        "cluster": float(job.tokens * len(job.inputs) * sum(routed)),
        "products": float(job.tokens * len(experts) * sum(math.prod(o.shape) for o in job.layers)),
        "layers": float(len(job.layers)),
        "parts": float(len(job.layers) * len(experts)),
    }  # fmt: skip
    largest = max(job.layers, key=lambda one: math.prod(one.shape))
    rows = math.prod(largest.shape) * float(sum(experts))
    peak = {
        "pass": _pass(job), "rows": rows, "grams": max(experts) * largest.in_features**2,
        "outputs": float(largest.out_features * job.tokens),
    }  # fmt: skip
    disk = {"layers": float(len(job.layers)), "parts": float(len(job.layers) * len(experts)),
            "tokens": float(len(job.layers) * sum(experts))}  # fmt: skip
    held = _stored(job, records=job.inputs, states=0)
    return Counts(time_of, peak, disk, held=held, passes=(last / len(job.weights), 0))


def _sizes_decompose(job: Job) -> list[dict[str, Any]]:
    experts = job.given["experts"]
    few = [k for k in experts if k <= 4] or experts[:1]
    return [{"experts": few}, {"experts": few[:1]}] if len(few) > 1 else [{"experts": few}]


def _run_ablate(job: Job, out: Path) -> object:
    from entangle.cli.ablate import save_figures
    from entangle.experiments.ablate import ablate

    own = job.given
    return ablate(
        job.model, job.text, evaluation=job.windows, **_names(job), out=out, memory=own["memory"],
        selections=own["selections"], strengths=own["strengths"], experts=own["experts"],
        seeds=own["seeds"], extra=save_figures, progress=False, **own["settings"],
    )  # fmt: skip


def _count_ablate(job: Job) -> Counts:
    from entangle.experiments.arms import PRUNERS

    own, known = job.given, job.given["settings"]
    columns = len(known["by"])
    picked = sum(
        columns if one in ("top", "bottom") else 1 if one == "all" or not isinstance(one, str)
        else own["seeds"] for one in own["selections"]
    )  # fmt: skip
    routers, arms, routed = len(known["router"]), 0, 0.0
    pruned = [one for one in known["interventions"] if one in PRUNERS]
    for one in known["interventions"]:
        levels = len(own["strengths"] if one in PRUNERS else known["edit_strengths"])
        counts = [routers if k > 1 else 1 for k in own["experts"]] if one in PRUNERS else [1]
        arms += picked * levels * sum(counts)
    share = min(1.0, (known.get("fraction") or 0.03) * picked)
    rows = {one.name: share * one.out_features * len(own["strengths"]) for one in job.layers}
    solve = sum(_solving(one, rows[one.name]) for one in job.layers)
    several = [k for k in own["experts"] if k > 1]
    if several and pruned:
        routed = len(pruned) * routers * solve * float(1 + sum(several))
    evaluated = 1.0 + arms
    scored = own.get("scores") is None
    fits = bool(several) * len(pruned) * routers
    wide = float(sum(one.in_features**2 for one in job.inputs))
    time_of = {
        "forward": job.forward(1 + fits, evaluated), "head": evaluated * job.evaluated * job.head,
        "arms": float(arms), "outputs": float(scored * job.tokens * job.neurons),
        "neurons": float(scored * job.neurons), "gram": job.tokens * wide,
        "solve": solve * len(pruned), "routed": routed,
        "cluster": float(fits * job.tokens * len(job.inputs) * sum(several)),
    }  # fmt: skip
    peak = {"pass": _pass(job), "logits": _logits(job), "neurons": float(job.neurons),
            "grams": wide, "routed": rows and routed and sum(
                rows[o.name] * o.in_features for o in job.layers) * sum(several)}  # fmt: skip
    disk = {"arms": float(arms), "windows": evaluated * job.evaluated,
            "neurons": float(job.neurons)}  # fmt: skip
    return Counts(time_of, peak, disk, passes=(1.0 + fits, evaluated))


def _sizes_ablate(job: Job) -> list[dict[str, Any]]:
    own = job.given
    first = {"strengths": own["strengths"][:1], "seeds": 1, "scores": None}
    texts = [one for one in own["selections"] if isinstance(one, str)] or ["top"]
    found = [
        {**first, "selections": texts[:1], "experts": own["experts"][:1]},
        {**first, "selections": texts, "experts": own["experts"][:1], "strengths": own["strengths"][:2]},
    ]
    several = [k for k in own["experts"] if k > 1]
    return [*found, {**first, "selections": texts[:1], "experts": [min(several)]}] if several else found


# --- what is asked for --------------------------------------------------------------------------


def _text_of(arguments: argparse.Namespace, model: "LanguageModel", name: str | None) -> Any:
    return None if name is None else options.load_evaluation(arguments, model)


def _score_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.models.layers import find_layers
    from entangle.scoring.score import _resolve_method

    spec = options.chosen_layers(arguments, None)
    layers = find_layers(model.module, spec["layers"], spec["proj"])
    text = options.load_calibration(arguments, model)
    memory = options.parse_memory(arguments.memory)
    method = _resolve_method(arguments.method, model, layers, text, memory)
    given = {"method": method, "md": not arguments.no_md, "memory": memory,
             "batch_size": arguments.batch_size}  # fmt: skip
    return Job(model, tuple(layers), text, None, given)


def _evaluate_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.models.layers import find_layers
    from entangle.texts.documents import interpret_escapes

    if arguments.tasks is not None:
        raise InvalidInput("tasks of the harness cannot be told beforehand; drop --dry-run.")
    join = interpret_escapes(arguments.join)
    text = options.load_evaluation(arguments, model, join=join)
    layers = find_layers(model.module, "all", None)
    return Job(model, tuple(layers), None, text, {"batch_size": arguments.batch_size})


def _build_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.cli import expand
    from entangle.models.layers import find_layers

    plain = arguments.command == "prune"
    allocation = expand.allocation_of(arguments)
    expand.check_evaluated(arguments)
    spec = options.chosen_layers(arguments, allocation)
    build = expand.pruning_settings(arguments, allocated=False) | {"seed": arguments.seed}
    experts: float = 1 if plain else arguments.experts
    if allocation is not None:
        build |= {"sparsity": allocation.overall, "pattern": "row"}
        if allocation.experts is not None and not plain:
            experts = round(sum(allocation.experts.values()) / len(allocation.experts))
    text = _text_of(arguments, model, arguments.evaluation)
    given: dict[str, Any] = {
        "build": build, "plain": plain and arguments.packed is None, "experts": experts,
        "memory": options.parse_memory(arguments.memory), "dense": text is not None,
        "format": arguments.packed or "bitmap", "values": None, "router": "kmeans",
    }  # fmt: skip
    if not plain:
        given |= {name: getattr(arguments, name) for name in ("format", "values", "router")}
        beside = text is not None and experts > 1 and not arguments.no_baseline
        given["beside"] = (1,) if beside else ()
    layers = find_layers(model.module, spec["layers"], spec["proj"])
    return Job(model, tuple(layers), options.load_calibration(arguments, model), text, given)


def _compare_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.cli.compare import _sparsities
    from entangle.experiments.compare import arms, common_layers
    from entangle.models.layers import find_layers

    allocations = options.load_allocations(arguments)
    methods, sparsity = options.names(arguments.methods), _sparsities(arguments, allocations)
    experts = options.numbers(arguments.experts, int)
    names = common_layers(allocations)
    layers = find_layers(model.module, names or "all", None if names else "mlp")
    masks = {name: getattr(arguments, name) for name in ("scope", "form", "dense_prefix", "prefix")}
    given = {
        "methods": methods, "sparsity": sparsity, "experts": experts, "masks": masks,
        "memory": options.parse_memory(arguments.memory),
        "arms": arms(methods, sparsity, experts, allocations=allocations),
    }  # fmt: skip
    text = options.load_evaluation(arguments, model)
    return Job(model, tuple(layers), options.load_calibration(arguments, model), text, given)


def _decompose_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.models.layers import find_layers

    if arguments.layer is None:
        raise InvalidInput("`--layer` must name what to decompose; got none.")
    spec = options.chosen_layers(arguments, None)
    layers = find_layers(model.module, spec["layers"], spec["proj"])
    named = ("sparsity", "pruner", "router", "contexts", "token_pairs", "separated", "seed")
    neurons = None if arguments.neurons is None else options.numbers(arguments.neurons, int)
    given = {
        "experts": options.numbers(arguments.experts, int),
        "memory": options.parse_memory(arguments.memory),
        "settings": {name: getattr(arguments, name) for name in named} | {"neurons": neurons},
    }  # fmt: skip
    return Job(model, tuple(layers), options.load_calibration(arguments, model), None, given)


def _ablate_job(arguments: argparse.Namespace, model: "LanguageModel") -> Job:
    from entangle.cli import ablate
    from entangle.models.layers import find_layers

    if arguments.allocation is not None or arguments.match:
        raise InvalidInput("--dry-run knows no --allocation and no --match; leave one out.")
    ablate._default_data(arguments)
    measures = ablate._measures(arguments)
    if "blimp" in measures:
        raise InvalidInput("--dry-run knows no minimal pairs; leave blimp out of --measure.")
    strengths = ablate.STRENGTHS if arguments.strength is None else arguments.strength
    chosen = ablate.SELECTIONS if arguments.select is None else arguments.select
    given = {
        "selections": options.names(chosen), "strengths": options.numbers(strengths, float),
        "experts": options.numbers(arguments.experts, int), "seeds": arguments.seeds,
        "memory": options.parse_memory(arguments.memory), "scores": arguments.scores,
        "settings": {
            "by": options.names(arguments.by), "fraction": arguments.fraction,
            "scope": arguments.scope, "interventions": options.names(arguments.intervention),
            "edit_strengths": options.numbers(arguments.edit_strength, float),
            "router": options.names(arguments.router), "measures": measures,
            "md": not arguments.no_md, "damping": arguments.damping, "seed": arguments.seed,
        },
    }  # fmt: skip
    spec = options.chosen_layers(arguments, None)
    layers = find_layers(model.module, spec["layers"], spec["proj"])
    text = options.load_evaluation(arguments, model)
    return Job(model, tuple(layers), options.load_calibration(arguments, model), text, given)


_BUILD = Subject(_run_build, _count_build, _sizes_build)
COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace, Any], Job], Subject]] = {
    "score": (_score_job, Subject(_run_score, _count_score)),
    "evaluate": (_evaluate_job, Subject(_run_evaluate, _count_evaluate)),
    "prune": (_build_job, _BUILD),
    "expand": (_build_job, _BUILD),
    "compare": (_compare_job, Subject(_run_compare, _count_compare, _sizes_compare)),
    "ablate": (_ablate_job, Subject(_run_ablate, _count_ablate, _sizes_ablate)),
    "decompose": (_decompose_job, Subject(_run_decompose, _count_decompose, _sizes_decompose)),
}
"""Commands that can tell, and how."""


def run(arguments: argparse.Namespace) -> None:
    """Print what a command will take; nothing of it is left.

    Raises
    ------
    MemoryLimit, Unavailable
        If it does not fit, after it was printed.
    """
    import psutil

    from entangle.memory import memory_for
    from entangle.models.blocks import evaluating

    make, subject = COMMANDS[arguments.command]
    model = options.load_model(arguments)
    with evaluating(model.module):
        job = make(arguments, model)
        memory = options.parse_memory(getattr(arguments, "memory", options.AUTO))
        job = replace(job, budget=memory_for(memory, model.module))
        since = time.time() - psutil.Process().create_time()
        before = (time.process_time(), since, high_water())
        found, seconds = estimate(subject, job, before=before)
    show(arguments, job, subject.counts(job), found, seconds)
    refuse(arguments, job, found)


def show(
    arguments: argparse.Namespace, job: Job, counts: Counts, found: Spent, seconds: float
) -> None:
    """Print the estimate."""
    import pandas as pd

    content = {
        "dry_run": arguments.command,
        "tokens": job.tokens, "passes": counts.passes[0],
        "evaluation_tokens": job.evaluated, "evaluation_passes": counts.passes[1],
        "peak_memory_bytes": found.peak, "peak_gpu_memory_bytes": found.device,
        "disk_bytes": found.disk, "seconds": found.wall, "cpu_seconds": found.cpu,
        "measured_seconds": seconds,
    }  # fmt: skip
    rows = [
        ("tokens to calibrate on", f"{job.tokens:,} × {counts.passes[0]:g} passes"),
        ("tokens to evaluate on", f"{job.evaluated:,} × {counts.passes[1]:g} passes"),
        ("peak memory", f"{found.peak / 2**30:.2f} GiB"),
        ("peak GPU memory", f"{found.device / 2**30:.2f} GiB"),
        ("disk", f"{found.disk / 2**20:,.1f} MiB"),
        ("time", f"{found.wall:,.0f} s ({found.cpu:,.0f} s of processors)"),
    ]
    frame = pd.DataFrame(rows, columns=["what", "estimate"])
    arguments.table = None
    title = f"What {arguments.command} will take (measured in {seconds:.0f} s; nothing was written)"
    present(arguments, [Table("estimate", frame, title, keys=("what",))], content)


def refuse(arguments: argparse.Namespace, job: Job, found: Spent) -> None:
    """Refuse what does not fit into memory, GPU or disk, with the remedy."""
    import psutil

    free = free_ram() + int(psutil.Process().memory_info().rss)
    if found.peak > free:
        raise MemoryLimit(_told("memory", found.peak, free))
    gpu = free_on_gpu(job.model.device) + _weights_bytes(job)
    if job.model.device.type == "cuda" and found.device > gpu:
        raise MemoryLimit(_told(f"memory of {job.model.device}", found.device, gpu))
    refuse_disk(arguments.out, found.disk)


def refuse_disk(out: str | os.PathLike[str], needed: int) -> None:
    """Refuse to write more than a disk has room for.

    Raises
    ------
    Unavailable
        Naming the disk.
    """
    from entangle.runs.provenance import expand_user

    place = expand_user(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise Unavailable(
            f"the result takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free on the "
            f"disk of {str(place)!r}; name another place with --out, or make room there."
        )


def _told(what: str, needed: int, free: int) -> str:
    return (
        f"the run takes {needed / 2**30:.2f} GiB of {what} and {free / 2**30:.2f} GiB are free; "
        "bring the weights block by block (--stream), lower --memory, --batch-size, --n-seq or "
        "--seq-len, or take fewer layers at a time (--layer)."
    )
