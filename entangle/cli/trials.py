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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.errors import Unavailable
from entangle.memory import give_back

if TYPE_CHECKING:
    from entangle.evaluation import EvaluationText
    from entangle.models.layers import Layer
    from entangle.models.loading import LanguageModel
    from entangle.texts.calibration_set import CalibrationSet

    Texts = tuple["CalibrationSet | None", "EvaluationText | None"]

Number = int | float

FLOPS = 4e10
"""Most multiplications and additions of a trial's pass over a block."""
SOLVED = 2e11
"""Of a trial's solves, where a layer allows."""
MOST_TOKENS = 2048
"""Of a trial."""
_SHAPES = ((1, 1, 0.25), (1, 1, 1.0), (2, 2, 0.25), (2, 1, 1.0))
"""Blocks of a trial, those of them whose layers are worked on, and the share of the tokens."""
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

    def forward(self, passes: Number, windows: Number = 0.0) -> Number:
        """Return the operations of so many passes of the text, and of the windows."""
        found = 0.0
        for text, times in ((self.text, passes), (self.windows, windows)):
            if text is not None and times:
                n = self.tokens if text is self.text else self.evaluated
                found += times * n * self.per_token(text.seq_len)
        return found

    def per_token(self, seq_len: int) -> Number:
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
    def reached(self) -> Number:
        """Share of the blocks up to the last that holds one of the layers."""
        last = max((one.block for one in self.layers if one.block is not None), default=0)
        return (last + 1) / max(1, len(self.weights))

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
    def head(self) -> Number:
        """Multiplications of the head for one token."""
        return float(self.model.vocab_size * self.width)


@dataclass(frozen=True)
class Counts:
    """What time, memory and disk of a job are linear in, and what is known of them."""

    time: Mapping[str, Number]
    peak: Mapping[str, Number]
    disk: Mapping[str, Number]
    held: Number = 0.0
    """Bytes of memory that are known."""
    written: Number = 0.0
    """Bytes of disk that are known."""
    passes: tuple[Number, Number] = (0, 0)
    """How often the text, and the windows, pass the blocks."""


@dataclass(frozen=True)
class Subject:
    """A command, as its trials see it."""

    run: Callable[[Job, Path], object]
    """Does a job, and writes into a folder that does not exist."""
    counts: Callable[[Job], Counts]
    sizes: Callable[[Job], Sequence[Mapping[str, Any]]] = lambda _job: ({},)
    """What of ``given`` its trials vary; ``shapes`` is how many of the shapes, the last ones,
    and ``tokens`` the share of tokens that these may have."""
    ready: Callable[[Job, Path], Job] = lambda job, _folder: job
    """Makes what a trial finds made, into the folder; that counts for nothing."""


@dataclass(frozen=True)
class Spent:
    """What a job took, or will."""

    cpu: Number
    """Seconds."""
    wall: Number
    """Seconds."""
    peak: int
    """Most bytes of the process."""
    device: int
    """Most bytes on a GPU, 0 without one."""
    disk: int
    """Bytes written and left."""


def first_blocks(model: "LanguageModel", count: int, start: int = 0) -> "LanguageModel":
    """Return a model of so many blocks from one on, sharing all tensors."""
    from entangle.experts.build import structural_copy
    from entangle.models.layers import find_blocks
    from entangle.models.loading import LanguageModel

    module = structural_copy(model.module)
    blocks = find_blocks(module)[1]
    del blocks[start + count :]
    del blocks[:start]
    config: Any = getattr(module, "config", None)
    if hasattr(config, "num_hidden_layers"):
        _shorten(config, start, count)
    return LanguageModel(module, model.tokenizer, model.name, "memory", None)


def _shorten(config: Any, start: int, count: int) -> None:
    """Let a configuration tell of some blocks alone, as do its lists with an item a block.

    Not where a model makes inputs for all of its blocks before them, as Gemma 3n does.
    """
    if getattr(config, "hidden_size_per_layer_input", 0):
        return
    whole = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == whole and "token" not in name:
            setattr(config, name, value[start : start + count])
    config.num_hidden_layers = count


def _endings(model: "LanguageModel", layers: "Sequence[Layer]") -> tuple[int, list[str]]:
    """Return the first block with layers, and their names after it."""
    from entangle.models.layers import find_blocks

    start = find_blocks(model.module)[0]
    first = min((one.block for one in layers if one.block is not None), default=0)
    return first, [one.name[len(f"{start}.{first}.") :] for one in layers if one.block == first]


