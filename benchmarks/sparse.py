"""How fast packed sparse experts are beside dense ones.

``python -m benchmarks.sparse cpu`` prints a table of one layer at one token on all of torch's
threads (``--threads`` for fewer); ``gpu`` stands in `benchmarks.sparse_gpu`, whole models (``model
DIR``) in `benchmarks.sparse_model`. Answers are checked against float64 products before any time.
All ways of a shape take turns, each on copies of its weights that are more than four times the
largest cache, so that weights are read from memory.
"""

import argparse
import importlib
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.sparse_layers import answer_is_right, dense_bfloat16, packed_layer
from entangle.kernels import native
from entangle.packed import cpu
from entangle.packed.formats import unpack
from entangle.runs.provenance import package_versions

SHAPES = ((4096, 11008), (1536, 576), (576, 1536))
LEVELS = {"bitmap": (0.5, 0.7, 0.8, 0.9), "n16": (8, 5, 3, 2)}
COLD = 4 * 2**25
"""Bytes of copies: four times a last cache of 32 MiB."""
Row = dict[str, object]


@dataclass(frozen=True)
class Way:
    """One way to multiply, with copies of its weights."""

    name: str
    size: int
    """Bytes of the weights."""
    calls: Sequence[Callable[[], object]]
    """The product with every copy."""


def copies(size: int) -> int:
    """Return how many copies of some bytes are more than the caches hold."""
    return max(2, COLD // size + 1)


def dense_ways(rows: int, cols: int, x: Tensor) -> Iterator[Way]:
    """Yield what torch and NumPy offer for dense weights, and a plain loop over bfloat16."""
    weight = torch.randn(rows, cols)
    wide = [weight.clone() for _ in range(copies(4 * rows * cols))]
    yield Way("torch float32", 4 * rows * cols, [lambda w=w: linear(x, w) for w in wide])  # type: ignore[misc]
    short, narrow = [weight.bfloat16() for _ in range(2 * len(wide))], x.bfloat16()
    yield Way("torch bfloat16", 2 * rows * cols, [lambda w=w: linear(narrow, w) for w in short])  # type: ignore[misc]
    loops = [dense_bfloat16(x, w) for w in short]
    yield Way("own bfloat16, dense", 2 * rows * cols, loops)
    if cols % 128 == 0 or cols % 64 == 0:
        codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
        group = 128 if cols % 128 == 0 else 64
        scales = torch.randn(cols // group, rows, 2).bfloat16()
        size = rows * cols // 2 + 2 * scales.numel()
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packs = [pack(codes, 2) for _ in range(copies(size))]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        calls = [lambda w=w: multiply(narrow, w, group, scales) for w in packs]
        yield Way("torch int4, dense", size, calls)


def sparse_ways(rows: int, cols: int, x: Tensor, share: float) -> Iterator[Way]:
    """Yield the sparse matrices of SciPy and torch (int32 columns)."""
    weight = torch.randn(rows, cols) * (torch.rand(rows, cols) >= share)
    found = scipy.sparse.csr_matrix(weight.numpy())
    size = found.data.nbytes + found.indices.nbytes + found.indptr.nbytes
    every = [found.copy() for _ in range(copies(size))]
    column = x[0].numpy()
    name = f"{share:.0%} zeros"
    yield Way(f"scipy CSR, {name}", size, [lambda w=w: w @ column for w in every])  # type: ignore[misc]
    tensors = [_as_torch(w) for w in every]
    tall = x.T.contiguous()
    yield Way(f"torch.sparse_csr, {name}", size, [lambda w=w: w @ tall for w in tensors])  # type: ignore[misc]


def _as_torch(matrix: scipy.sparse.csr_matrix) -> Tensor:
    starts, columns = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
    values, shape = torch.from_numpy(matrix.data), list(matrix.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are in beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def packed_ways(rows: int, cols: int, x: Tensor) -> Iterator[Way]:
    """Yield the packed layers of every format, values and level; their answers are checked."""
    first = torch.zeros(1, dtype=torch.int64)
    for form, levels in LEVELS.items():
        for level in levels:
            for values in ("bfloat16", "int8", "int4"):
                layout, tensors = packed_layer(form, values, rows, cols, level)
                name = f"{form} {level:.0%}" if form == "bitmap" else f"{level}:16"
                answer_is_right(
                    cpu.linear(x, first, tensors, layout), unpack(tensors, layout, 0), x
                )
                size = sum(t.numel() * t.element_size() for t in tensors.values())
                every = [{n: t.clone() for n, t in tensors.items()} for _ in range(copies(size))]
                calls = [lambda t=t, at=layout: cpu.linear(x, first, t, at) for t in every]
                yield Way(f"{name}, {values}", size, calls)


def times(ways: Sequence[Way], repeats: int) -> list[list[float]]:
    """Return the times of every way, which take turns."""
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(-2, repeats):
        for number, way in enumerate(ways):
            call = way.calls[turn % len(way.calls)]
            begin = time.perf_counter()
            call()
            if turn >= 0:
                found[number].append(time.perf_counter() - begin)
    return found


def rows_of(shape: tuple[int, int], repeats: int) -> list[Row]:
    """Measure all ways of one shape, in groups that fit into memory beside torch float32."""
    x = torch.randn(1, shape[1])
    reference, *others = dense_ways(*shape, x)
    groups: list[Iterator[Way]] = [iter(others), packed_ways(*shape, x)]
    groups += [sparse_ways(*shape, x, share) for share in (0.5, 0.7, 0.8, 0.9)]
    found: list[Row] = []
    for group in groups:
        while ways := [way for _, way in zip(range(3), group, strict=False)]:
            measured = times([reference, *ways], repeats)
            for way, mine in zip([reference, *ways], measured, strict=True):
                if way is not reference or not found:
                    found.append(described(shape, way, mine, measured[0]))
    return found


def described(shape: tuple[int, int], way: Way, mine: list[float], dense: list[float]) -> Row:
    """Describe one measurement beside torch float32 in the same turns."""
    middle, low = statistics.median(mine), float(np.percentile(mine, 10))
    return {
        "out × in": f"{shape[0]} × {shape[1]}", "way": way.name, "MB": f"{way.size / 1e6:.2f}",
        "median µs": f"{middle * 1e6:.0f}", "p10 µs": f"{low * 1e6:.0f}",
        "× torch float32": f"{statistics.median(dense) / middle:.2f}",
        "p10 ×": f"{np.percentile(dense, 10) / low:.2f}",
    }  # fmt: skip


def on_cpu(arguments: Sequence[str]) -> None:
    """Print the table of one layer at one token."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", default=[f"{r}x{c}" for r, c in SHAPES])
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(f"{processor()}, {given.threads} threads, {native.forms()[0]}")
    print(", ".join(f"{name} {version}" for name, version in package_versions().items()))
    found: list[Row] = []
    for shape in given.shapes:
        rows, cols = map(int, shape.split("x"))
        found += rows_of((rows, cols), given.repeats)
    print(pd.DataFrame(found).to_string(index=False))


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(one.split(":")[1].strip() for one in lines if "model name" in one)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _elsewhere(module: str) -> Callable[[Sequence[str]], None]:
    """Return a part that another module has as ``main``, imported when it is asked for."""
    return lambda arguments: importlib.import_module(module).main(arguments)


PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    "cpu": on_cpu,
    "gpu": _elsewhere("benchmarks.sparse_gpu"),
    "model": _elsewhere("benchmarks.sparse_model"),
}


def main() -> None:
    """Run the part that is named first on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    given, rest = parser.parse_known_args()
    PARTS[given.part](rest)


if __name__ == "__main__":
    main()
