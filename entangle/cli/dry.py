"""``--dry-run``: what every command's time, memory and disk are linear in, and how it is told.

What one of each count takes is measured by `entangle.cli.trials`.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from entangle.cli import allocate, anchor, counts, experts, options, report
from entangle.cli.tables import Table, present
from entangle.cli.trials import (
    Job,
    Number,
    Spent,
    Subject,
    estimate,
    high_water,
    weights_bytes,
)
from entangle.errors import InvalidInput, MemoryLimit
from entangle.memory import free_on_gpu, free_ram

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel


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


COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace, Any], Job], Subject]] = {
    "score": (_score_job, counts.SCORE),
    "evaluate": (_evaluate_job, counts.EVALUATE),
    "prune": (_build_job, counts.BUILD),
    "expand": (_build_job, counts.BUILD),
    "compare": (_compare_job, counts.COMPARE),
    "ablate": (_ablate_job, counts.ABLATE),
    "allocate": (
        allocate.dry_job,
        Subject(allocate.dry_run, allocate.dry_counts, allocate.dry_sizes),
    ),
    "decompose": (_decompose_job, counts.DECOMPOSE),
    "anchor": (anchor.dry_job, Subject(anchor.dry_run, anchor.dry_counts, anchor.dry_sizes)),
    "experts": (experts.dry_job, Subject(experts.dry_run, experts.dry_counts)),
    "report": (
        report.dry_job,
        Subject(report.dry_run, report.dry_counts, report.dry_sizes, report.dry_ready),
    ),
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
        also = None if job.windows is None or subject is counts.EVALUATE else counts.EVALUATE
        found, seconds = estimate(subject, job, beside=also, before=before)
    show(arguments, job, subject.counts(job).passes, found, seconds)
    refuse(arguments, job, found)


def show(
    arguments: argparse.Namespace, job: Job | None, passes: Sequence[Number], found: Spent,
    seconds: Number, *, more: Mapping[str, object] | None = None, tables: Sequence[Table] = (),
) -> None:  # fmt: skip
    """Print the estimate.

    Parameters
    ----------
    arguments
        Of the command.
    job
        What tokens are told of; None where nothing is left to do.
    passes
        Of the text, and of the windows.
    found
        What it takes.
    seconds
        That finding it took.
    more, tables
        What else is told, printed below.
    """
    import pandas as pd

    tokens, evaluated = (0, 0) if job is None else (job.tokens, job.evaluated)
    content = {
        "dry_run": arguments.command,
        "tokens": tokens, "passes": passes[0],
        "evaluation_tokens": evaluated, "evaluation_passes": passes[1],
        "peak_memory_bytes": found.peak, "peak_gpu_memory_bytes": found.device,
        "disk_bytes": found.disk, "seconds": found.wall, "cpu_seconds": found.cpu,
        "measured_seconds": seconds, **(more or {}),
    }  # fmt: skip
    rows = [
        ("tokens to calibrate on", f"{tokens:,} × {passes[0]:.4g} passes"),
        ("tokens to evaluate on", f"{evaluated:,} × {passes[1]:.4g} passes"),
        ("peak memory", f"{found.peak / 2**30:.2f} GiB"),
        ("peak GPU memory", f"{found.device / 2**30:.2f} GiB"),
        ("disk", f"{found.disk / 2**20:,.1f} MiB"),
        ("time", f"{found.wall:,.0f} s ({found.cpu:,.0f} s of processors)"),
    ]
    frame = pd.DataFrame(rows, columns=["what", "estimate"])
    arguments.table = None
    title = f"What {arguments.command} will take (measured in {seconds:.0f} s; nothing was written)"
    present(arguments, [Table("estimate", frame, title, keys=("what",)), *tables], content)


def refuse(arguments: argparse.Namespace, job: Job, found: Spent) -> None:
    """Refuse what does not fit into memory, GPU or disk, with the remedy."""
    import psutil

    from entangle.runs.places import check_room

    free = free_ram() + int(psutil.Process().memory_info().rss)
    if found.peak > free:
        raise MemoryLimit(_told(arguments, "memory", found.peak, free))
    gpu = free_on_gpu(job.model.device) + weights_bytes(job)
    if job.model.device.type == "cuda" and found.device > gpu:
        raise MemoryLimit(_told(arguments, f"memory of {job.model.device}", found.device, gpu))
    check_room(arguments.out, found.disk)


_REMEDIES = {
    "stream": "bring the weights block by block (--stream)", "memory": "lower --memory",
    "batch_size": "lower --batch-size", "n_seq": "lower --n-seq or --seq-len",
    "layer": "take fewer layers at a time (--layer)", "claims": "ask for fewer claims (--claims)",
}  # fmt: skip
"""By the option that a command must have."""


def _told(arguments: argparse.Namespace, what: str, needed: int, free: int) -> str:
    remedies = [said for name, said in _REMEDIES.items() if hasattr(arguments, name)]
    return (
        f"the run takes {needed / 2**30:.2f} GiB of {what} and {free / 2**30:.2f} GiB are free; "
        f"{', '.join(remedies[:-1])} or {remedies[-1]}."
    )
