"""`trace`: WD, MD, top sets and damage over a series of a model's revisions."""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from entangle.checks import choice, whole
from entangle.checks import names as checked_names
from entangle.errors import InvalidInput
from entangle.evaluation.logits import as_causal_model
from entangle.models.hub import model_source
from entangle.results.study import TRACE, Trace
from entangle.runs.progress import tell
from entangle.runs.provenance import RunClock, claimed, expand_user, make_manifest
from entangle.runs.unfinished import Unfinished
from entangle.seeding import check_seed
from entangle.studies.study import (
    Loaded,
    _load,
    _texts_of,
    check_finished,
    is_study,
    keep_runs,
    key_of,
    labelled,
    runs_of,
    split_revision,
)
from entangle.studies.subject import FRACTION, SIZES, Subject, losses
from entangle.texts.given import Source

STRENGTH = 0.95
_NUMBER = re.compile(r"\d+")


def revisions_of(models: Sequence[str], revisions: Sequence[str] = ()) -> list[str]:
    """Return the names of the models of a series, in order.

    Parameters
    ----------
    models
        Several models, which are the series; or one.
    revisions
        Of the one: subfolders of its folder, or revisions of the hub. Without them, all subfolders
        that hold a model, by the last number in their names; those without one (``final``) last.

    Raises
    ------
    InvalidInput
        If there are fewer than two, or one has no such subfolder.
    """
    if len(models) > 1:
        if revisions:
            raise InvalidInput("`revisions` are of one model; give either them or several models.")
        return list(models)
    (model,) = models
    folder = expand_user(model)
    if revisions and folder.is_dir():
        absent = [one for one in revisions if not (folder / one).is_dir()]
        if absent:
            raise InvalidInput(
                f"`revisions` of a folder must be its subfolders; {model!r} has no {absent[0]!r}."
            )
        found = [str(folder / one) for one in revisions]
    elif revisions:
        found = [f"{model}@{one}" for one in revisions]
    else:
        inside = folder.glob("*/config.json") if folder.is_dir() else ()
        found = sorted((str(one.parent) for one in inside), key=_by_step)
    if len(found) < 2:
        raise InvalidInput(
            f"a trace must have at least two revisions; got {len(found)} of {model!r}: name them "
            "with --revisions, or give several models."
        )
    return found


def step_of(name: str) -> float:
    """Return the last number in a revision's name, NaN without one: 1000 of ``step1000``."""
    last = split_revision(name)[1] or Path(name).name
    found = _NUMBER.findall(last)
    return float(found[-1]) if found else float("nan")


def _by_step(name: str) -> tuple[bool, float, str]:
    step = step_of(name)
    return (True, 0.0, name) if np.isnan(step) else (False, step, name)  # a NaN is in no order


def trace(
    models: str | Sequence[str],
    *,
    out: str | os.PathLike[str],
    revisions: Sequence[str] = (),
    size: str = "small",
    calibration: Source = "demo",
    evaluation: Source = "demo",
    seeds: int = 5,
    seed: int = 0,
    memory: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool | None = None,
    loaded: Loaded | None = None,
) -> Trace:
    """Follow WD, MD, top rows and what their pruning costs over a model's revisions.

    Every revision reads the same tokens, and the same windows.

    Parameters
    ----------
    models, revisions
        As in `revisions_of`; the last one is what top rows are compared with.
    out
        Folder of the result. Revisions that are finished are kept beside it.
    size
        Of the texts, as in `entangle.studies.study.study`.
    calibration, evaluation, seeds, seed, memory, resume, force, progress, loaded
        As in `entangle.studies.study.study`; ``seeds`` may be fewer.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a setting breaks a rule, a model cannot be had, or revisions have other layers or
        tokens than the last.
    """
    clock, seed, whole_seeds = RunClock(), check_seed(seed), whole("seeds", seeds, least=1)
    names = revisions_of(checked_names("models", models), revisions)
    for one in names:
        model_source(split_revision(one)[0])
    wanted = SIZES[choice("size", size, SIZES)]
    made = loaded or Loaded(_texts_of(calibration, evaluation), _load)
    parts: list[tuple[dict[str, object], pd.DataFrame]] = []
    with ExitStack() as held:
        held.enter_context(claimed(out))
        plan: dict[str, object] = {
            "model": None, "calibration": str(calibration), "evaluation": str(evaluation),
            "settings": {"size": size, "seeds": seeds, "seed": seed, "fraction": FRACTION,
                         "strength": STRENGTH, **made.settings},
        }  # fmt: skip
        asked = {**plan, "revisions": names}
        if resume and not force and is_study(str(out), TRACE):
            check_finished(out, plan, asked, kind=TRACE, ending="tracing")
            return Trace.load(out)
        kept = Unfinished(out, plan, what=TRACE, ending="tracing", resume=resume, force=force)
        kept.begin()
        about: dict[str, object] = {}
        for place, (name, label) in enumerate(zip(names, labelled(names), strict=True)):
            if progress is not False:
                tell(f"{place + 1} of {len(names)}: {label}")
            model = as_causal_model(made.load(*split_revision(name)))
            given, text = made.texts(model, wanted)
            _check_same(about, {"calibration": given.describe(), "evaluation": text.describe()})
            folder = runs_of(kept.path, model, key_of(model, given, text))
            folder.mkdir(parents=True, exist_ok=True)
            subject = Subject(
                label, model, given, text, wanted, folder, whole_seeds, seed, memory,
                progress=progress,
            )  # fmt: skip
            at = {"revision": label, "place": place, "step": step_of(name)}
            floors = subject.scores.layers.set_index("layer")["null_floor"]
            scored = subject.frame.assign(null_floor=subject.frame["layer"].map(floors), **at)  # type: ignore[arg-type]
            parts.append((at | _damage(subject), scored))
            about["model"] = model.describe()
        layers = pd.concat(_by_layer(parts), ignore_index=True)
        frame = pd.DataFrame([one for one, _ in parts]).merge(_joined(layers), on="place")
        manifest = make_manifest(TRACE, **{**plan, **about}, revisions=names, asked=asked)
        found = Trace(_typed(frame), layers, manifest | clock.read(memory))

        def extra(folder: Path) -> None:
            found.figures(folder / "figures")

        found.save(out, force=force, extra=extra)
        keep_runs(kept)
        kept.remove()
    return found


