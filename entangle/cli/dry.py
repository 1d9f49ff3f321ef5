"""``--dry-run``: what every command's time, memory and disk are linear in, and how it is told.

What one of each count takes is measured by `entangle.cli.trials`.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import allocate, options
from entangle.cli.tables import Table, present
from entangle.cli.trials import (
    Counts,
    Job,
    Number,
    Spent,
    Subject,
    estimate,
    high_water,
    solving,
    weights_bytes,
)
from entangle.errors import InvalidInput, MemoryLimit
from entangle.memory import free_on_gpu, free_ram

if TYPE_CHECKING:
    from entangle.models.layers import Layer
    from entangle.models.loading import LanguageModel


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
    from entangle.experiments.masked import DSNOT
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
    solve = sum(solving(one, rows[one.name]) for one in job.layers)
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
    held = sum(rows[one.name] * one.in_features for one in job.layers) * float(sum(several))
    peak = {
        "pass": _pass(job), "logits": _logits(job), "neurons": float(job.neurons), "grams": wide,
        "routed": held,
    }  # fmt: skip
    disk = {"arms": float(arms), "windows": evaluated * job.evaluated,
            "neurons": float(job.neurons)}  # fmt: skip
    return Counts(time_of, peak, disk, passes=(1.0 + fits, evaluated))


def _sizes_ablate(job: Job) -> list[dict[str, Any]]:
    own = job.given
    first = {"strengths": own["strengths"][:1], "seeds": 1, "scores": None}
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
    if plain and arguments.method is not None:
        raise InvalidInput(
            f"`compare --methods {arguments.method}` tells beforehand what that takes; drop "
            "--dry-run here."
        )
    packed = arguments.packed if plain else None
    allocation = expand.allocation_of(arguments)
    expand.check_evaluated(arguments)
    spec = options.chosen_layers(arguments, allocation)
    build = expand.pruning_settings(arguments, allocated=False) | {"seed": arguments.seed}
    experts: Number = 1 if plain else arguments.experts
    if allocation is not None:
        build |= {"sparsity": allocation.overall, "pattern": "row"}
        if allocation.experts is not None and not plain:
            experts = round(sum(allocation.experts.values()) / len(allocation.experts))
    text = _text_of(arguments, model, arguments.evaluation)
    given: dict[str, Any] = {
        "build": build, "plain": plain and packed is None, "experts": experts,
        "memory": options.parse_memory(arguments.memory), "dense": text is not None,
        "format": packed or "bitmap", "values": None, "router": "kmeans",
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


_EVALUATE = Subject(_run_evaluate, _count_evaluate)
_BUILD = Subject(_run_build, _count_build, _sizes_build)
COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace, Any], Job], Subject]] = {
    "score": (_score_job, Subject(_run_score, _count_score)),
    "evaluate": (_evaluate_job, _EVALUATE),
    "prune": (_build_job, _BUILD),
    "expand": (_build_job, _BUILD),
    "compare": (_compare_job, Subject(_run_compare, _count_compare, _sizes_compare)),
    "ablate": (_ablate_job, Subject(_run_ablate, _count_ablate, _sizes_ablate)),
    "allocate": (
        allocate.dry_job,
        Subject(allocate.dry_run, allocate.dry_counts, allocate.dry_sizes),
    ),
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
    if arguments.command == "allocate":
        from entangle.results.scores import load_scores

        allocate.name_model(arguments, load_scores(arguments.scores))
    model = options.load_model(arguments)
    with evaluating(model.module):
        job = make(arguments, model)
        memory = options.parse_memory(getattr(arguments, "memory", options.AUTO))
        job = replace(job, budget=memory_for(memory, model.module))
        since = time.time() - psutil.Process().create_time()
        before = (time.process_time(), since, high_water())
        also = None if job.windows is None or subject is _EVALUATE else _EVALUATE
        found, seconds = estimate(subject, job, beside=also, before=before)
    show(arguments, job, subject.counts(job), found, seconds)
    refuse(arguments, job, found)


def show(
    arguments: argparse.Namespace, job: Job, counts: Counts, found: Spent, seconds: Number
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

    from entangle.runs.places import check_room

    free = free_ram() + int(psutil.Process().memory_info().rss)
    if found.peak > free:
        raise MemoryLimit(_told("memory", found.peak, free))
    gpu = free_on_gpu(job.model.device) + weights_bytes(job)
    if job.model.device.type == "cuda" and found.device > gpu:
        raise MemoryLimit(_told(f"memory of {job.model.device}", found.device, gpu))
    check_room(arguments.out, found.disk)


def _told(what: str, needed: int, free: int) -> str:
    return (
        f"the run takes {needed / 2**30:.2f} GiB of {what} and {free / 2**30:.2f} GiB are free; "
        "bring the weights block by block (--stream), lower --memory, --batch-size, --n-seq or "
        "--seq-len, or take fewer layers at a time (--layer)."
    )
