"""`study`: every claim on every model, gone on with where it ended, as one result with a page."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.checks import choice, choices, whole
from entangle.checks import names as checked_names
from entangle.errors import EntangleError, InvalidInput, Unavailable
from entangle.evaluation import EvaluationText, MinimalPairs, load_evaluation
from entangle.evaluation.logits import as_causal_model
from entangle.models.hub import model_source
from entangle.models.loading import LanguageModel, load_model
from entangle.results.study import KIND, NUMBERS, Study
from entangle.runs.progress import tell
from entangle.runs.provenance import (
    RunClock,
    claimed,
    disk_errors,
    expand_user,
    make_manifest,
    read_manifest,
    shown,
)
from entangle.runs.unfinished import Unfinished
from entangle.seeding import check_seed
from entangle.studies.claims import CLAIMS, Claim
from entangle.studies.joining import TEXTS, joined, plain, united
from entangle.studies.page import page
from entangle.studies.rules import LEVEL, ONE_SIDED, at, decided, judged
from entangle.studies.stored import stored_as
from entangle.studies.subject import SIZES, Size, Subject
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

PAGE = "index.html"
Texts = Callable[[LanguageModel, Size], tuple[CalibrationSet, EvaluationText]]


@dataclass(frozen=True)
class Loaded:
    """How models are loaded, and what they are studied on."""

    texts: Texts
    """Makes both texts with a model's tokenizer."""
    load: Callable[[str, str | None], LanguageModel]
    """Loads a model by name and revision."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What both depend on: recorded with the settings, in place of the size's."""


def study(
    models: str | Iterable[str],
    *,
    out: str | os.PathLike[str],
    size: str = "full",
    claims: str | Iterable[str] = "all",
    calibration: Source = "demo",
    evaluation: Source = "demo",
    blimp: MinimalPairs | None = None,
    other: MinimalPairs | None = None,
    seeds: int = 5,
    seed: int = 0,
    memory: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool | None = None,
    loaded: Loaded | None = None,
) -> Study:
    """Measure the paper's claims on models, and say of each whether it holds.

    Parameters
    ----------
    models
        Names as `entangle.load_model` takes them, ``NAME@REVISION`` for a revision of the hub, or
        folders of finished studies, which are read and not made again; those of one model become
        one.
    out
        Folder of the result, with the page ``index.html``. What is finished is kept beside it.
    size
        ``small`` or ``full`` (`entangle.studies.subject.SIZES`).
    claims
        Ids of `entangle.studies.claims.CLAIMS`, or ``all``.
    calibration, evaluation
        Texts, as in `entangle.load_calibration` and `entangle.load_evaluation`, cut as ``size``
        says; sets that were made before are taken as they are. One set and the same windows serve
        all arms of a model.
    blimp, other
        Minimal pairs about grammar, and about something else (`entangle.load_minimal_pairs`).
    seeds
        Draws of random rows, at least 5; random clusters are drawn once.
    seed
        Of everything random.
    memory
        As in `entangle.ablate`.
    resume
        Go on with an unfinished study of the same texts and settings, also with other models or
        claims.
    force
        Replace an existing result.
    progress
        Show what is made; by default where standard error is a terminal.
    loaded
        In place of ``calibration`` and ``evaluation``: how texts are made and models loaded.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a setting breaks a rule, or a model or text cannot be had. What one claim cannot measure
        of a model does not end the study: the claim is ``not measured``, and why is told.
    """
    clock, seed = RunClock(), check_seed(seed)
    names, chosen = checked_names("models", models), _claims(claims)
    whole("seeds", seeds, least=5)
    wanted = SIZES[choice("size", size, SIZES)]
    made = loaded or Loaded(_texts_of(calibration, evaluation), _load)
    with ExitStack() as held:
        held.enter_context(claimed(out))
        plan = _plan(
            {"size": size, **vars(wanted), "seeds": seeds, "seed": seed, **made.settings},
            blimp, other, calibration, evaluation,
        )  # fmt: skip
        asked = {"models": names, **{key: plan[key] for key in (*TEXTS, "settings")},
                 "claims": sorted(one.id for one in chosen)}  # fmt: skip
        if resume and not force and is_study(str(out)):
            check_finished(out, plan, asked, kind=KIND, ending="studying")
            return Study.load(out)
        before = united([Study.load(one) for one in names if is_study(one)])
        known = [name for one in before for name in one.models["model"]]
        fresh = [one for one in names if not is_study(one)]
        for one in fresh:
            model_source(split_revision(one)[0])
        kept = Unfinished(out, plan, what=KIND, ending="studying", resume=resume, force=force)
        kept.begin()
        labels = labelled(fresh, known)
        rest: dict[str, Any] = {"size": wanted, "seeds": seeds, "seed": seed, "memory": memory,
                                "grammar": blimp, "other": other, "progress": progress}  # fmt: skip
        parts = [
            _of_model(name, label, chosen, kept, made, rest)
            for name, label in zip(fresh, labels, strict=True)
        ]
        manifest = make_manifest(KIND, **plan, asked=asked)
        found = joined([*before, *parts], manifest | clock.read(memory))
        if found.differing and progress is not False:
            tell(found.differing)

        def extra(folder: Path) -> None:
            (folder / PAGE).write_text(page(found), "utf-8")
            found.figures(folder / "figures")

        found.save(out, force=force, extra=extra)
        keep_runs(kept)
        kept.remove()
    return found