def _begins(model: "LanguageModel", layers: "Sequence[Layer]") -> int:
    """Return the block that a trial begins with: the first, unless it lacks such layers."""
    from entangle.models.layers import find_blocks, list_layers

    start, (first, endings) = find_blocks(model.module)[0], _endings(model, layers)
    names = {one.name for one in list_layers(model.module)}
    return 0 if all(f"{start}.0.{ending}" in names for ending in endings) else first


def _like(
    model: "LanguageModel", layers: "Sequence[Layer]", endings: Sequence[str], most: int
) -> "tuple[Layer, ...]":
    """Return the layers of a short model that are as those of the first block with some."""
    from entangle.models.layers import find_blocks, list_layers

    own = {layer.name: layer for layer in list_layers(model.module)}
    start = find_blocks(model.module)[0]
    names = [f"{start}.{block}.{ending}" for block in range(most) for ending in endings]
    outside = [one.name for one in layers if one.block is None]
    return tuple(own[name] for name in (*names, *outside) if name in own)


def _cut(job: Job, blocks: int, with_layers: int, share: Number, given: Mapping[str, Any]) -> Job:
    """Return a trial on the first blocks, and a share of the tokens that a trial may have."""
    model = first_blocks(job.model, blocks, _begins(job.model, job.layers))
    endings = _endings(job.model, job.layers)[1]
    small = Job(model, _like(model, job.layers, endings, with_layers), None, None)
    most = FLOPS / max(1.0, small.per_token(64) / blocks)
    tokens = int(max(64, min(MOST_TOKENS, most)) * share * given.get("tokens", 1))
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


def solving(layer: "Layer", rows: Number | None = None) -> Number:
    """Return the multiplications of solving some rows of a layer once, all by default."""
    rows = layer.out_features if rows is None else rows
    return float(layer.in_features**2 * (layer.in_features + rows))


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


def _check_short(trial: Job) -> None:
    """Raise `Unavailable` if a trial's model cannot run at all, since it lacks blocks."""
    from entangle.recording.hooks import forward

    if trial.text is not None:
        ids = trial.text.ids
    elif trial.windows is not None:
        ids = trial.windows.windows
    else:
        return
    try:
        forward(trial.model.module, ids[:1, :8])
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise Unavailable(
            f"{type(trial.model.module).__name__} cannot run with few of its blocks, as the "
            f"trials of --dry-run do ({type(error).__name__}: {error}); run it on little text "
            "instead."
        ) from error


def spent(subject: Subject, job: Job, folder: Path) -> Spent:
    """Do a job, and return what it took."""
    with tempfile.TemporaryDirectory(dir=folder) as before, \
            tempfile.TemporaryDirectory(dir=folder) as name:  # fmt: skip
        own = subject.ready(job, Path(before))
        with _peak(job.model.device) as peak:
            cpu, wall = time.process_time(), time.perf_counter()
            found = subject.run(own, Path(name) / "made")
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del found
            host, device = peak()
        disk = sum(one.stat().st_size for one in Path(name).rglob("*") if one.is_file())
    return Spent(cpu, wall, host, device, disk)


def fitted(
    counts: Sequence[Mapping[str, Number]], found: Sequence[Number], job: Mapping[str, Number]
) -> Number:
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

    names = list({name: None for one in counts for name in one})
    table = np.array([[float(one.get(name, 0)) for name in names] for one in counts])
    scale = table.max(0)
    kept = scale > 0
    table, scale = table[:, kept] / scale[kept], scale[kept]
    wanted = np.array([float(job.get(name, 0)) for name in names])[kept] / scale
    target = np.maximum(np.array(found, float), 1e-9)
    solved, _ = nnls(table / target[:, None], np.ones(len(target)))
    return float(wanted @ solved)


