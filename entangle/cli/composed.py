"""``--dry-run`` of studies and traces, whose experiments are those of other commands.

Trials are done once for each kind of work (scores, ablations, comparisons, the page), and told of
every experiment by its own counts.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import counts, dry, options
from entangle.cli.study import claims_table, default_texts, loaded, pairs_of
from entangle.cli.tables import Table, present, records
from entangle.cli.trials import Counts, Job, Measured, Number, Spent, Subject, high_water, measure
from entangle.errors import EntangleError

if TYPE_CHECKING:
    import pandas as pd

    from entangle.models.layers import Layer
    from entangle.studies.subject import Subject as Studied

COMMANDS = ("study", "trace")
"""Commands that are told of here."""
PAGE = "page"
"""What is done for every claim from experiments that are there, and the page."""
_CHEAP = ("non-gaussian", "wd-md", "negative-side")  # claims of trials, which read scores alone
NOTHING = Spent(0.0, 0.0, 0, 0, 0)


@dataclass(frozen=True)
class Part:
    """An experiment."""

    kind: str
    """Whose trials tell of it; a key of `_KINDS`."""
    job: Job
    counts: Counts


def _run_page(job: Job, out: Path) -> object:
    """Study a job's model, or trace it twice, which is read the second time."""
    from entangle.studies.study import Loaded, study
    from entangle.studies.trace import trace

    own: dict[str, Any] = dict(job.given)
    made = Loaded(lambda _model, _size: (job.text, job.windows), lambda _name, _at: job.model)  # type: ignore[arg-type, return-value]
    more: dict[str, Any] = {"out": out, "progress": False, "loaded": made}
    if own["command"] == "trace":
        return trace(own["names"][:2], seeds=1, **more)
    return study(own["names"][:1], claims=own["claims"], **more)


def _count_page(job: Job) -> Counts:
    """Count the claims, beside the scores, which a trial makes too."""
    scored = counts.SCORE.counts(job)
    claims: dict[str, Number] = {"claims": float(len(job.given["claims"]))}
    rows = {"rows": float(len(job.given["claims"]) * job.neurons)}
    return replace(scored, time={**scored.time, **claims, **rows}, disk={**scored.disk, **claims})


def _sizes_page(job: Job) -> list[dict[str, Any]]:
    if job.given["command"] == "trace":
        return [{"shapes": 2}]
    return [{"claims": _CHEAP[:1], "shapes": 2}, {"claims": _CHEAP, "shapes": 2}]


def _sizes_compare(job: Job) -> list[dict[str, Any]]:
    """Return as many trials as tell what tokens and layers of a method take, and experts."""
    common = {"sparsity": (0.5,), "arms": None}
    found: list[dict[str, Any]] = []
    for method in job.given["methods"]:
        several = (
            (2, 4) if method == "expansion" else (2,) if method == "expansion-random" else (1,)
        )
        for k in several:
            shapes = 2 if k > 2 or method == "expansion-random" else 4
            found.append(common | {"methods": [method], "experts": [k], "shapes": shapes})
    return found


_KINDS: Mapping[str, Subject] = {
    "scores": counts.SCORE,
    "ablation": counts.ABLATE,
    "comparison": replace(counts.COMPARE, sizes=_sizes_compare),
    PAGE: Subject(_run_page, _count_page, _sizes_page),
}