def _plan(
    settings: Mapping[str, object], grammar: MinimalPairs | None, other: MinimalPairs | None,
    *texts: Source,
) -> dict[str, object]:  # fmt: skip
    """Return what makes a study: not the models and claims, of which there may come more."""
    said = [one if isinstance(one, str) else getattr(one, "source", "given") for one in texts]
    pairs = {name: None if one is None else one.describe()
             for name, one in (("grammar", grammar), ("other", other))}  # fmt: skip
    rule = {"level": LEVEL, "one_sided": ONE_SIDED, "adjusted": "Holm, of each model"}
    return {
        "model": None, "calibration": {"source": str(said[0])},
        "evaluation": {"source": str(said[1])}, "settings": {**settings, **pairs, **rule},
    }  # fmt: skip


def _claims(asked: str | Iterable[str]) -> list[Claim]:
    if asked == "all":
        return list(CLAIMS.values())
    return [CLAIMS[one] for one in choices("claims", asked, CLAIMS, kind="claim")]


def check_finished(
    out: str | os.PathLike[str], plan: Mapping[str, object], asked: Mapping[str, object], *,
    kind: str, ending: str,
) -> None:  # fmt: skip
    """Refuse a finished study or trace that is not the one that is asked for.

    A process that was killed after the last step has left results of the models; they are moved.
    """
    if plain(asked) != plain(read_manifest(expand_user(out), kind).get("asked")):
        raise InvalidInput(
            f"{str(out)!r} holds a finished {kind} of other models, claims, texts or settings; "
            "name another folder."
        )
    with suppress(InvalidInput):  # of another that was begun
        kept = Unfinished(out, plan, what=kind, ending=ending, resume=True, force=True)
        if kept.path.exists():
            keep_runs(kept)
            kept.remove()


def is_study(name: str, kind: str = KIND) -> bool:
    """Tell whether a name is the folder of a finished study, or of a trace."""
    place = expand_user(name)
    try:
        return place.is_dir() and bool(read_manifest(place, kind))
    except (InvalidInput, Unavailable):
        return False


def keep_runs(kept: Unfinished) -> None:
    """Move the results that a study was taken from into ``OUT-runs``, beside it.

    They are large, and results of their own: the study can be copied away without them.
    """
    home = kept.final.with_name(f"{kept.final.name}-runs")
    with disk_errors(home):
        for place in kept.path.glob("runs/*"):
            home.mkdir(exist_ok=True)
            shutil.rmtree(home / place.name, ignore_errors=True)
            place.rename(home / place.name)


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a name and its revision: ``org/model@step1000``; a path that exists is a path."""
    base, at, revision = name.rpartition("@")
    if not at or not base or not revision or expand_user(name).exists():
        return name, None
    return base, revision


def labelled(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Return short names, no two alike: the last part of a path, a hub id as it is."""
    used, found = set(taken), []
    for name in names:
        short = Path(name).name if expand_user(name).exists() else name
        label, count = short, 1
        while label in used:
            count += 1
            label = f"{short} ({count})"
        used.add(label)
        found.append(label)
    return found


def _load(name: str, revision: str | None) -> LanguageModel:
    return load_model(name, revision=revision)


def _texts_of(calibration: Source, evaluation: Source) -> Texts:
    def make(model: LanguageModel, size: Size) -> tuple[CalibrationSet, EvaluationText]:
        fitted: dict[str, Any] = {
            "context_length": model.context_length,
            "vocab_size": model.vocab_size,
        }
        context = model.context_length or size.seq_len
        text, windows = calibration, evaluation
        if not isinstance(text, CalibrationSet):
            text = load_calibration(
                text, model.tokenizer, n_seq=size.n_seq, seq_len=min(size.seq_len, context),
                split="train" if text == "demo" else None, **fitted,
            )  # fmt: skip
        if not isinstance(windows, EvaluationText):
            windows = load_evaluation(
                windows, model.tokenizer, seq_len=min(size.window, context),
                n_windows=size.windows, split="test" if windows == "demo" else None, **fitted,
            )  # fmt: skip
        return text, windows

    return make


