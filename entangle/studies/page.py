"""The page of a study: claims by models, every number below, in one file that loads nothing."""

import json
from typing import Any

import pandas as pd

from entangle.report.page import render
from entangle.results.study import Study
from entangle.runs.tables import number, with_ends

MARKS = {"holds": "●", "weaker": "◐", "fails": "○", "not measured": "–"}
"""Read without colours."""


def page(study: Study) -> str:
    """Return the page as HTML; needs no torch."""
    models = study.models.to_dict("records")
    differ = f" {study.differing}" if study.differing else ""
    tests = "; ".join(f"{one['model']}: {one['tests']} numbers decide" for one in models)
    names = [str(one["model"]) for one in models]
    claims = [
        _claim(str(claim), rows, study.numbers, names)
        for claim, rows in study.frame.groupby("claim", sort=False)
    ]
    manifest = json.dumps(dict(study.manifest), indent=2, ensure_ascii=False, default=str)
    return render(
        "study.html", title="What holds on which model", data={}, styles=("study.css",),
        content={"models": models, "claims": claims, "tests": f"{tests}.", "differ": differ,
                 "manifest": manifest.splitlines()},
    )  # fmt: skip


def _claim(claim: str, rows: pd.DataFrame, numbers: pd.DataFrame, models: list[str]) -> Any:
    own = {str(row["model"]): row for row in rows.to_dict("records")}
    first, listed = rows.iloc[0], numbers[numbers["claim"] == claim]
    return {
        "id": claim, "sentence": first["sentence"], "paper": first["paper"],
        "cells": [_cell(own.get(name), listed) for name in models],
        "rows": [_row(one) for one in listed.to_dict("records")],
    }  # fmt: skip


def _cell(row: dict[Any, Any] | None, numbers: pd.DataFrame) -> dict[str, object]:
    if row is None:
        return {"verdict": "", "kind": "none"}
    verdict, adjusted = row["verdict"], row["verdict_holm"]
    return {
        "verdict": verdict, "kind": verdict.replace(" ", "-"), "mark": MARKS[verdict],
        "adjusted": "" if adjusted == verdict else adjusted,
        "ends": _ends(row, value=True) if row["value"] == row["value"] else "",
        "number": row["number"], "setting": row["setting"], "why": row["why"], "lost": row["lost"],
        "open": verdict == "fails" and _is_open(row, numbers),
    }  # fmt: skip


def _is_open(row: dict[Any, Any], numbers: pd.DataFrame) -> bool:
    """Tell whether the interval that decided includes its bar, so that more text may decide."""
    keys = ("model", "setting", "number")
    own = numbers[(numbers[list(keys)] == [row[key] for key in keys]).all(axis=1)]
    return bool((own["high"] > own["bar"]).any())


def _row(row: dict[Any, Any]) -> dict[str, object]:
    over = "" if pd.isna(row["n"]) else f"{row['n']:,} {row['unit']}".strip()
    decides = row["role"] != "shown"
    return {
        **{name: row[name] for name in ("model", "setting", "number", "passes")},
        "value": number(row["value"]), "ends": _ends(row),
        "bar": f"> {row['bar']:g} ({row['role']})" if decides else "",
        "p": _p(row["p"]), "p_holm": _p(row["p_holm"]), "over": over,
    }  # fmt: skip


def _ends(row: dict[Any, Any], *, value: bool = False) -> str:
    said = with_ends(row["value"], row["low"], row["high"])
    return said if value else said.partition(" ")[2]


def _p(value: float) -> str:
    return "" if value != value else f"{value:.2g}"