def _check_same(about: dict[str, object], texts: dict[str, dict[str, object]]) -> None:
    for name, said in texts.items():
        before = about.setdefault(name, said)
        if isinstance(before, dict) and before.get("digest") != said.get("digest"):
            raise InvalidInput(
                f"all revisions must read the same tokens; the {name} text has digest "
                f"{str(said.get('digest'))[:12]} here and {str(before.get('digest'))[:12]} before: "
                "give the revisions one tokenizer."
            )


def _damage(subject: Subject) -> dict[str, object]:
    """Return the dense perplexity, and what pruning top and random rows costs."""
    found = subject.ablated("damage", subject.chosen("top", "random"), strengths=(STRENGTH,))
    dense, top, random = (
        losses(found.windows, selection=one) for one in ("dense", "top", "random")
    )
    ratio = subject.ratio(top, random)
    tokens = float(subject.text.window_tokens.sum())
    return {
        "perplexity": float(np.exp(dense.sum() / tokens)), "ratio": ratio.value,
        "ratio_low": ratio.low, "ratio_high": ratio.high,
        "damage": subject.ratio(top, dense).value,
        "damage_random": subject.ratio(random, dense).value,
    }  # fmt: skip


def _by_layer(parts: Sequence[tuple[dict[str, object], pd.DataFrame]]) -> list[pd.DataFrame]:
    """Return one row a layer of every revision; top sets are compared with the last one's."""
    last = {str(name): _top(part) for name, part in parts[-1][1].groupby("layer")}
    sizes = _rows(parts[-1][1])
    found = []
    for _, frame in parts:
        own = _rows(frame)
        for name in dict.fromkeys([*sizes, *own]):
            if own.get(name, 0) != sizes.get(name, 0):
                raise InvalidInput(
                    f"all revisions must have the layers of the last, of as many rows; "
                    f"{frame['revision'].iloc[0]!r} has {own.get(name, 0)} of {name!r}, the last "
                    f"{sizes.get(name, 0)}."
                )
        groups = frame.groupby("layer", sort=False)
        found.append(pd.DataFrame([_layer(part, last[str(name)]) for name, part in groups]))
    return found


def _rows(frame: pd.DataFrame) -> dict[str, int]:
    return {str(name): len(part) for name, part in frame.groupby("layer", sort=False)}


def _layer(part: pd.DataFrame, last: set[int]) -> dict[str, object]:
    first, own = part.iloc[0], _top(part)
    keys = ("revision", "place", "step", "layer", "block", "projection", "null_floor")
    both = part[["wd", "md"]].dropna()
    varied = len(both) > 2 and both.nunique().min() > 1
    edge = part["wd"].nlargest(max(1, len(own))).min()
    return {name: first[name] for name in keys} | {
        "wd_median": part["wd"].median(), "wd_top": edge, "wd_largest": part["wd"].max(),
        "md_median": part["md"].median(),
        "wd_md": both["wd"].corr(both["md"], "spearman") if varied else np.nan,
        "overlap": len(own & last) / len(last) if last else np.nan,
        "chance": len(own) / part["wd"].count() if last and own else np.nan,
    }  # fmt: skip


def _top(part: pd.DataFrame) -> set[int]:
    """Return the top rows of a layer, as many as are pruned."""
    count = max(1, round(FRACTION * len(part)))
    return set(part[part["wd"].notna()].nlargest(count, "wd")["neuron"])


def _joined(layers: pd.DataFrame) -> pd.DataFrame:
    groups = layers.groupby("place")
    table = groups[["wd_median", "wd_top", "md_median"]].median()
    table["wd_largest"] = groups["wd_largest"].max()
    means = ["wd_md", "overlap", "chance"]
    table[means] = groups[means].mean()
    return table.reset_index()


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    columns = {name: column.dtype for name, column in Trace._TABLES[TRACE].items()}
    return frame.reindex(columns=list(columns)).astype(columns)