def _of_model(
    name: str, label: str, claims: Sequence[Claim], kept: Unfinished, made: Loaded,
    rest: Mapping[str, Any],
) -> Study:  # fmt: skip
    """Measure all claims on one model."""
    clock, progress = RunClock(), rest["progress"]
    base, revision = split_revision(name)
    if progress is not False:
        tell(f"{label}: loading")
    model = as_causal_model(made.load(base, revision))
    calibration, text = made.texts(model, rest["size"])
    key = key_of(model, calibration, text)
    place = runs_of(kept.path, model, key)
    place.mkdir(parents=True, exist_ok=True)
    subject = Subject(label, model, calibration, text, folder=place, **rest)
    numbers, why = [], {}
    for claim in claims:
        found, reason = _measured(claim, subject, kept, f"{key}-{claim.id}.parquet")
        numbers.append(found.assign(claim=claim.id, model=label))
        why[claim.id] = reason
        if progress is not False:
            tell(f"{label}: {claim.id}: {reason or 'measured'} ({clock.read()['seconds']:.0f} s)")
    table = _typed(pd.concat(numbers, ignore_index=True))
    bars = {one.id: one.bars for one in claims}
    table = decided(table, bars)
    seconds = float(str(clock.read()["seconds"]))
    models = pd.DataFrame([_described(subject, int(table["p"].notna().sum()), seconds)])
    frame = pd.DataFrame([_judged(one, table, label, why[one.id]) for one in claims])
    texts = {"calibration": calibration.describe(), "evaluation": text.describe()}
    computes = _digest(_computed(model, but="transformers_version"))
    return Study(
        frame, table, models, {"model": {**model.describe(), "computes": computes}, **texts}
    )


def key_of(model: LanguageModel, calibration: CalibrationSet, text: EvaluationText) -> str:
    """Return what the pieces of a model on its texts are called.

    Models of the same weights that compute something else, by class or configuration, have others.
    """
    return _digest(model.digest, calibration.digest, text.digest, _computed(model))


def runs_of(kept: Path, model: LanguageModel, key: str) -> Path:
    """Return where the results are kept that the pieces of a model are taken from.

    Models of one key but another name have others, since a result tells the name.
    """
    return kept / "runs" / _digest(key, json.dumps([model.name, model.source, model.revision]))


def _computed(model: LanguageModel, *, but: str = "") -> str:
    """Return a model's class and configuration, but one of its fields."""
    config: Any = getattr(model.module, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    told = {name: one for name, one in told.items() if not name.startswith("_") and name != but}
    return json.dumps([type(model.module).__name__, told], sort_keys=True, default=str)


def _digest(*facts: str) -> str:
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:12]


def _measured(
    claim: Claim, subject: Subject, kept: Unfinished, piece: str
) -> tuple[pd.DataFrame, str]:
    """Return a claim's numbers, kept once they are measured, or none and why."""
    known = kept.find(piece)
    if known is not None:
        return pd.read_parquet(known), ""
    try:
        found = _numbers(claim, subject)
    except Unavailable:
        raise
    except EntangleError as error:
        return pd.DataFrame(), str(error)
    kept.keep(piece, lambda path: found.to_parquet(path, index=False))
    return found, ""


def _numbers(claim: Claim, subject: Subject) -> pd.DataFrame:
    found = pd.DataFrame(claim.measure(subject)).reindex(columns=_MEASURED)
    found[["setting", "unit"]] = found[["setting", "unit"]].fillna("")
    twice = found[found.duplicated(["setting", "number"])]
    if len(twice):
        raise InvalidInput(
            f"numbers of a claim must differ in name or setting; {claim.id!r} gives "
            f"{at(twice.iloc[0].to_dict())!r} twice."
        )
    return found


_MEASURED = ["setting", "number", "value", "low", "high", "n", "unit"]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Return measured numbers with all columns, and their types, where there may be none."""
    wanted = ["claim", "model", *_MEASURED]
    return table.reindex(columns=wanted).astype({name: NUMBERS[name].dtype for name in wanted})


def _described(subject: Subject, tests: int, seconds: float) -> dict[str, object]:
    about = subject.model.describe()
    return {
        "model": subject.label, "name": str(about["name"]), "source": str(about["source"]),
        "stored": stored_as(subject.model), "digest": str(about["digest"]),
        "class": str(about["class"]), "dtype": str(about["dtype"]),
        "n_parameters": about["n_parameters"],
        "special_tokens": shown(subject.text.settings),
        "calibration": _source(subject.calibration.source),
        "calibration_tokens": subject.calibration.n_tokens,
        "evaluation": _source(subject.text.source),
        "windows": subject.text.n_windows, "tests": tests, "seconds": seconds,
    }  # fmt: skip


def _source(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _judged(claim: Claim, numbers: pd.DataFrame, label: str, why: str) -> dict[str, object]:
    rows = numbers[numbers["claim"] == claim.id]
    about = {"claim": claim.id, "model": label, "sentence": claim.sentence, "paper": claim.paper}
    return about | judged(rows, claim.bars, why)
