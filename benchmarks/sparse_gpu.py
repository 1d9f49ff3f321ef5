"""Packed experts on one GPU beside dense layers: ``python -m benchmarks.sparse gpu``.

Answers are checked against float64 before any time. Times are medians of CUDA graphs that go round
more copies of the weights than the caches hold; ratios are of one run. Parts: ``layers`` (formats,
levels, values), ``tokens`` (several at once, routed), ``prefill``, ``rivals`` (cuSPARSE and 2:4),
and ``model``: decoding by a model of the shape of Llama 3.1 8B with random weights and 16 experts,
whose small operations are the same compiled kernels on both sides.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from entangle.packed import gpu
from entangle.packed.formats import Codes, Packed, pack, unpack

SHAPES = ((14336, 4096), (4096, 14336), (8192, 2048), (1536, 576))
ROTATED = 400e6  # bytes, several times the second cache
Call = Callable[[], object]


def timed(calls: Sequence[Call], repeats: int = 15) -> tuple[float, float]:
    """Return median and 10th percentile of a call in microseconds, all calls in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    found = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(calls))
    found = sorted(found[2:])
    return found[len(found) // 2], found[len(found) // 10]


def random_packed(k: int, rows: int, cols: int, form: str, level: float, values: str) -> Packed:
    """Return packed experts, the same one k times: ``level`` is n of 16, or the share of zeros."""
    rng = torch.Generator("cuda").manual_seed(0)
    ranks = torch.rand(1, rows, cols, generator=rng, device="cuda")
    if form == "n16":
        keep = ranks.unflatten(-1, (-1, 16)).argsort(-1).argsort(-1).flatten(-2) < level
    else:
        keep = ranks.argsort(-1).argsort(-1) < round((1 - level) * cols)
    codes = None
    if values.startswith("int"):
        bits = int(values[3:])
        zero = torch.full((1, rows), 2.0 ** (bits - 1), device="cuda")
        scale = (torch.rand(1, rows, generator=rng, device="cuda") + 0.5) / 2.0 ** (bits + 6)
        shape = 1, rows, math.ceil(cols / 128)
        steps = torch.randint(1, 256, shape, dtype=torch.uint8, generator=rng, device="cuda")
        codes = Codes(bits, scale, zero, steps)
        code = torch.randint(0, 2**bits, keep.shape, generator=rng, device="cuda")
        weight = (code - zero[..., None]) * codes.unit(cols)
    else:
        weight = torch.randn(keep.shape, generator=rng, device="cuda")
        weight = weight.to(getattr(torch, values))
    layout, tensors = pack(weight * keep, form, codes=codes, kept=int(level) or None)
    if k > 1:
        assert form == "n16", "the other formats count through all experts"
        layout = replace(layout, experts=k)
        tensors = {name: torch.cat([t] * k) for name, t in tensors.items()}
    return Packed(tensors, layout)


def size_of(one: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in one.tensors.values())


def copies(one: Packed) -> list[Packed]:
    """Return enough copies that no cache holds them."""
    number = max(3, math.ceil(ROTATED / size_of(one)))
    return [one._replace(tensors={n: t.clone() for n, t in one.tensors.items()})
            for _ in range(min(number, 200))]  # fmt: skip


def worst_error(one: Packed, x: Tensor) -> float:
    """Return the largest error of expert 0 in units of the sum of absolute products."""
    clusters = torch.zeros(len(x), dtype=torch.int64, device="cuda")
    found = gpu.linear(x.float(), clusters, *one).double()
    dense = unpack(one.tensors, one.layout, 0).double()
    wide = x.double()
    return float(((found - wide @ dense.T).abs() / (wide.abs() @ dense.abs().T)).max())


def int4_dense(rows: int, cols: int) -> Callable[[Tensor], Tensor]:
    """Return torch's own product with 4-bit weights, in groups of 128."""
    codes = torch.randint(0, 255, (rows, cols // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(cols // 128, rows, 2, device="cuda", dtype=torch.bfloat16) / 64
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def dense_times(rows: int, cols: int, tokens: int = 1) -> dict[str, float]:
    """Return microseconds of a dense layer in bfloat16 and in 4 bits."""
    x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
    number = max(3, math.ceil(ROTATED / (2 * rows * cols)))
    weights = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(number)]
    found = {"bf16": timed([partial(functional.linear, x, w) for w in weights * 2])[0]}
    del weights
    if cols % 128 == 0 and rows % 8 == 0:
        layers = [int4_dense(rows, cols) for _ in range(3 * number)]
        found["int4"] = timed([partial(f, x) for f in layers])[0]
    return found


def layers() -> None:
    """Print one row a shape, format, level and kind of values: one token, one expert."""
    levels: list[tuple[str, float, str]] = [
        ("n16", n, v) for v in ("bfloat16", "int8", "int4") for n in (8, 5, 3, 2)
    ]
    levels += [
        (form, share, v)
        for form, v in (("delta", "bfloat16"), ("bitmap", "bfloat16"), ("delta", "int4"))
        for share in (0.5, 0.7, 0.8, 0.9)
    ]
    print("shape           format level values     us (p10)   x bf16  x int4  TB/s  bytes/w  error")
    for rows, cols in SHAPES:
        dense = dense_times(rows, cols)
        x = torch.randn(1, cols, device="cuda", dtype=torch.bfloat16)
        clusters = torch.zeros(1, dtype=torch.int64, device="cuda")
        print(f"{rows} x {cols}: dense " + ", ".join(f"{n} {t:.1f} us" for n, t in dense.items()))
        for form, level, values in levels:
            if rows == 1536 and values == "int8":
                continue
            one = random_packed(1, rows, cols, form, level, values)
            error = worst_error(one, x)
            assert error < 1e-6, error
            middle, low = timed([partial(gpu.linear, x, clusters, *c) for c in copies(one)])
            size, four = size_of(one), dense.get("int4", math.nan)
            print(
                f"  {rows} x {cols} {form:>6} {level:<4} {values:<8} {middle:6.1f} ({low:.1f})"
                f"  {dense['bf16'] / middle:5.2f}  {four / middle:5.2f}  {size / middle / 1e6:5.2f}"
                f"  {size / rows / cols:.3f}  {error:.0e}",
                flush=True,
            )


def tokens() -> None:
    """Print times of several tokens at once, routed at random, beside dense."""
    rows, cols = 14336, 4096
    print(f"{rows} x {cols}, several tokens: us (x dense bf16; x its own bytes at 4.1 TB/s)")
    kinds: list[tuple[str, float, int]] = []
    kinds += [("n16", n, 1) for n in (8, 5, 3, 2)] + [
        ("n16", n, k) for k in (4, 16) for n in (8, 5, 3, 2)
    ]
    kinds += [("delta", 0.7, 1), ("bitmap", 0.7, 1)]
    counts = (1, 2, 4, 8, 16, 64, 512)
    dense = {t: dense_times(rows, cols, t)["bf16"] for t in counts}
    print("  dense bf16      " + "  ".join(f"T={t}: {d:.1f}" for t, d in dense.items()))
    for form, level, k in kinds:
        one = random_packed(k, rows, cols, form, level, "bfloat16")
        held = copies(one) if k == 1 else [one]
        line = []
        for count in counts:
            x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
            rng = torch.Generator("cuda").manual_seed(count)
            routed = [
                torch.randint(0, k, (count,), device="cuda", generator=rng) for _ in range(24)
            ]
            calls = [partial(gpu.linear, x, c, *held[i % len(held)]) for i, c in enumerate(routed)]
            middle = timed(calls, 7)[0]
            used = sum(len(c.unique()) for c in routed) / len(routed)
            floor = size_of(one) / k * used / 4.1e6
            line.append(
                f"T={count}: {middle:.1f} ({dense[count] / middle:.2f}; {middle / floor:.2f})"
            )
        print(f"  {form:>6} {level:<4} k={k:<3} " + "  ".join(line), flush=True)


def prefill() -> None:
    """Print 2,048 tokens through one layer."""
    rows, cols, count = 14336, 4096, 2048
    dense = dense_times(rows, cols, count)["bf16"]
    x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
    print(f"prefill of {count} tokens, {rows} x {cols}: dense bf16 {dense:.0f} us")
    for form, level, k in (("n16", 5, 1), ("delta", 0.7, 1), ("bitmap", 0.7, 1), ("n16", 5, 4),
                           ("n16", 5, 16)):  # fmt: skip
        one = random_packed(k, rows, cols, form, level, "bfloat16")
        clusters = torch.randint(0, k, (count,), device="cuda")
        middle = timed([partial(gpu.linear, x, clusters, *one)] * 3, 7)[0]
        print(
            f"  {form:>6} {level:<4} k={k:<3} {middle:.0f} us, x dense {dense / middle:.2f}",
            flush=True,
        )


def rivals() -> None:
    """Print one layer by cuSPARSE (rows of indices) and by 2:4 sparse tensor cores."""
    rows, cols = 14336, 4096
    dense = {t: dense_times(rows, cols, t)["bf16"] for t in (1, 8, 64)}
    print(f"{rows} x {cols}, what torch offers: us (x dense bf16)")
    for dtype in (torch.bfloat16, torch.float32):
        for share in (0.5, 0.7, 0.8, 0.9):
            weight = torch.randn(rows, cols, device="cuda", dtype=dtype)
            weight[torch.rand(rows, cols, device="cuda") < share] = 0
            held = [weight.to_sparse_csr() for _ in range(3)]
            x = torch.randn(cols, device="cuda", dtype=dtype)
            middle = eager([partial(torch.mv, one, x) for one in held])
            name = str(dtype).removeprefix("torch.")
            print(
                f"  cuSPARSE {name} {share:.0%}: {middle:.1f} ({dense[1] / middle:.2f})", flush=True
            )
    weight = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    weight.unflatten(1, (-1, 4))[..., 2:] = 0
    held = [torch.sparse.to_sparse_semi_structured(weight) for _ in range(8)]
    for count in (1, 8, 64):
        x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
        middle = eager([partial(functional.linear, x, one) for one in held])
        print(f"  2:4 T={count}: {middle:.1f} ({dense[count] / middle:.2f})", flush=True)


def eager(calls: Sequence[Call], repeats: int = 20) -> float:
    """Return the median microseconds of a call: the libraries' own calls go into no graph."""
    found: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(found)[repeats // 2]


class Llama:
    """One decoding step of a model of the shape of Llama 3.1 8B."""

    blocks, hidden, wide, heads, kv, size, vocabulary = 32, 4096, 14336, 32, 8, 128, 128256
    context, kinds, experts = 512, 4, 16

    def __init__(self, mlp: Callable[[int], Callable[[Tensor], Tensor]], four: bool) -> None:
        self.linear = self.dense_four if four else self.dense
        q = self.heads * self.size
        self.qkv = [
            self.linear(q + 2 * self.kv * self.size, self.hidden) for _ in range(self.blocks)
        ]
        self.out = [self.linear(self.hidden, q) for _ in range(self.blocks)]
        self.mlp = [mlp(i % self.kinds) for i in range(self.blocks)]
        self.head = self.linear(self.vocabulary, self.hidden)
        shape = self.blocks, 1, self.kv, self.context, self.size
        self.keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(self.hidden, device="cuda", dtype=torch.bfloat16)
        turn = torch.randn(self.size, device="cuda")
        self.cos, self.sin = turn.cos(), turn.sin()

    @staticmethod
    def dense(rows: int, cols: int) -> Callable[[Tensor], Tensor]:
        weight = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) / cols**0.5
        return lambda x: functional.linear(x, weight)

    @staticmethod
    def dense_four(rows: int, cols: int) -> Callable[[Tensor], Tensor]:
        return int4_dense(rows, cols)

    def step(self, x: Tensor) -> Tensor:
        added = torch.zeros_like(x)
        for i in range(self.blocks):
            x, h = add_norm(x, added, self.norm)
            qkv = self.qkv[i](h)
            q, k, v = turned(qkv, self.cos, self.sin, self.heads, self.kv, self.size)
            self.keys[i, :, :, 7:8] = k
            self.values[i, :, :, 7:8] = v
            mixed = functional.scaled_dot_product_attention(
                q, self.keys[i], self.values[i], enable_gqa=True
            )
            x, h = add_norm(x, self.out[i](mixed.flatten(1)), self.norm)
            added = self.mlp[i](h)
        return self.head(add_norm(x, added, self.norm)[1]).argmax(-1)


@torch.compile(dynamic=False)
def add_norm(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + more
    wide = x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


@torch.compile(dynamic=False)
def turned(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split([heads * size, kv * size, kv * size], -1)

    def rotated(x: Tensor) -> Tensor:
        x = x.view(1, -1, 1, size)
        low, high = x.chunk(2, -1)
        return (x * cos + torch.cat([-high, low], -1) * sin).to(qkv.dtype)

    return rotated(q), rotated(k), v.view(1, -1, 1, size)


@torch.compile(dynamic=False)
def silu_product(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return functional.silu(gate) * up


def dense_mlp(four: bool) -> Callable[[int], Callable[[Tensor], Tensor]]:
    make = Llama.dense_four if four else Llama.dense

    def mlp(_kind: int) -> Callable[[Tensor], Tensor]:
        both, down = make(2 * Llama.wide, Llama.hidden), make(Llama.hidden, Llama.wide)
        return lambda x: down(silu_product(both(x)))

    return mlp


def packed_mlp(kept: int, values: str, k: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """Return MLPs of which a few different ones are shared by the blocks; none fits a cache."""
    made: dict[int, Callable[[Tensor], Tensor]] = {}

    def router(features: int) -> Callable[[Tensor], Tensor]:
        mean = torch.zeros(features, device="cuda")
        directions = torch.randn(k, features, device="cuda")
        offset = torch.zeros(k, device="cuda")
        if k == 1:
            none = torch.zeros(8, dtype=torch.int64, device="cuda")
            return lambda x: none[: len(x)]
        return lambda x: gpu.route(x, mean, directions, offset)

    def mlp(kind: int) -> Callable[[Tensor], Tensor]:
        if kind not in made:
            gate = random_packed(k, Llama.wide, Llama.hidden, "n16", kept, values)
            up = random_packed(k, Llama.wide, Llama.hidden, "n16", kept, values)
            down = random_packed(k, Llama.hidden, Llama.wide, "n16", kept, values)
            first, second = router(Llama.hidden), router(Llama.wide)

            def run(x: Tensor) -> Tensor:
                hidden = gpu.gated(x, first(x), gate, up, "silu")
                return gpu.linear(hidden, second(hidden), *down)

            made[kind] = run
        return made[kind]

    return mlp


def model() -> None:
    """Print milliseconds a token of the whole model, dense and with packed experts."""
    print(f"Llama 3.1 8B's shape, one token, {Llama.context} in the cache, ms a token")
    print(f"({Llama.kinds} different MLPs serve the {Llama.blocks} blocks of the packed models)")
    x = torch.randn(1, Llama.hidden, device="cuda", dtype=torch.bfloat16)
    found: dict[str, float] = {}
    for four in (False, True):
        name = "dense int4" if four else "dense bf16"
        llama = Llama(dense_mlp(four), four)
        found[name] = timed([partial(llama.step, x)], 11)[0] / 1e3
        print(f"  {name}: {found[name]:.3f}", flush=True)
        for k in (1, Llama.experts):
            for kept in (8, 5, 3, 2):
                llama.mlp = []
                values = "int4" if four else "bfloat16"
                build = packed_mlp(kept, values, k)
                llama.mlp = [build(i % Llama.kinds) for i in range(Llama.blocks)]
                middle = timed([partial(llama.step, x)], 11)[0] / 1e3
                print(
                    f"  {kept}:16 {values:<8} k={k:<3} {middle:.3f}  x {found[name] / middle:.2f} "
                    f"of {name}, x {found['dense bf16'] / middle:.2f} of dense bf16",
                    flush=True,
                )


PARTS = {
    "layers": layers, "tokens": tokens, "prefill": prefill, "rivals": rivals, "model": model,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are named, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    asked = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := [part for part in asked if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    for part in asked:
        print(f"\n== {part}: {torch.cuda.get_device_name()}, torch {torch.__version__}")
        with torch.inference_mode():
            PARTS[part]()


if __name__ == "__main__":
    main()
