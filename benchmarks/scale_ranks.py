"""How much faster several processes are than one: GPUs of one host, or CPU cores.

``python -m benchmarks.scale_ranks --gpus 2`` scores every MLP linear of a 7B-shaped model, expands
a 7B-shaped and a 70B-shaped block, and spreads the arms of a comparison; ``--cpus 2`` does the like
with the demo model, one thread a process. One and several processes are measured in turn in the
same processes, of which all but the first wait for the former. Every row is printed as it is
measured, then the table, and for every row where each rank's time went, by phase
(`benchmarks.rank_profile`). ``--parts score,kill`` does some of it, ``kill`` kills a rank in the
middle of an expansion; ``--sequences`` takes fewer tokens; ``--small`` takes the GPUs' parts with
shapes so small that they say nothing of time.

``--arithmetic`` prints what 2 to 64 GPUs send and wait for, from the counts and the rates in this
file; nothing is run.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.rank_profile import Seconds, profile_table, profiled, synchronise

Row = dict[str, Any]
GIB = 2**30
PARTS = ("score", "expand7", "expand70", "compare", "kill")
GOALS = {
    "score": {2: 1.8, 4: 3.4, 8: 6.5}, "expand7": {2: 1.7}, "expand70": {2: 1.7},
    "compare": {2: 1.9},
}  # fmt: skip
CPU_GOALS = {"score": {2: 1.7}, "expand7": {2: 1.5}}


@dataclass(frozen=True)
class Size:
    """How large the parts are."""

    shapes: Mapping[str, tuple[int, int, int, int]]
    """Hidden size, inner size, heads and heads of keys, by the model's name."""
    blocks: int
    """Of the model that is scored."""
    length: int
    """Tokens of a sequence."""
    memory: int
    """Bytes for what is recorded."""


