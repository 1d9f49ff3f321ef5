"""How fast scoring, solving and expanding 7B-sized layers are on one GPU.

``python -m benchmarks.gpu`` prints one table; ``python -m benchmarks.gpu solve wd`` only some parts
of it (solve, wd, score, mixture, block, demo, seventy). Answers are compared with the reference's
before a time is printed. Each reference runs on the same machine: `benchmarks.published`, or the
bare forward pass.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks import published
from entangle.experts.expand import expand
from entangle.experts.linear import ExpandedLinear
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.precision import full_precision
from entangle.pruning import prune
from entangle.recording.recorder import Recorder
from entangle.runs.provenance import package_versions
from entangle.scoring.finer import SharedSquares
from entangle.scoring.score import Method, score
from entangle.scoring.together import MixtureCounts
from entangle.stats.bins import Scratch
from entangle.stats.wasserstein import shape_statistics
from entangle.texts.calibration_set import CalibrationSet

EXPERTS = 16
GIB = 2**30
Row = dict[str, object]


def seconds(work: Callable[[], object], *, repeats: int = 1) -> float:
    """Return the median time of some calls, the GPU's queue drained."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def row(work: str, reference: float, ours: float, goal: float, *, note: str = "") -> Row:
    """Describe one measurement; ``goal`` is the largest share of the reference's time."""
    share = ours / reference
    goal_text = f"≤ {goal:g} ×" if goal >= 1 else f"≤ 1/{1 / goal:.0f}"
    ratio = f"{share:.2f} ×" if goal >= 1 else f"1/{1 / share:.1f}"
    return {
        "work": work, "reference": f"{reference:.3f} s", "ours": f"{ours:.3f} s",
        "ratio": ratio, "goal": goal_text, "met": "yes" if share <= goal else "no", "note": note,
    }  # fmt: skip


