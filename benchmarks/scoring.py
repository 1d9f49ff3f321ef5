"""How long scoring takes, against the published way and against the bare forward pass.

``python -m benchmarks.scoring`` prints one table. Answers are compared before a time is printed.
The published way (one process a core): standardise, then ``scipy.stats.wasserstein_distance``
against one normal sample of the same length.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import pandas as pd
import torch
from scipy.stats import wasserstein_distance

from entangle.runs.provenance import package_versions, peak_memory_bytes
from entangle.stats.sketch import OutputSketch
from entangle.stats.wasserstein import shape_statistics

TOKENS = 131_072
GROUPS = 8


def seconds(work: Callable[[], object]) -> float:
    """Time one call, the device's queue drained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def published_wd(outputs: np.ndarray) -> float:
    """Score one neuron as the published code does."""
    standardised = (outputs - outputs.mean()) / outputs.std()
    sample = np.random.default_rng().standard_normal(len(outputs))
    return float(wasserstein_distance(standardised, sample))


def make_outputs(neurons: int, *, seed: int = 0) -> torch.Tensor:
    """Return outputs of shape (neurons, TOKENS): Gaussian, skewed, heavy-tailed and bimodal."""
    rng = torch.Generator().manual_seed(seed)
    outputs = torch.randn(neurons, TOKENS, generator=rng)
    outputs[1::4] = outputs[1::4].exp()
    outputs[2::4] *= 1 + outputs[2::4].square()
    outputs[3::4] += 4 * (torch.rand(outputs[3::4].shape, generator=rng) < 0.2)
    return outputs


def sketch_wd(outputs: torch.Tensor) -> torch.Tensor:
    """Score neurons with the sketch, fed as a forward pass of 4,096 tokens at a time would."""
    sketch = OutputSketch(outputs.shape[1], n_groups=GROUPS)
    per_group = outputs.shape[0] // GROUPS
    for group, part in enumerate(outputs.split(per_group)):
        for rows in part.split(4096):
            sketch.update(rows, group=group)
    return sketch.result().shape.wd


def distances(repeats: int) -> list[dict[str, object]]:
    """Time WD by each way; the published one gets one process a core."""
    cores = os.cpu_count() or 1
    outputs = make_outputs(256)
    by_token = outputs.T.contiguous()
    few = [row.numpy() for row in outputs[: 8 * cores].double()]
    exact = shape_statistics(outputs).wd
    error = float((sketch_wd(by_token) - exact).abs().max())
    assert error < 1e-3, f"the sketch is off by {error}"
    times: dict[str, list[float]] = {"published": [], "exact": [], "sketch": []}
    with multiprocessing.get_context("spawn").Pool(cores, initializer=_one_thread) as pool:
        noisy = np.array(pool.map(published_wd, few, chunksize=1))
        off = np.abs(noisy - exact[: len(few)].numpy()).max()
        assert off < 0.02, f"the published way differs by {off}"
        for _ in range(repeats):
            times["published"].append(
                seconds(lambda: pool.map(published_wd, few, chunksize=1)) / len(few)
            )
            times["exact"].append(seconds(lambda: shape_statistics(outputs)) / len(outputs))
            times["sketch"].append(seconds(lambda: sketch_wd(by_token)) / len(outputs))
    base = statistics.median(times["published"])
    goals = {"published": 1.0, "exact": 6.0, "sketch": 12.0}
    return [
        {
            "work": f"WD of one neuron, {TOKENS:,} tokens: {name}",
            "median": f"{1e3 * statistics.median(values):.2f} ms",
            "ratio": f"{base / statistics.median(values):.1f} × as fast",
            "goal": f"≥ {goals[name]:.0f}" if name != "published" else "",
        }
        for name, values in times.items()
    ]


def _one_thread() -> None:
    torch.set_num_threads(1)


def forward_pass(n_seq: int, seq_len: int, repeats: int) -> list[dict[str, object]]:
    """Time scoring all MLP linears of the demo model against the bare pass, alternating."""
    from entangle.models.loading import load_model
    from entangle.scoring.score import score
    from entangle.texts.calibration import load_calibration

    model = load_model("demo")
    calibration = load_calibration("demo", model.tokenizer, n_seq=n_seq, seq_len=seq_len)
    batch = max(1, 4096 // seq_len)
    body = model.module.get_submodule("model")

    def bare(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for _, ids in calibration.batches(batch):
                module(ids.to(model.device), use_cache=False)

    def scored(md: bool) -> None:
        score(model, calibration, proj="mlp", method="sketch", md=md, batch_size=batch)

    works: dict[str, Callable[[], None]] = {
        "bare forward pass": lambda: bare(model.module),
        "bare forward pass without the output head": lambda: bare(body),
        "sketch of every MLP linear": lambda: scored(True),
        "sketch of every MLP linear, no MD": lambda: scored(False),
    }
    bare(model.module)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    first = times["bare forward pass"]
    return [
        {
            "work": f"{name}, {n_seq} × {seq_len} tokens",
            "median": f"{statistics.median(values):.1f} s",
            "ratio": f"{statistics.median(v / b for v, b in zip(values, first, strict=True)):.2f} "
            "× the pass",
            "goal": "≤ 1.40" if name == "sketch of every MLP linear" else "",
        }
        for name, values in times.items()
    ]


def peak_memory(seq_len: int) -> list[dict[str, object]]:
    """Compare the peak memory of two runs, each in a process of its own."""
    rows: list[dict[str, object]] = []
    for method, layers in (("sketch", "all"), ("exact", "1")):
        peaks = []
        for n_seq in (8, 32):
            command = [sys.executable, "-m", "benchmarks.scoring", "--peak", method, layers]
            done = subprocess.run(
                [*command, str(n_seq), str(seq_len)], capture_output=True, text=True, check=True
            )
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
        rows.append(
            {
                "work": f"peak memory of {method}, MLP of {layers}: 8 and 32 × {seq_len} tokens",
                "median": " and ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks),
                "ratio": f"{peaks[1] / peaks[0]:.3f} ×",
                "goal": "< 1.10",
            }
        )
    return rows


def print_peak(method: str, layers: str, n_seq: str, seq_len: str) -> None:
    """Score once and print the process's peak memory in bytes."""
    import entangle
    from entangle.scoring.score import Method

    model = entangle.load_model("demo")
    calibration = entangle.load_calibration(
        "demo", model.tokenizer, n_seq=int(n_seq), seq_len=int(seq_len)
    )
    memory = 256 * 2**20
    entangle.score(
        model, calibration, layers=layers, proj="mlp", method=cast("Method", method), memory=memory
    )
    print(json.dumps(peak_memory_bytes()))


def main() -> None:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-seq", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=4, metavar="SETTING", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    rows = distances(max(3, arguments.repeats))
    rows += forward_pass(arguments.n_seq, arguments.seq_len, arguments.repeats)
    rows += peak_memory(256)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