LARGE = Size({"7": (4096, 11008, 32, 32), "70": (8192, 28672, 64, 8)}, 32, 2048, 60 * GIB)
SMALL = Size({"7": (64, 172, 4, 4), "70": (128, 448, 8, 2)}, 4, 64, GIB // 4)


def timed(work: Callable[[], Any], ranks: Any) -> tuple[float, Any, float, Seconds]:
    """Return how long work takes, what it gives, the most processor time of a rank, its phases."""

    def wait() -> None:
        synchronise()
        ranks.exchange(0)

    wait()
    with profiled() as profile:
        begin, used = time.perf_counter(), time.process_time()
        found = work()
        busy = time.process_time() - used
    wait()
    return time.perf_counter() - begin, found, max(ranks.exchange(busy)), profile.seconds


def compared(name: str, work: Callable[[], Any], ranks: Any, same: Callable[..., str]) -> Row:
    """Measure some work on one rank and on all, and compare what comes out."""
    from entangle.ranks import apart

    def alone() -> Any:
        with apart():
            return work() if ranks.rank == 0 else None

    one, first, busy, phases = timed(alone, ranks)
    ranks.traffic.clear()
    many, second, busiest, own = timed(work, ranks)
    sent = ranks.traffic
    moved = (sent["broadcast"] + sent["reduced"]) / GIB
    waits = ranks.exchange(sent["waited"])
    note = f"{moved:.2f} GiB sent and received; waited {min(waits):.1f} to {max(waits):.1f} s"
    note += f"; processor time {busy:.1f} s against {busiest:.1f} s a rank"
    if ranks.rank == 0:
        note = f"{same(first, second)}; {note}"
    every = {f"rank {rank}": found for rank, found in enumerate(ranks.exchange(own))}
    return row(name, ranks.size, one, many, note) | {"phases": {"one": phases} | every}


def row(name: str, size: int, one: float, many: float, note: str) -> Row:
    """Describe one measurement."""
    import torch

    goals = GOALS if torch.cuda.is_available() else CPU_GOALS
    goal = goals.get(name, {}).get(size)
    ratio = one / many
    met = "" if goal is None else ("yes" if ratio >= goal else "no")
    return {
        "work": name, "ranks": size, "one": f"{one:.2f} s", "all": f"{many:.2f} s",
        "times as fast": f"{ratio:.2f}", "goal": "" if goal is None else f"≥ {goal}", "met": met,
        "note": note,
    }  # fmt: skip


def llama(shape: str, blocks: int, size: Size) -> Any:
    """Return a Llama of one of the shapes, random bfloat16 weights, the same on every rank."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from entangle.models.loading import as_language_model

    hidden, inner, heads, keys = size.shapes[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=keys, vocab_size=32000,
        max_position_embeddings=4096,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return as_language_model(LlamaForCausalLM(config).train(mode=False))
    finally:
        torch.set_default_dtype(before)


def random_tokens(sequences: int, length: int = 2048, vocabulary: int = 32000) -> Any:
    """Return sequences of random tokens."""
    import torch

    from entangle.texts.calibration_set import CalibrationSet

    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (sequences, length), generator=rng)
    return CalibrationSet(ids, "ids", {})


def same_scores(first: Any, second: Any) -> str:
    """Tell whether two scores are equal to the bit."""
    equal = first.frame.equals(second.frame) and first.layers.equals(second.layers)
    equal &= all(
        (first.histograms[n].counts == h.counts).all() for n, h in second.histograms.items()
    )
    return "tables equal to the bit" if equal else "TABLES DIFFER"


def same_experts(first: Any, second: Any) -> str:
    """Tell how many of the experts' zeros two expansions share."""
    equal = total = 0
    exact = True
    others = dict(second.model.module.named_parameters())
    for name, weight in first.model.module.named_parameters():
        if weight.ndim == 3:
            equal += int(((weight == 0) == (others[name] == 0)).sum())
            total += weight.numel()
            exact &= bool((weight == others[name]).all())
    return f"masks {equal / total:.4%} equal" + (", weights equal to the bit" if exact else "")


def same_tables(first: Any, second: Any) -> str:
    """Tell whether two comparisons have one table."""
    frames = [one.frame.drop(columns="seconds") for one in (first, second)]
    return "tables equal to the bit" if frames[0].equals(frames[1]) else "TABLES DIFFER"


def measure_gpu(part: str, ranks: Any, sequences: int, size: Size) -> Row:
    """Measure one part on GPUs."""
    import torch

    from entangle.experts.expand import expand
    from entangle.scoring.score import score

    text = partial(random_tokens, length=size.length)
    if part == "score":
        model = llama("7", size.blocks, size)
        settings: Any = {"memory": size.memory // 8, "progress": False}
        run: Any = partial(score, model, proj="mlp", method="sketch", **settings)
        run(text(4 * ranks.size))  # kernels are compiled, ranks connected
        return compared(part, lambda: run(text(sequences)), ranks, same_scores)
    if part == "compare":
        return measure_arms(ranks, sequences // 4, size)
    model = llama(part.removeprefix("expand"), 1, size)
    settings = {
        "experts": 16, "sparsity": 0.5, "pattern": "block", "memory": size.memory,
        "progress": False,
    }  # fmt: skip
    expand(model, text(16), **settings)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ids = text(sequences if part == "expand7" else sequences // 4)
    return compared(part, lambda: expand(model, ids, **settings), ranks, same_experts)


def measure_arms(ranks: Any, sequences: int, size: Size) -> Row:
    """Measure a comparison of eight arms of equal cost."""
    from entangle.evaluation import EvaluationText
    from entangle.experiments.compare import compare

    model, text = llama("7", 1, size), partial(random_tokens, length=size.length)
    evaluation = EvaluationText(text(8).ids, "ids", {})
    arms: Any = {
        "methods": ("expansion",),
        "sparsity": [0.2 + 0.1 * i for i in range(8)],
        "experts": 16,
    }
    work = partial(compare, model, text(sequences), evaluation, **arms, progress=False)
    compare(model, text(8), evaluation, "wanda", sparsity=0.5, progress=False)
    return compared("compare", work, ranks, same_tables)


def measure_cpu(part: str, ranks: Any, sequences: int) -> Row:
    """Measure one part on CPU cores, with the demo model."""
    from entangle.experts.expand import expand
    from entangle.models.loading import load_model
    from entangle.scoring.score import score

    model = load_model("demo", device="cpu")
    text = random_tokens(sequences, 512, model.vocab_size)
    if part == "score":
        run = partial(score, model, layers="all", method="sketch", batch_size=1, progress=False)
        run(random_tokens(2, 32, model.vocab_size))
        return compared(part, lambda: run(text), ranks, same_scores)
    settings: Any = {"layers": [0, 1], "experts": 16, "progress": False}
    return compared(part, lambda: expand(model, text, **settings), ranks, same_experts)


def inside(parts: Sequence[str], sequences: int, *, small: bool) -> None:
    """Measure, as one of the ranks; the first writes each row."""
    import torch

    from entangle import ranks

    torch.set_num_threads(torch.get_num_threads() if torch.cuda.is_available() else 1)
    with ranks.started(ranks.place_of(os.environ)) as here:
        measure: Callable[[str, Any, int], Row] = measure_cpu
        if small or torch.cuda.is_available():
            measure = partial(measure_gpu, size=SMALL if small else LARGE)
        for part in parts:
            found = measure(part, here, sequences)
            if here.rank == 0:
                print(json.dumps(found), flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def torchrun(size: int, *command: str, **settings: Any) -> "subprocess.Popen[str]":
    """Start a module on so many ranks of this host."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m"]
    return subprocess.Popen([*start, *command], text=True, **settings)


def kill(size: int, *, cpu: bool) -> Iterator[Row]:
    """Kill the last rank when an expansion has its first block, and go on with one process."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        command = _small_expansion(home, cpu=cpu)
        out = home / "killed"
        run = torchrun(size, "entangle", *command, "--out", str(out), stderr=subprocess.PIPE)
        end = time.monotonic() + 300
        while not list(home.glob(".killed.building/block-*.safetensors")):
            if run.poll() is not None or time.monotonic() > end:
                break
            time.sleep(0.05)
        victim = _rank_of(run.pid, size - 1)
        begin = time.perf_counter()
        if victim is not None:
            os.kill(victim, 9)
        said = run.communicate()[1]
        ended = time.perf_counter() - begin
        lines = [line for line in said.splitlines() if line.startswith("entangle:")]
        resumed = _alone(*command, "--out", str(out), "--resume")
        whole = _alone(*command, "--out", str(home / "whole"))
        note = (
            f"{len(lines)} line: {' | '.join(lines)}; exit {run.returncode}; ended in {ended:.1f} s"
        )
        equal = digests(out) == digests(home / "whole")
        yield {
            "work": "kill", "ranks": size, "one": f"{whole:.1f} s", "all": f"{resumed:.1f} s",
            "times as fast": "", "goal": "same bytes", "met": "yes" if equal else "no",
            "note": note,
        }  # fmt: skip


def _small_expansion(home: Path, *, cpu: bool) -> list[str]:
    """Write a model of four blocks and its tokens; return the command that expands it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 64 if cpu else 1024
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=6, vocab_size=1000,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(home / "model")
    ids = random_tokens(32, 512, 1000).ids
    save_file({"ids": ids}, home / "ids.safetensors")
    text = ["--calibration", str(home / "ids.safetensors")]
    device = ["--device", "cpu"] if cpu else []
    return ["expand", str(home / "model"), *text, "--experts", "8", *device, "--quiet"]


def _alone(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "entangle", *command], check=True, capture_output=True)
    return time.perf_counter() - begin


def _rank_of(parent: int, rank: int) -> int | None:
    """Return the process of a rank among the children of torchrun."""
    import psutil

    for child in psutil.Process(parent).children(recursive=True):
        if child.environ().get("LOCAL_RANK") == str(rank):
            return int(child.pid)
    return None


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a result, but for what tells of the run."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


@contextmanager
def _one_thread(*, cpu: bool) -> Iterator[None]:
    if cpu:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    yield


def arithmetic() -> pd.DataFrame:
    """Return what ranks send for one 7B-shaped block of 16 experts and for its scores, and when.

    Rates, of one H200 host with NVLink and of hosts joined by 50 GB/s a GPU: bytes are divided by
    them; work is what one H200 took (docs/LOG.md), of which the fit of a router is not shared out.
    Outputs near a Gaussian's reach about a fifth of the bins, and no others are sent.
    """
    tokens, k, (hidden, inner, *_) = 128 * 2048, 16, LARGE.shapes["7"]
    inputs, experts = 2 * tokens * (hidden + inner), 2 * k * 3 * hidden * inner
    bins = 4 * (2 * inner + hidden) * (0.2 * (1536 + 8 * 192) + 192)
    block, fit, batches, scores = 2.9, 0.26, 64, 9.0
    found = []
    for size in (1, 2, 4, 8, 16, 32, 64):
        rate = 150e9 if size <= 8 else 50e9
        moved = 0 if size == 1 else inputs + experts
        solve = (block - fit - 0.15) * -(-k // min(size, k)) / k
        expand = fit + 0.15 + solve + moved / rate
        passes = -(-batches // size)
        score = (
            (scores - 0.3) * passes / batches + 0.3 / size + (32 * bins / rate if size > 1 else 0)
        )
        found.append(
            {"GPUs": size, "block, GB received a GPU": f"{moved / 1e9:.1f}",
             "block, s": f"{expand:.2f}", "times as fast": f"{block / expand:.1f}",
             "scores, GB reduced": f"{32 * bins / 1e9 if size > 1 else 0:.1f}",
             "scores, s": f"{score:.2f}", "scores, times": f"{scores / score:.1f}"}
        )  # fmt: skip
    return pd.DataFrame(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpus", type=int, help="how many GPUs of this host")
    kind.add_argument("--cpus", type=int, help="how many processes of one thread")
    kind.add_argument("--arithmetic", action="store_true", help="print the table of up to 64 GPUs")
    kind.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--parts", help=f"of {', '.join(PARTS)} (default: all but kill; cpus: score, expand7, kill)"
    )
    parser.add_argument(
        "--sequences", type=int,
        help="of 2,048 tokens (default: 128; cpus: 32 of 512; a quarter for expand70, compare)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="the GPUs' parts, in tiny shapes")
    given = parser.parse_args(arguments)
    if given.arithmetic:
        print(arithmetic().to_string(index=False))
        return 0
    cpu = given.cpus is not None
    usual = "score,expand7,kill" if cpu and not given.small else ",".join(PARTS[:-1])
    parts = (given.parts or usual).split(",")
    sequences = given.sequences or (32 if cpu else 128)
    if given.inside:
        inside(parts, sequences, small=given.small)
        return 0
    rows: list[Row] = []
    size = given.cpus if cpu else given.gpus
    with _one_thread(cpu=cpu):
        for row in _measured(parts, size, sequences, cpu=cpu, small=given.small):
            print({name: one for name, one in row.items() if name != "phases"}, flush=True)
            rows.append(row)
    _print(rows)
    print(f"load average: {os.getloadavg()[0]:.1f}; {os.cpu_count()} cores", flush=True)
    return 0 if all(row["met"] != "no" for row in rows) else 1


def _print(rows: Sequence[Row]) -> None:
    """Print the table, what was sent and found equal, and where the time went."""
    table = pd.DataFrame(rows).drop(columns=["phases", "note"], errors="ignore")
    print(f"\n{table.to_string(index=False)}\n", flush=True)
    for row in rows:
        print(f"{row['work']}: {row['note']}")
    for row in rows:
        if row.get("phases"):
            print(f"\n{row['work']}: seconds by phase (processor time of the leading thread)")
            print(profile_table(row["phases"]).to_string(), flush=True)


def _measured(
    parts: Sequence[str], size: int, sequences: int, *, cpu: bool, small: bool
) -> Iterator[Row]:
    """Yield the rows of all parts; what fails is a row too."""
    plain = [part for part in parts if part != "kill"]
    if plain:
        own = ["--inside", "--parts", ",".join(plain), "--sequences", str(sequences)]
        own += ["--small"] if small else []
        run = torchrun(size, "benchmarks.scale_ranks", *own, stdout=subprocess.PIPE)
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", flush=True)
        if run.wait():
            yield {"work": "ranks", "met": "no", "note": f"ended with status {run.returncode}"}
    if "kill" in parts:
        yield from kill(size, cpu=cpu)


if __name__ == "__main__":
    raise SystemExit(main())