def make_grams(cols: int, *, seed: int = 0) -> Tensor:
    """Return grams of correlated inputs of unequal size, one an expert."""
    rng = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=rng)

    scale, mix = torch.exp(0.7 * normal(cols)), normal(64, cols)
    grams = torch.empty(EXPERTS, cols, cols, device="cuda")
    for gram in grams:
        x = normal(5 * cols // 4, cols)
        x *= 1 + 2 * torch.rand(len(x), 1, device="cuda", generator=rng)
        x += 0.3 * normal(len(x), 64) @ mix + normal(cols)
        x *= scale
        torch.mm(x.T, x, out=gram)
    return grams


def solves(rows: int, cols: int, goal: float) -> list[Row]:
    """Time 16 solves of one weight at two sparsities against the published loop."""
    rng = torch.Generator("cuda").manual_seed(1)
    weight = 0.02 * torch.randn(rows, cols, device="cuda", generator=rng)
    grams = make_grams(cols)

    def ours(sparsity: float) -> Tensor:
        stack = weight.expand(EXPERTS, -1, -1)
        return prune(stack, grams, sparsity=sparsity, pattern="block").weight

    def theirs(sparsity: float) -> None:
        for gram in grams:
            published.solve(weight, gram, sparsity)

    found = []
    for sparsity in (0.5, 0.8):
        note = check_solves(weight, grams, ours(sparsity), sparsity)
        published.solve(weight, grams[0], sparsity)
        reference = seconds(partial(theirs, sparsity))
        own = seconds(partial(ours, sparsity), repeats=3)
        work = f"16 experts, {rows} × {cols}, {sparsity:.0%}"
        found.append(row(work, reference, own, goal, note=note))
    return found


def check_solves(weight: Tensor, grams: Tensor, solved: Tensor, sparsity: float) -> str:
    """Compare the first expert's mask with the rule in float64, two experts' losses as published.

    The rule's own float32 version agrees less well with it than ours where the gram is large.
    """
    exact = published.solve(weight.double(), grams[0].double(), sparsity)
    masks = float(((exact != 0) == (solved[0] != 0)).double().mean())
    assert masks >= 0.999, f"masks agree on {masks:.5f} of the weights only"
    worst = 0.0
    for gram, own in zip(grams[:2], solved[:2], strict=True):
        theirs = published.solve(weight, gram, sparsity)
        losses = [float(((w - weight) @ gram * (w - weight)).sum()) for w in (theirs, own)]
        worst = max(worst, abs(losses[1] / losses[0] - 1))
    assert worst <= 1e-3, f"the losses differ by {worst:.2e}"
    return f"masks {masks:.4%} as in float64, losses within {worst:.0e}"


def distances() -> list[Row]:
    """Time the exact WD of 11,008 neurons against the published metric, 16 processes."""
    neurons, tokens, processes = 11_008, 131_072, min(16, os.cpu_count() or 1)
    outputs = torch.randn(neurons, tokens, device="cuda")
    outputs[1::4].exp_()
    outputs[2::4] *= 1 + outputs[2::4].square()
    few = outputs[: 8 * processes].cpu()
    on_cpu, found = shape_statistics(few).wd, shape_statistics(outputs)
    error = float((found.wd[: len(few)].cpu() - on_cpu).abs().max())
    assert error <= 1e-5, f"WD is off by {error}"
    numbers = [one.numpy() for one in few.double()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        noisy = np.array(pool.map(published.wd, numbers[:processes], chunksize=1))
        assert np.abs(noisy - on_cpu[:processes].numpy()).max() < 0.05
        reference = seconds(lambda: pool.map(published.wd, numbers, chunksize=1))
    own = seconds(lambda: shape_statistics(outputs), repeats=3)
    note = f"{processes} processes, {len(few)} neurons measured and scaled; WD within {error:.0e}"
    work = f"exact WD of {neurons:,} neurons, {tokens:,} tokens"
    return [row(work, reference * neurons / len(few), own, 1 / 100, note=note)]


SEVENTY: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
"""The shapes of Llama-3.1-70B, which has 80 such blocks."""


def llama(blocks: int, **shapes: Any) -> torch.nn.Module:
    """Return a Llama of 7B's shape, or another, with random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seven: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "vocab_size": 32000,
    }  # fmt: skip
    config = LlamaConfig(**(seven | shapes), num_hidden_layers=blocks, max_position_embeddings=4096)
    return drawn(LlamaForCausalLM, config)


def olmoe(device: str = "cuda", **shapes: Any) -> torch.nn.Module:
    """Return a mixture of OLMoE-1B-7B's shape (1.3B active), or another, with random weights."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    own: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return drawn(OlmoeForCausalLM, OlmoeConfig(**(own | shapes)), device)


def drawn(
    kind: Callable[[Any], torch.nn.Module], config: Any, device: str = "cuda"
) -> torch.nn.Module:
    """Return a model with random bfloat16 weights, drawn where it stays."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return kind(config).train(mode=False)
    finally:
        torch.set_default_dtype(before)


def random_tokens(sequences: int, vocabulary: int) -> CalibrationSet:
    """Return sequences of 2,048 random tokens."""
    rng = torch.Generator().manual_seed(0)
    return CalibrationSet(torch.randint(4, vocabulary, (sequences, 2048), generator=rng), "ids", {})


def bare(module: torch.nn.Module, calibration: CalibrationSet, batch: int) -> None:
    """Run a model on all tokens."""
    with torch.no_grad():
        for _, ids in calibration.batches(batch):
            module(ids.to(next(module.parameters()).device), use_cache=False)


def scoring() -> list[Row]:
    """Time scoring every MLP linear against the bare pass over the same tokens."""
    module = llama(32)
    model, found = as_language_model(module), list[Row]()
    plans: tuple[tuple[Method, int, int, float], ...]
    plans = (("sketch", 128, 8, 1.25), ("exact", 16, 80, 3.0))
    check_scores(model)
    for method, sequences, gib, goal in plans:
        calibration = random_tokens(sequences, 32000)
        batch = calibration.per_pass
        bare(module, random_tokens(2, 32000), batch)
        reference = seconds(partial(bare, module, calibration, batch))
        for md in (False, True):
            torch.cuda.empty_cache()
            own = seconds(
                partial(
                    score, model, calibration, proj="mlp", method=method, md=md,
                    memory=gib * GIB, progress=False,
                )
            )  # fmt: skip
            work = f"{method} of every MLP linear, {sequences} × 2048 tokens"
            found.append(row(work, reference, own, goal, note="with MD" if md else "without MD"))
    return found


def mixture() -> list[Row]:
    """Time scoring every neuron of every expert against the bare pass over the same tokens.

    Against the bare pass as transformers runs it by default, and expert by expert; and where the
    time goes: in the pass with all experts' outputs told but not counted, in counting, in results.
    """
    module: Any = olmoe()
    model, found = as_language_model(module), list[Row]()
    check_mixture(model)
    for sequences, batch in ((64, 8), (256, 8), (256, 16)):
        calibration, ways = random_tokens(sequences, 50304), dict[str, float]()
        for way in ("eager", "grouped_mm") if sequences == 64 else ("grouped_mm",):
            module.set_experts_implementation(way)
            bare(module, random_tokens(batch, 50304), batch)
            ways[way] = seconds(partial(bare, module, calibration, batch))
        run = partial(score_experts, model, batch=batch)
        run(random_tokens(2 * batch, 50304), layers=[0])
        pass_alone, passes = (
            seconds(partial(run_experts, model, calibration, batch, count=count))
            for count in (False, True)
        )
        reference = ways["grouped_mm"]
        own, peak = measured(partial(run, calibration, layers="all"))
        note = (
            f"{batch} a pass; bare eager {ways.get('eager', float('nan')):.2f} s; of it passes "
            f"{pass_alone:.2f} s, counting {passes - pass_alone:.2f} s, results "
            f"{own - passes:.2f} s; peak {peak:.1f} GB"
        )
        work = f"sketch of all experts of OLMoE's shapes, {sequences} × 2048 tokens"
        found.append(row(work, reference, own, 1.3, note=note))
        print(found[-1], flush=True)  # the others may take long
        torch.cuda.empty_cache()
    return found


def score_experts(
    model: LanguageModel, calibration: CalibrationSet, *, layers: Any, batch: int
) -> pd.DataFrame:
    """Score experts by sketches, without MD."""
    return score(
        model, calibration, layers=layers, proj="experts", method="sketch", md=False,
        batch_size=batch, memory=60 * GIB, progress=False,
    ).frame  # fmt: skip


def run_experts(
    model: LanguageModel, calibration: CalibrationSet, batch: int, *, count: bool
) -> None:
    """Run all experts at once, told of their outputs; ``count`` them too, without results."""
    layers = find_layers(model.module, "all", "experts")
    counts = MixtureCounts(
        layers if count else (), n_groups=8, scratch=Scratch(), squares=SharedSquares()
    )
    take = partial(counts.update, pairs=None) if count else lambda _seen: None
    recorder = Recorder(layers, lambda _seen: None, compared=False, lenient=True, at_once=take)
    in_group = calibration.n_seq // 8
    ids = [(start // in_group, part) for start, part in calibration.batches(batch)]
    with full_precision(), torch.no_grad():
        recorder.run(model.module, ids)


def check_mixture(model: LanguageModel) -> None:
    """Compare experts scored at once with the same ones, one after the other."""
    calibration = random_tokens(4, 50304)
    layers = [f"model.layers.0.mlp.experts.{n}.*" for n in (0, 17, 63)]
    one, other = (
        score(
            model, calibration, layers=layers, proj=None, method="sketch", md=False, memory=8 * GIB,
            min_tokens=64, progress=False, watch=watch,
        ).frame
        for watch in (None, lambda _seen: None)
    )  # fmt: skip
    for name, most in (("wd", 1e-3), ("mean", 1e-4), ("std", 1e-4), ("wd_bound", 1e-3)):
        apart = float((one[name] - other[name]).abs().max())
        assert apart <= most, f"{name} of experts at once is off by {apart:.2e}"
    assert one["n_tokens"].equals(other["n_tokens"]), "experts at once see other tokens"


def check_scores(model: LanguageModel) -> None:
    """Compare the sketch with the exact method on one block."""
    methods: tuple[Method, ...] = ("exact", "sketch")
    calibration = random_tokens(4, 32000)
    exact, sketch = (
        score(model, calibration, layers=0, proj="mlp", method=m, memory=8 * GIB).frame["wd"]
        for m in methods
    )
    assert float((exact - sketch).abs().max()) <= 1e-3, "the sketch is off"


def check_block(model: LanguageModel, tokens: CalibrationSet, *, experts: int = 2) -> None:
    """Compare the errors of an expansion with the published pipeline's on the same clusters.

    Few experts, so that every cluster has more tokens than its layers inputs; smaller ones are
    shrunk here and not there.
    """
    found = expand(
        model, tokens, experts=experts, sparsity=0.5, pattern="block", memory=40 * GIB,
        progress=False,
    )  # fmt: skip
    assert found.model is not None
    assert not found.layers["shrunk"].any(), "a cluster has too few tokens to compare"
    expanded = found.model.module.get_submodule("model.layers.0.mlp")

    def assign(name: str, x: Tensor) -> Tensor:
        layer = expanded.get_submodule(name)
        assert isinstance(layer, ExpandedLinear)
        return layer.routing.router.route(x)

    body, mlp = (model.module.get_submodule(name) for name in ("model", "model.layers.0.mlp"))
    with torch.no_grad():
        ids = tokens.ids.to(model.device)
        _, errors = published.expand_block(
            body, mlp, ids, experts=experts, sparsity=0.5, assign=assign
        )
    apart = (found.layers["relative_error"] / np.array(errors) - 1).abs().max()
    assert apart <= 1e-3, f"the errors differ by {apart:.4f} on equal clusters"


def block() -> list[Row]:
    """Time the expansion of one block, all included, against the published pipeline."""
    module = llama(1)
    model = as_language_model(module)  # its digest is computed once
    calibration = random_tokens(128, 32000)
    check_block(model, random_tokens(24, 32000))

    def ours(tokens: CalibrationSet) -> pd.DataFrame:
        return expand(
            model, tokens, experts=EXPERTS, sparsity=0.5, pattern="block", memory=40 * GIB,
            progress=False,
        ).layers  # fmt: skip

    ours(random_tokens(16, 32000))
    peaks = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    table = ours(calibration)
    peaks.append(torch.cuda.max_memory_allocated())
    own = seconds(lambda: ours(calibration))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    errors: list[float] = []

    def theirs() -> None:
        with torch.no_grad():
            body, ids = module.get_submodule("model"), calibration.ids.cuda()
            mlp = module.get_submodule("model.layers.0.mlp")
            found = published.expand_block(body, mlp, ids, experts=EXPERTS, sparsity=0.5)
            errors.extend(found[1])

    reference = seconds(theirs)
    peaks.append(torch.cuda.max_memory_allocated())
    worse = float((table["relative_error"].to_numpy() / np.array(errors)).max())
    note = f"errors within 1e-3 on equal clusters, ≤ {worse:.3f} × on each one's own"
    gigabytes = [f"{peak / 1e9:.2f} GB" for peak in peaks]
    share = peaks[0] / peaks[1]
    memory: Row = {
        "work": "its peak memory", "reference": gigabytes[1], "ours": gigabytes[0],
        "ratio": f"{share:.3f}", "goal": "≤ 0.5", "met": "yes" if share <= 0.5 else "no",
        "note": "model included",
    }  # fmt: skip
    return [row("one 7B block, 16 experts, 128 × 2048", reference, own, 1 / 15, note=note), memory]


def demo() -> list[Row]:
    """Time the expansion of the whole demo model against its bare pass."""
    from entangle.models.loading import load_model

    model = load_model("demo")
    calibration = random_tokens(128, model.vocab_size)
    bare(model.module, random_tokens(2, model.vocab_size), 2)
    reference = seconds(lambda: bare(model.module, calibration, calibration.per_pass))

    def ours(tokens: CalibrationSet) -> object:
        return expand(model, tokens, experts=EXPERTS, memory=24 * GIB, progress=False)

    ours(random_tokens(4, model.vocab_size))
    own = seconds(lambda: ours(calibration))
    return [row("the demo model, 16 experts, 128 × 2048", reference, own, 4, note="random tokens")]


def seventy() -> list[Row]:
    """Time 8 of the 80 blocks of a 70B-shaped model, count their memory, tell of all 80.

    The blocks are drawn on the device. Scores: every MLP linear, sketch with MD, against the bare
    pass of the same blocks; expansion: one block to 16 experts. The blocks not held are the
    weights of 72 more, which a streamed model holds two at a time.
    """
    blocks, whole, sequences = 8, 80, 128
    model = as_language_model(llama(blocks, **SEVENTY))
    calibration = random_tokens(sequences, 128256)
    bare(model.module, random_tokens(2, 128256), 2)
    reference = seconds(partial(bare, model.module, calibration, calibration.per_pass))
    run = partial(score, model, proj="mlp", method="sketch", memory=8 * GIB, progress=False)
    run(random_tokens(2, 128256))
    scores, peak = measured(partial(run, calibration))
    found = [
        row(
            f"70B: {blocks} blocks scored, {sequences} × 2048", reference, scores, 1.25,
            note=f"peak {peak:.1f} GB; 80 blocks: {scores * whole / blocks / 60:.1f} min",
        )
    ]  # fmt: skip
    del model, run
    torch.cuda.empty_cache()
    one = as_language_model(llama(1, **SEVENTY))
    settings = partial(
        expand, one, experts=EXPERTS, sparsity=0.5, pattern="block", memory=40 * GIB,
        progress=False,
    )  # fmt: skip
    settings(random_tokens(16, 128256))
    own, peak = measured(partial(settings, calibration))
    found += [
        {"work": f"70B: one block, 16 experts, {sequences} × 2048", "reference": "", "ratio": "",
         "ours": f"{own:.1f} s", "goal": "≤ 45 s", "met": "yes" if own <= 45 else "no",
         "note": f"80 blocks: {own * whole / 60:.0f} min"},
        {"work": "its peak memory", "reference": "", "ours": f"{peak:.1f} GB", "ratio": "",
         "goal": "≤ 70 GB", "met": "yes" if peak <= 70 else "no", "note": "model included"},
    ]  # fmt: skip
    return found


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds and the peak GB of some work on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return seconds(work), torch.cuda.max_memory_allocated() / 1e9


PARTS: dict[str, Callable[[], list[Row]]] = {
    "solve": lambda: [*solves(11008, 4096, 1 / 25), *solves(4096, 11008, 1 / 10)],
    "wd": distances,
    "score": scoring,
    "mixture": mixture,
    "block": block,
    "demo": demo,
    "seventy": seventy,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part")
    chosen = parser.parse_args(arguments).parts or list(PARTS)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device", file=sys.stderr)
        return 2
    rows: list[Row] = []
    wrong = 0
    for part in chosen:
        try:
            found = PARTS[part]()
        except AssertionError as error:
            found, wrong = [{"work": part, "note": f"not timed: {error}"}], wrong + 1
        torch.cuda.empty_cache()
        print(pd.DataFrame(found).to_string(index=False, header=False), flush=True)
        rows += found
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores; {versions}")
    print(pd.DataFrame(rows).fillna("").to_string(index=False))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
