"""Experiments that a dry run tries on a few blocks, and what their cost is linear in."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli.trials import Counts, Job, Number, Subject, solving, weights_bytes

if TYPE_CHECKING:
    from entangle.models.layers import Layer


def _stored(job: Job, *, records: "Sequence[Layer]", states: int = 2) -> Number:
    """Return the bytes of hidden states and of records, which spill beyond the budget."""
    size = job.model.dtype.itemsize
    held = states * (job.tokens + job.evaluated) * job.width * size
    return float(
        min(job.budget, held + sum(job.tokens * one.in_features for one in records) * size)
    )


def _pass(job: Job) -> Number:
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


def _logits(job: Job) -> Number:
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
        [(DENSE, job.model)], job.windows, batch_size=job.given.get("batch_size"), progress=False
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


def _built(job: Job, experts: Number, *, evaluated: Number) -> dict[str, Number]:
    """Count what building all layers with some experts takes."""
    wide = float(sum(one.in_features**2 for one in job.inputs))
    return {
        "forward": job.forward(2 * job.reached, evaluated),
        "gram": job.tokens * wide,
        "solve": sum(solving(one) for one in job.layers) * experts,
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
    dense = weights_bytes(job)
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
    from entangle.cli.compare import draw
    from entangle.experiments.compare import compare

    own = job.given
    return compare(
        job.model, job.text, job.windows, methods=own["methods"], sparsity=own["sparsity"],
        experts=own["experts"], memory=own["memory"], out=out, extra=draw, progress=False,
        **own["masks"],
    )  # fmt: skip


def _count_compare(job: Job) -> Counts:
    from entangle.activation import ACTIVATION_METHODS
    from entangle.experiments.compare import arms
    from entangle.mixtures import MIXTURE_METHODS

    own = job.given
    planned = own.get("arms") or arms(own["methods"], own["sparsity"], own["experts"])
    time_of: dict[str, Number] = {
        "arms": float(len(planned)), "forward": job.forward(0, 1),
        "head": job.evaluated * job.head * (1 + len(planned)),
    }  # fmt: skip
    passes, fits = 0.0, set[str]()
    for arm in planned:
        name = arm.method
        if name in ACTIVATION_METHODS or name in MIXTURE_METHODS:
            time_of[f"masks {name}"] = time_of.get(f"masks {name}", 0.0) + job.forward(0, 1)
            if name not in fits:
                time_of[f"fit {name}"] = job.forward(1)
            passes, fits = passes + (name not in fits), {*fits, name}
            continue
        kind = "solve" if name.startswith("expansion") else f"solve {name}"
        for key, value in _built(job, arm.experts, evaluated=1.0).items():
            if key != "head":
                key = kind if key == "solve" else key
                own_gram = key == "gram" and kind != "solve" and name != "sparsegpt"
                key = f"{key} {name}" if own_gram else key
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
    given, first = job.given, {"sparsity": job.given["sparsity"][:1], "arms": None}
    return [
        first | {"methods": [method], "experts": [k]}
        for method in given["methods"]
        for k in ((2, 4) if method.startswith("expansion") else (1,))
    ]


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
        "solve": sum(solving(one) for one in job.layers) * float(sum(experts)),
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
        seeds=own["seeds"], extra=save_figures if own.get("figures", True) else None,
        progress=False, **own["settings"],
    )  # fmt: skip


def _count_ablate(job: Job) -> Counts:
    from entangle.experiments.arms import PRUNERS

    own, known = job.given, job.given["settings"]
    columns = len(known["by"])
    picked = own.get("picked") or sum(
        columns if one in ("top", "bottom") else 1 if one == "all" or not isinstance(one, str)
        else own["seeds"] for one in own["selections"]
    )  # fmt: skip
    routers, arms, inside = len(known["router"]), 0, 0.0
    pruned = [one for one in known["interventions"] if one in PRUNERS]
    several = [k for k in own["experts"] if k > 1]
    for one in known["interventions"]:
        levels = len(own["strengths"] if one in PRUNERS else known["edit_strengths"])
        counts = [routers if k > 1 else 1 for k in own["experts"]] if one in PRUNERS else [1]
        arms += picked * levels * sum(counts)
        inside += picked * levels * routers * len(several) * (one in PRUNERS)
    share = 1 - (1 - min(1.0, known.get("fraction") or 0.03)) ** picked
    share = 1.0 if "all" in own["selections"] else share
    rows = {one.name: share * one.out_features * len(own["strengths"]) for one in job.layers}
    solve = sum(solving(one, rows[one.name]) for one in job.layers)
    fits = bool(several) * len(pruned) * routers
    scored = own.get("scores") is None
    calibrated = float(scored or (bool(pruned) and 1 in own["experts"]))
    evaluated = 1.0 + arms + own.get("steps", 0)
    wide = float(sum(one.in_features**2 for one in job.inputs))
    time_of = {
        "forward": job.forward(calibrated + fits, evaluated),
        "head": evaluated * job.evaluated * job.head,
        "arms": evaluated - 1, "outputs": float(scored * job.tokens * job.neurons),
        "neurons": float(scored * job.neurons), "gram": bool(pruned) * job.tokens * wide,
        "solve": solve * len(pruned) * (1 in own["experts"]),
        "routed": fits * solve * float(1 + sum(several)),
        "cluster": float(fits * job.tokens * len(job.inputs) * sum(several)),
        "inside": inside * job.evaluated * len(job.layers),
    }  # fmt: skip
    held = sum(rows[one.name] * one.in_features for one in job.layers) * float(sum(several))
    peak = {
        "pass": _pass(job), "logits": _logits(job), "neurons": float(job.neurons),
        "grams": bool(pruned) * wide, "routed": held,
    }  # fmt: skip
    disk = {"arms": float(arms), "windows": evaluated * job.evaluated,
            "neurons": float(job.neurons)}  # fmt: skip
    return Counts(time_of, peak, disk, passes=(calibrated + fits, evaluated))


def _sizes_ablate(job: Job) -> list[dict[str, Any]]:
    own = job.given
    first: dict[str, Any] = {
        "strengths": own["strengths"][:1], "seeds": 1, "scores": None, "picked": None, "steps": 0,
    }  # fmt: skip
    texts = [one for one in own["selections"] if isinstance(one, str)] or ["top"]
    found = [
        {**first, "selections": texts[:1], "experts": own["experts"][:1]},
        {
            **first,
            "selections": texts,
            "experts": own["experts"][:1],
            "strengths": own["strengths"][:2],
        },
    ]
    several = [k for k in own["experts"] if k > 1]
    return (
        [*found, {**first, "selections": texts[:1], "experts": [min(several)]}]
        if several
        else found
    )


SCORE = Subject(_run_score, _count_score)
"""``given``: method, md, memory, batch_size."""
EVALUATE = Subject(_run_evaluate, _count_evaluate)
"""``given``: batch_size."""
BUILD = Subject(_run_build, _count_build, _sizes_build)
"""Pruned models and expansions."""
COMPARE = Subject(_run_compare, _count_compare, _sizes_compare)
"""``given``: methods, sparsity, experts, masks, memory; arms, if they are not these."""
DECOMPOSE = Subject(_run_decompose, _count_decompose, _sizes_decompose)
"""``given``: experts, memory, settings."""
ABLATE = Subject(_run_ablate, _count_ablate, _sizes_ablate)
"""``given``: selections, strengths, experts, seeds, memory, scores, settings; picked, how many
selections there are, if they are not these."""
