"""What a command will take, from its own work on a few tokens and blocks.

Time, memory and disk of a run are sums of a few counts (multiplications of the blocks, of the head,
of grams and solves, outputs, arms), each times what one of them takes here and now. That is
measured: the command's own function runs on copies of the model that end after one and two blocks,
on little text, into a folder that goes again; the least squares of what was measured, none below
zero (Lawson and Hanson, 1974), give each count's share. Bytes that are known (hidden states,
records, files of weights) are added as they are. Processor seconds are told from one another; wall
time is theirs times the ratio that the trials had.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.memory import give_back

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
    cheap = tuple(one for one in layers if solving(one) <= SOLVED)
    least = min(map(solving, layers), default=0.0)
    return cheap or tuple(one for one in layers if solving(one) == least)[:2]


def solving(layer: "Layer", rows: float | None = None) -> float:
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


def estimate(
    subject: Subject, job: Job, *, before: tuple[float, float, int]
) -> tuple[Spent, float]:
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
    hashing, base, n_bytes = _hashed(trials, job), _resident(job), weights_bytes(job)
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


def weights_bytes(job: Job) -> int:
    """Return the bytes of a job's model."""
    return sum(p.numel() * p.element_size() for p in job.model.module.parameters())


def _hashed(trials: Sequence[Job], job: Job) -> float:
    """Give the trials' models their digests; return what that of the whole model will take."""
    found = 0.0
    for number, one in enumerate(trials):
        begin = time.process_time()
        assert one.model.digest  # noqa: S101
        if number == 0:
            found = (time.process_time() - begin) / max(1, weights_bytes(one))
    return found * weights_bytes(job)
