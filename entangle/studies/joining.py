"""Finished studies put together: other models beside, a model's claims in one place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from entangle.errors import InvalidInput
from entangle.results.study import Study
from entangle.studies.claims import CLAIMS
from entangle.studies.rules import NOT_MEASURED, decided, judged

TEXTS = ("calibration", "evaluation")


def joined(parts: Sequence[Study], manifest: Mapping[str, object]) -> Study:
    """Put studies of different models together; `united` makes those of one model one."""
    tables = {
        name: pd.concat([getattr(one, name) for one in parts], ignore_index=True)
        for name in ("frame", "numbers", "models")
    }
    frame = _in_order(tables["frame"])
    names = tables["models"]["model"].tolist()
    facts: dict[str, object] = {"model": {"name": ", ".join(names)}}
    if len(parts) == 1:
        known = parts[0].manifest  # of a study that is measured now, the settings are in `manifest`
        facts = {key: known[key] for key in ("model", *TEXTS, "settings", "studies")
                 if key in known}  # fmt: skip
    else:
        facts |= {name: {"source": _sources(parts, name)} for name in TEXTS} | _settings(
            [one for part in parts for one in _studies(part, manifest)]
        )
    described = [
        model for one in parts
        for model in one.manifest.get("models") or [one.manifest.get("model")]  # type: ignore[attr-defined]
    ]  # fmt: skip
    return Study(
        frame, tables["numbers"], tables["models"],
        {**manifest, **facts, "models": described},
    )  # fmt: skip


def _sources(parts: Sequence[Study], name: str) -> str:
    found: list[Any] = [one.manifest.get(name) or {} for one in parts]
    return ", ".join(dict.fromkeys(str(one.get("source", "unknown")) for one in found))


def _studies(part: Study, manifest: Mapping[str, object]) -> list[dict[str, Any]]:
    """Return models and settings of the studies that a part is made of."""
    known: Any = part.manifest.get("studies")
    settings = part.manifest.get("settings", manifest.get("settings"))
    return list(known or [{"models": part.models["model"].tolist(), "settings": settings}])


def _settings(studies: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Return the settings that all studies have, and all of each where some differ."""
    every = [plain(one["settings"] or {}) for one in studies]
    first = {name: value for one in every for name, value in one.items()}
    same = {name: value for name, value in first.items()
            if all(name in one and one[name] == value for one in every)}  # fmt: skip
    return {"settings": same} | ({} if len(same) == len(first) else {"studies": list(studies)})


def united(parts: Sequence[Study]) -> list[Study]:
    """Return studies of different models: of those of one model and the same texts, one.

    Holm's adjustment is over all numbers that decide about a model, so p-values and verdicts by it
    are made again. A claim that one study could not measure is taken from another.

    Raises
    ------
    InvalidInput
        If a model's studies differ in weights, texts, settings or a claim's numbers, or a claim is
        of another's register.
    """
    found: dict[object, list[Study]] = {}
    for one in parts:
        names = one.models["model"].tolist()
        found.setdefault(names[0] if len(names) == 1 else id(one), []).append(one)
    every = [name for own in found.values() for name in own[0].models["model"]]
    twice = [name for i, name in enumerate(every) if name in every[:i]]
    if twice:
        raise InvalidInput(
            f"{twice[0]!r} is in a study of several models, and in another; join studies of single "
            "models."
        )
    return [_united(own) for own in found.values()]


_NAMES = ["name", "source", "stored", *TEXTS, "tests", "seconds"]
"""Columns that may differ between studies of one model: digests tell which model and texts."""