class Planned:
    """The experiments of one model, and what they will take.

    Parameters
    ----------
    subject
        The model with its texts; nothing is made of it.
    asked
        What trials of the page need: command, names and claims.
    """

    def __init__(self, subject: "Studied", asked: Mapping[str, Any]) -> None:
        from entangle.memory import memory_for
        from entangle.models.layers import find_layers
        from entangle.scoring.score import _resolve_method

        self._subject, self.size = subject, subject.size
        model, text = subject.model, subject.calibration
        layers = find_layers(model.module, "all", "mlp")
        memory = {"memory": subject.memory}
        method = _resolve_method("auto", model, layers, text, subject.memory)
        given = {**memory, **asked, "method": method, "md": True, "batch_size": None, "masks": {}}
        budget = memory_for(subject.memory, model.module)
        self.job = Job(model, tuple(layers), text, subject.text, given, budget)
        self._known: dict[str, Measured] = {}
        self._told: dict[str, Part | str] = {}
        self.first = 0.0
        """Processor seconds of what is done once: digests, and the first of every kind."""

    def part(self, name: str) -> "Part | str":
        """Return an experiment by its name in the subject, or why it cannot be made."""
        if name not in self._told:
            try:
                self._told[name] = _PARTS[name](self)
            except EntangleError as error:
                self._told[name] = str(error)
        return self._told[name]

    def spent(self, part: Part) -> Spent:
        """Return what an experiment will take; trials of its kind are done first."""
        if part.kind not in self._known:
            beside = next((one.beside for one in self._known.values() if one.beside), None)
            used = part.kind in ("ablation", "comparison")
            found, hashing = measure(
                _KINDS[part.kind], self._example(part.kind),
                beside=(beside or counts.EVALUATE) if used else None,
            )  # fmt: skip
            self.first += found.once + (0.0 if self._known else hashing)
            self._known[part.kind] = found
        return self._known[part.kind].told(part.job, part.counts)

    def _example(self, kind: str) -> Job:
        """Return the job that trials of a kind are cut from."""
        own = [one for one in self._told.values() if isinstance(one, Part) and one.kind == kind]
        if kind == "ablation":
            experts = sorted({1, *(k for one in own for k in one.job.given.get("experts", ()))})
            given: dict[str, Any] = {
                "experts": experts,
                "strengths": (0.9, 0.95),
                "selections": ("top", "random"),
            }
            return self._ablating(self._subject.layers, ("top",), **given).job
        if kind == "comparison":
            methods = dict.fromkeys(arm.method for one in own for arm in one.job.given["arms"])
            order = sorted(methods, key=lambda one: one != "sparsegpt")
            return replace(self.job, given={**self.job.given, "methods": order})
        return self.job

    def scores(self) -> Part:
        """Scores of all linears of the feed-forward parts."""
        return Part("scores", self.job, counts.SCORE.counts(self.job))

    def page(self, claims: int) -> Part:
        """Return what is made of experiments that are there, for some claims."""
        found = {"claims": float(claims), "rows": float(claims * self.job.neurons)}
        return Part(PAGE, self.job, Counts(found, {}, found))

    def _ablating(
        self, layers: "Sequence[Layer]", rules: Sequence[str], *, fraction: float = 0.03,
        also: int = 0, steps: int = 0, intervention: str = "prune",
        router: Sequence[str] = ("kmeans",), **given: Any,
    ) -> Part:  # fmt: skip
        """Return an ablation by scores that are there; the fields are those of `counts.ABLATE`."""
        drawn = sum(self._subject.seeds if one.startswith("random") else 1 for one in rules)
        settings = {
            "by": ("wd",), "fraction": fraction, "interventions": (intervention,),
            "edit_strengths": (1.0,), "router": router,
        }  # fmt: skip
        own: dict[str, Any] = {
            "selections": rules, "picked": drawn + also, "strengths": (0.95,), "experts": (1,),
            "seeds": self._subject.seeds, "scores": "there", "steps": steps, "figures": False,
            "memory": self._subject.memory, "settings": settings, **given,
        }  # fmt: skip
        job = replace(self.job, layers=tuple(layers), given=own)
        return Part("ablation", job, counts.ABLATE.counts(job))

    def pruning(self) -> Part:
        """Top rows and all controls, pruned."""
        from entangle.studies.subject import PRUNED, RANKED, STRENGTHS

        rows, also = self._subject.layers, len(RANKED)
        return self._ablating(rows, PRUNED, also=also, strengths=STRENGTHS)

    def inside(self) -> Part:
        """Rows pruned inside experts."""
        from entangle.studies.subject import ROUTED, ROUTED_BY

        experts = self.size.inside
        return self._ablating(self._subject.layers, ROUTED, experts=experts, router=ROUTED_BY)

    def clamped(self) -> Part:
        """Clamp outputs, and search for as much harm."""
        from entangle.experiments.arms import STEPS
        from entangle.models.layers import find_layers
        from entangle.studies.subject import CLAMPED, PRUNED

        gates = find_layers(self.job.model.module, self._subject.gates, None)
        how: dict[str, Any] = {"fraction": CLAMPED, "intervention": "clamp-negative"}
        return self._ablating(gates, PRUNED, steps=STEPS, **how)

    def syntax(self) -> Part:
        """Minimal pairs instead of windows: dense, top rows, matched ones, and random ones."""
        from entangle.studies.subject import joined_pairs

        pairs = joined_pairs(self._subject.grammar, self._subject.other)
        encode: Any = self.job.model.tokenizer
        tokens = sum(len(encode(one)["input_ids"]) for one in (*pairs.good, *pairs.bad))
        times = (3 + self._subject.seeds) * tokens / self.job.evaluated
        found = {"forward": self.job.forward(0, times), "arms": 3.0 + self._subject.seeds,
                 "head": times * self.job.evaluated * self.job.head}  # fmt: skip
        disk = {"arms": 3.0 + self._subject.seeds, "neurons": float(self.job.neurons)}
        known = replace(self.clamped().counts, time=found, disk=disk, passes=(0, times))
        return Part("ablation", self.job, known)

    def comparison(self) -> Part:
        """Whole models pruned and expanded."""
        from entangle.studies.subject import compared_arms

        return self._comparing(compared_arms(self.size))

    def allocated(self) -> Part:
        """Whole models with zeros that are allocated, and with even ones."""
        from entangle.experiments.compare import ComparisonArm
        from entangle.results.comparison import UNIFORM
        from entangle.studies.subject import ALLOCATED

        names = (UNIFORM, *ALLOCATED)
        return self._comparing(
            [
                ComparisonArm("sparsegpt", one, 1, name)
                for one in self.size.allocated
                for name in names
            ]
        )

    def _comparing(self, arms: Sequence[Any]) -> Part:
        job = replace(self.job, given={**self.job.given, "arms": arms})
        return Part("comparison", job, counts.COMPARE.counts(job))

    def damage(self) -> Part:
        """Single rows of some blocks, one after the other: the later half of a pass each."""
        groups, blocks = self._subject.damaged_layers, max(1, len(self.job.weights))
        rows = 6 * self.size.rows
        layers = [one for own in groups for one in own[:rows]]  # of as many experts as rows
        later = sum(1 - (own[0].block or 0) / blocks for own in groups)
        passes, losses = 1 + rows * later, 1.0 + rows * len(groups)
        found = {
            "forward": self.job.forward(1, passes), "arms": losses,
            "head": losses * self.job.evaluated * self.job.head,
            "gram": float(self.job.tokens) * sum(
                (1.0 if math.isnan(one.share) else one.share) * one.in_features**2 for one in layers
            ),
        }  # fmt: skip
        peak = {**self._ablating(layers, ("top",)).counts.peak, "neurons": 0.0}
        return Part("ablation", self.job, Counts(found, peak, {}, passes=(1, passes)))

    def traced(self) -> Part:
        """Prune top and random rows, as a trace does."""
        from entangle.studies.trace import STRENGTH

        return self._ablating(self._subject.layers, ("top", "random"), strengths=(STRENGTH,))