@dataclass(frozen=True)
class Measured:
    """What trials of a subject took."""

    device: str
    trials: Sequence[tuple[Counts, Spent]]
    beside: Sequence[tuple[Counts, Spent]]
    """Of another subject, which tell of some of the same counts."""
    once: Number
    """Processor seconds that the first of all took more."""
    base: int
    """Bytes of the process before them."""
    untouched: int
    """Bytes of weights that were not read before them."""
    ratio: Number
    """Wall seconds a processor second."""

    def told(self, job: Job, counts: Counts) -> Spent:
        """Return what a job with some counts will take, apart from what comes before it."""
        gpu, own = self.device == "cuda", [one for one, _ in self.trials]
        times = [{"start": 1, **one.time} for one in own]
        times += [{"start beside": 1, **one.time} for one, _ in self.beside]
        seconds = [_busy(one, self.device) for _, one in (*self.trials, *self.beside)]
        work = fitted(times, seconds, {"start": 1, **counts.time})
        peaks, held = [{"start": 1, **one.peak} for one in own], {"start": 1, **counts.peak}
        host = [max(1.0, one.peak - self.base - c.held) for c, one in self.trials]
        there = [max(1.0, one.device - c.held) for c, one in self.trials]
        files = [max(1.0, one.disk - c.written) for c, one in self.trials]
        in_ram = fitted(peaks, host, held) + (0.0 if gpu else counts.held)
        on_gpu = weights_bytes(job) + counts.held + fitted(peaks, there, held) if gpu else 0.0
        of_disk = [{"start": 1, **one.disk} for one in own]
        written = counts.written + fitted(of_disk, files, {"start": 1, **counts.disk})
        peak = int(self.base + self.untouched + in_ram)
        return Spent(work, work * self.ratio, peak, int(on_gpu), int(written))


def measure(
    subject: Subject,
    job: Job,
    *,
    beside: "Subject | Sequence[tuple[Counts, Spent]] | None" = None,
) -> tuple[Measured, Number]:
    """Do trials of a job, and return what they took, and seconds of the whole model's digest.

    Parameters
    ----------
    subject, job
        What is to be done.
    beside
        Another subject whose trials tell of some of the same counts, or what these took.
    """
    trials = [
        _cut(job, blocks, with_layers, share, {**given, "solves": True})
        for given in subject.sizes(job)
        for blocks, with_layers, share in _SHAPES[-given.get("shapes", len(_SHAPES)) :]
    ]
    base, untouched = _resident(), _untouched()
    hashing, device = _hashed(trials, job), job.model.device.type
    with tempfile.TemporaryDirectory(prefix="entangle-dry-") as name:
        try:
            warm = spent(subject, trials[0], Path(name))
        except Exception:
            _check_short(trials[0])
            raise
        took = [(subject.counts(one), spent(subject, one, Path(name))) for one in trials]
        others = beside or ()
        if isinstance(beside, Subject):
            few = trials[: len(_SHAPES)]
            others = [(beside.counts(one), spent(beside, one, Path(name))) for one in few]
    assert not isinstance(others, Subject)  # noqa: S101
    busy = [_busy(one, device) for _, one in took]
    once = max(0.0, _busy(warm, device) - busy[0])
    ratio = sum(one.wall for _, one in took) / sum(busy)
    return Measured(device, took, others, once, base, untouched, ratio), hashing


def estimate(
    subject: Subject, job: Job, *, beside: Subject | None = None, before: tuple[Number, Number, int]
) -> tuple[Spent, Number]:
    """Return what a job will take, and the seconds that finding it took.

    Parameters
    ----------
    subject, job, beside
        As in `measure`.
    before
        Processor and wall seconds, and most bytes, of what comes before it (imports, loading).
    """
    begin = time.perf_counter()
    measured, hashing = measure(subject, job, beside=beside)
    own, first = measured.told(job, subject.counts(job)), hashing + measured.once
    found = replace(
        own, cpu=before[0] + first + own.cpu, wall=before[1] + first * measured.ratio + own.wall,
        peak=max(before[2], own.peak),
    )  # fmt: skip
    return found, time.perf_counter() - begin


def _busy(one: Spent, device: str) -> Number:
    """Return the seconds that trials are compared by: the host's waiting tells nothing of it."""
    return max(1e-6, one.wall if device == "cuda" else one.cpu)


def _resident() -> int:
    """Return the bytes of the process."""
    import psutil

    give_back()
    return int(psutil.Process().memory_info().rss)


def _untouched() -> int:
    """Return the bytes of weights that are mapped from their files and have not been read."""
    import psutil

    with suppress(AttributeError, OSError):  # not on every system
        maps = psutil.Process().memory_maps()
        return sum(one.size - one.rss for one in maps if one.path.endswith(".safetensors"))
    return 0


def weights_bytes(job: Job) -> int:
    """Return the bytes of a job's model."""
    return sum(p.numel() * p.element_size() for p in job.model.module.parameters())


def _hashed(trials: Sequence[Job], job: Job) -> Number:
    """Give the trials' models their digests; return what that of the whole model will take."""
    found = 0.0
    for number, one in enumerate(trials):
        begin = time.process_time()
        assert one.model.digest  # noqa: S101
        if number == 0:
            found = (time.process_time() - begin) / max(1, weights_bytes(one))
    return found * weights_bytes(job)