def _united(parts: Sequence[Study]) -> Study:
    """Return the studies of one model as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    name, known = str(first.models["model"].iloc[0]), first.manifest
    for one in parts[1:]:
        _check_alike(name, replace(first, manifest=known), one)
        known = _told_by_both(known, one.manifest)
    frame = pd.concat([one.frame for one in parts], ignore_index=True)
    strange = set(frame["claim"]) - set(CLAIMS)
    if strange:
        raise InvalidInput(f"claim {min(strange)!r} is not registered; import what registers it.")
    frame = frame.sort_values("verdict", key=lambda v: v == NOT_MEASURED, kind="stable")
    frame = frame.drop_duplicates("claim").sort_index().reset_index(drop=True)
    numbers = _numbers(name, parts, set(frame.loc[frame["verdict"] != NOT_MEASURED, "claim"]))
    bars = {one: CLAIMS[one].bars for one in frame["claim"]}
    numbers = decided(numbers, bars)
    about = frame[["claim", "model", "sentence", "paper"]].to_dict("records")
    again = [
        told | judged(numbers[numbers["claim"] == told["claim"]], bars[told["claim"]], why)
        for told, why in zip(about, frame["why"], strict=True)
    ]
    seconds = sum(float(one.models["seconds"].iloc[0]) for one in parts)
    models = first.models.assign(tests=int(numbers["p"].notna().sum()), seconds=seconds)
    return Study(pd.DataFrame(again), numbers, models, known)


def _told_by_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, object]:
    """Return a manifest with settings, and what the model computes, that only the other tells."""
    model, settings = ({**(one.get(key) or {})} for key in ("model", "settings"))
    for key, value in (other.get("settings") or {}).items():
        settings[key] = value if settings.get(key) is None else settings[key]
    computes = model.get("computes") or (other.get("model") or {}).get("computes")
    model |= {} if computes is None else {"computes": computes}
    return {**one, "model": model, "settings": settings}


def _numbers(name: str, parts: Sequence[Study], measured: set[str]) -> pd.DataFrame:
    """Return the numbers of a model's studies: of claims ``measured`` in one, not of the others."""
    kept = []
    for one in parts:
        open_to = set(one.frame.loc[one.frame["verdict"] == NOT_MEASURED, "claim"]) & measured
        kept.append(one.numbers[~one.numbers["claim"].isin(open_to)])
    numbers, keys = pd.concat(kept, ignore_index=True), ["claim", "setting", "number"]
    apart = numbers.drop_duplicates([*keys, "value", "low", "high"])
    different = apart.loc[apart.duplicated(keys), "claim"].tolist()
    if different:
        raise InvalidInput(
            f"claim {different[0]!r} of {name!r} is in two of the studies, with different numbers; "
            "name one of them."
        )
    return _in_order(numbers.drop_duplicates(keys))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table in the order of the claims, those of others last."""
    order = {claim: i for i, claim in enumerate(CLAIMS)}
    place = table["claim"].map(order).fillna(len(order)).argsort(kind="stable")
    return table.iloc[place].reset_index(drop=True)


def _check_alike(name: str, one: Study, other: Study) -> None:
    """Refuse two studies of a name that are not of one model, text and setting.

    What only one of them has, as pairs that the other's claims do without, is no difference, nor is
    where a file lay.
    """
    rows = [part.models.drop(columns=_NAMES).iloc[0] for part in (one, other)]
    unlike = [str(column) for column in rows[0].index if rows[0][column] != rows[1][column]]
    for text in TEXTS:
        told: list[Any] = [part.manifest.get(text) or {} for part in (one, other)]
        if len({str(about.get("digest", about.get("source"))) for about in told}) > 1:
            unlike.append(f"the {text} text")
    models: list[Any] = [part.manifest.get("model") or {} for part in (one, other)]
    computes = {about["computes"] for about in models if about.get("computes")}
    unlike += ["configuration"] if len(computes) > 1 else []
    settings: list[Any] = [part.manifest.get("settings") or {} for part in (one, other)]
    unlike += [
        key for key, value in settings[0].items()
        if value is not None and settings[1].get(key) is not None
        and _unnamed(value) != _unnamed(settings[1][key])
    ]  # fmt: skip
    if unlike:
        raise InvalidInput(
            f"the studies of {name!r} that are joined must be of one model, texts and settings; "
            f"they differ in {', '.join(dict.fromkeys(unlike))}."
        )


def _unnamed(setting: object) -> Any:
    """Return a setting without the name of the file that it was read from."""
    told = plain(setting)
    if isinstance(told, dict) and "digest" in told:
        told.pop("source", None)
    return told


def plain(content: object) -> Any:
    """Return what a manifest would hold of it."""
    return json.loads(json.dumps(content))