_PARTS: Mapping[str, Callable[[Planned], Part]] = {
    "scores": Planned.scores, "pruning": Planned.pruning, "inside": Planned.inside,
    "clamped": Planned.clamped, "syntax": Planned.syntax, "comparison": Planned.comparison,
    "allocated": Planned.allocated, "damage": Planned.damage, "traced": Planned.traced,
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What one model will take."""

    job: Job
    spent: Spent
    passes: tuple[Number, Number]
    claims: Sequence[Mapping[str, object]] = ()
    """A row each."""


def together(parts: Sequence[Spent], first: Number = 0.0, ratio: Number = 1.0) -> Spent:
    """Return what work takes that is done one after the other."""
    return Spent(
        first + sum(one.cpu for one in parts), first * ratio + sum(one.wall for one in parts),
        max((one.peak for one in parts), default=0), max((one.device for one in parts), default=0),
        sum(one.disk for one in parts),
    )  # fmt: skip


def tell_claims(planned: Planned, claims: Sequence[str], done: Sequence[str], model: str) -> Told:
    """Return what the claims of a study on one model will take, one by one and together.

    Parameters
    ----------
    planned
        The experiments.
    claims
        Those that are left to measure.
    done
        Experiments that are there.
    model
        What tables call it.
    """
    from entangle.studies.claims import CLAIMS

    needs, rows = {one: [n for n in CLAIMS[one].needs if n not in done] for one in claims}, []
    why: dict[str, str] = {}
    for one, names in needs.items():
        lacking = [part for name in names if isinstance(part := planned.part(name), str)]
        why |= {one: lacking[0]} if lacking else {}
    asked = [one for one in claims if one not in why]
    used = {name: _made(planned, name) for one in asked for name in needs[one]}
    took = {name: planned.spent(part) for name, part in used.items()}
    pages = [planned.spent(planned.page(count)) for count in (1, len(asked))] if claims else []
    each = (pages[1].wall - pages[0].wall) / max(1, len(asked) - 1) if asked else 0.0
    for one in claims:
        own = [] if one in why else needs[one]
        alone = [n for n in own if not any(n in needs[other] for other in asked if other != one)]
        passes = [sum(used[n].counts.passes[i] for n in own) for i in (0, 1)]
        rows.append({
            "model": model, "claim": one, "experiments": " ".join(own),
            "tokens": round(passes[0] * planned.job.tokens + passes[1] * planned.job.evaluated),
            "passes": passes[0], "evaluation_passes": passes[1],
            "seconds": sum(took[n].wall for n in own) + (0.0 if one in why else pages[0].wall),
            "saved": sum(took[n].wall for n in alone) + (0.0 if one in why else each),
            "why": why.get(one, ""),
        })  # fmt: skip
    total = together([*took.values(), *pages[1:]], planned.first)
    return Told(planned.job, total, _passes(used.values()), rows)


def _made(planned: Planned, name: str) -> Part:
    part = planned.part(name)
    assert isinstance(part, Part)  # noqa: S101
    return part


def _passes(parts: Any) -> tuple[Number, Number]:
    found = [one.counts.passes for one in parts]
    return sum(one[0] for one in found), sum(one[1] for one in found)


def run(arguments: argparse.Namespace) -> None:
    """Print what a study or a trace will take; nothing of it is left.

    Raises
    ------
    MemoryLimit, Unavailable
        If it does not fit, after it was printed.
    """
    begin = time.perf_counter()
    names = (_study if arguments.command == "study" else _trace)(arguments)
    told: list[Told] = []
    read = names if arguments.command == "study" else names[:1]
    for name in read:
        told.append(_told(arguments, name, names, first=not told))
    if arguments.command == "trace":
        told = _revisions(told[0], names)
    show(arguments, names, told, time.perf_counter() - begin)
    whole = together([one.spent for one in told])
    if told:
        dry.refuse(arguments, told[-1].job, whole)


def _study(arguments: argparse.Namespace) -> list[str]:
    """Check a study's settings, list its claims, and return the models that are not studied yet."""
    from entangle.checks import choices, whole
    from entangle.models.hub import model_source
    from entangle.studies.claims import CLAIMS
    from entangle.studies.study import is_study, split_revision

    claims = list(CLAIMS) if arguments.claims == "all" else options.names(arguments.claims)
    arguments.asked = choices("claims", claims, CLAIMS, kind="claim")
    whole("seeds", arguments.seeds, least=5)
    _texts(arguments)
    fresh = [one for one in arguments.models if not is_study(one)]
    for one in fresh:
        model_source(split_revision(one)[0])
    if not (arguments.json or arguments.csv or arguments.latex):
        arguments.table = None
        present(arguments, [Table("claims", claims_table(arguments.asked), "Claims",
                                  keys=("claim",))], ())  # fmt: skip
    return fresh


def _trace(arguments: argparse.Namespace) -> list[str]:
    from entangle.checks import whole
    from entangle.models.hub import model_source
    from entangle.studies.study import split_revision
    from entangle.studies.trace import revisions_of

    whole("seeds", arguments.seeds, least=1)
    _texts(arguments)
    revisions = () if arguments.revisions is None else options.names(arguments.revisions)
    names = revisions_of(list(dict.fromkeys(arguments.models)), revisions)
    for one in names:
        model_source(split_revision(one)[0])
    return names


def _texts(arguments: argparse.Namespace) -> None:
    from entangle.seeding import check_seed
    from entangle.studies.subject import SIZES

    check_seed(arguments.seed)
    default_texts(arguments, SIZES[arguments.size])


def _told(arguments: argparse.Namespace, name: str, names: Sequence[str], *, first: bool) -> Told:
    """Load a model, and return what all work on it takes."""
    import psutil

    from entangle.evaluation.logits import as_causal_model
    from entangle.models.blocks import evaluating
    from entangle.studies.study import split_revision
    from entangle.studies.subject import SIZES
    from entangle.studies.subject import Subject as Studied

    cpu, wall = time.process_time(), time.perf_counter()
    made, size = loaded(arguments), SIZES[arguments.size]
    model = as_causal_model(made.load(*split_revision(name)))
    text, windows = made.texts(model, size)
    pairs: dict[str, Any] = {}
    if arguments.command == "study":
        pairs = {"grammar": pairs_of(arguments, arguments.blimp, size.pairs),
                 "other": pairs_of(arguments, arguments.other_pairs, None)}  # fmt: skip
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if first or arguments.command == "trace":
        start = (time.process_time(), time.time() - psutil.Process().create_time())
    before = Spent(*(start if first else (cpu, wall)), high_water(), 0, 0)
    memory = options.parse_memory(arguments.memory)
    asked = {"command": arguments.command, "names": list(names), "claims": ()}
    with evaluating(model.module):
        subject = Studied(name, model, text, windows, size, Path(), arguments.seeds,
                          arguments.seed, memory, progress=False, **pairs)  # fmt: skip
        planned = Planned(subject, asked)
        if arguments.command == "trace":
            return _of_revision(planned, before, Spent(cpu, wall, 0, 0, 0))
        claims, done = _left(arguments, model, text, windows)
        found = tell_claims(planned, claims, done, name)
    return replace(found, spent=together([before, found.spent]))


def _left(arguments: argparse.Namespace, *made: Any) -> tuple[list[str], list[str]]:
    """Return the claims that --resume would measure, and the experiments that it would read."""
    from entangle.runs.claims import beside
    from entangle.runs.provenance import expand_user
    from entangle.studies.study import key_of, runs_of

    kept = beside(expand_user(arguments.out).resolve(), "studying")
    if arguments.force or not arguments.resume or not kept.is_dir():
        return arguments.asked, []
    key = key_of(*made)
    claims = [one for one in arguments.asked if not (kept / f"{key}-{one}.parquet").exists()]
    runs = runs_of(kept, made[0], key)
    done = [one.parent.name for one in runs.glob("*/manifest.json")]
    return claims, [*done, *(one.stem for one in runs.glob("damage.parquet"))]


def _of_revision(planned: Planned, before: Spent, loading: Spent) -> Told:
    """Return what one revision of a trace takes, with the rows of all: the first, and each."""
    parts = [_made(planned, name) for name in ("scores", "traced")]
    each = together([planned.spent(one) for one in parts])
    page = planned.spent(planned.page(0))
    start = together([before, page], planned.first)
    rows = [{"first": together([start, each]), "more": together([loading, each])}]
    return Told(planned.job, each, _passes(parts), rows)


def _revisions(one: Told, names: Sequence[str]) -> list[Told]:
    """Return what every revision takes: all are like the first, which alone was measured."""
    first, more = one.claims[0]["first"], one.claims[0]["more"]
    return [
        replace(one, spent=first if number == 0 else more, claims=())  # type: ignore[arg-type]
        for number, _ in enumerate(names)
    ]


def show(
    arguments: argparse.Namespace, names: Sequence[str], told: Sequence[Told], seconds: Number
) -> None:
    """Print what every claim, every model and all together take."""
    import pandas as pd

    models = pd.DataFrame([{
        "model": name, "seconds": one.spent.wall, "cpu_seconds": one.spent.cpu,
        "peak_memory_bytes": one.spent.peak, "peak_gpu_memory_bytes": one.spent.device,
        "disk_bytes": one.spent.disk, "tokens": one.job.tokens, "passes": one.passes[0],
        "evaluation_tokens": one.job.evaluated, "evaluation_passes": one.passes[1],
    } for name, one in zip(names, told, strict=True)])  # fmt: skip
    claims = pd.DataFrame([row for one in told for row in one.claims])
    passes = tuple(sum(one.passes[i] for one in told) for i in (0, 1))
    tables = [_models_table(models)] if len(told) > 1 else []
    if len(claims):
        tables.append(_claims_table(claims, several=len(told) > 1))
    more = {"claims": records(claims), "models": records(models)}
    if arguments.command == "study":
        more["listed"] = records(claims_table(arguments.asked))
    dry.show(
        arguments, told[0].job if told else None, passes, together([one.spent for one in told]),
        seconds, more=more, tables=tables,
    )  # fmt: skip


def _models_table(models: "pd.DataFrame") -> Table:
    shown = models.assign(
        memory=models["peak_memory_bytes"] / 2**30, disk=models["disk_bytes"] / 2**20
    )
    shown = shown[["model", "seconds", "cpu_seconds", "memory", "disk"]]
    formats = {"seconds": ",.0f", "cpu_seconds": ",.0f", "memory": ".2f", "disk": ",.1f"}
    title = "Models (seconds, GiB at the peak, MiB of disk)"
    return Table("models", models, title, formats, keys=("model", "seconds"), shown=shown)


def _claims_table(claims: "pd.DataFrame", *, several: bool) -> Table:
    hidden = ([] if several else ["model"]) + ([] if claims["why"].any() else ["why"])
    formats = {"tokens": ",d", "passes": ".3g", "evaluation_passes": ".3g", "seconds": ",.0f",
               "saved": ",.0f"}  # fmt: skip
    return Table(
        "claims", claims, "Claims: seconds alone, and seconds saved without it among those asked",
        formats, keys=("claim", "seconds", "saved"), optional=("experiments", "tokens"),
        shown=claims.drop(columns=hidden),
    )  # fmt: skip
