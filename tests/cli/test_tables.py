import json
import re
import sys

import numpy as np
import pandas as pd
import pytest

from entangle.cli.tables import print_json, print_table, records, say

FRAME = pd.DataFrame(
    {
        "layer": ["model.layers.1.mlp.gate_proj", "[red]b[/red] :smile:"],
        "block": pd.array([1, None], dtype="Int64"),
        "wd": [0.123456, np.nan],
        "ρ": ["0.5 [0.4, 0.6]", None],
    }
)
FORMATS = {"wd": ".4f", "ρ": ""}


def terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _self: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")


def test_a_table_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(FRAME, title="Two [layers]", formats=FORMATS)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        "Two [layers]",
        "  layer                          block       wd                ρ",
        " ────────────────────────────────────────────────────────────────",
        "  model.layers.1.mlp.gate_proj       1   0.1235   0.5 [0.4, 0.6]",
        "  [red]b[/red] :smile:               –        –                –",
    ]


def test_off_a_terminal_nothing_is_cropped(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({"layer": ["x" * 300], "wd": [0.5]})
    print_table(frame, title="T", formats=FORMATS, optional=["wd"])
    assert "x" * 300 + "   0.5000" in capsys.readouterr().out


def test_names_are_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    odd, spelled = "[bold]\x1b[31m\n\x9b\u202e[/]", r"[bold]\x1b[31m\n\x9b\u202e[/]"
    print_table(pd.DataFrame({odd: [odd]}), title=odd, formats={odd: ""})
    say(odd, "日本語")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.strip("─")] == [*[spelled] * 4, "日本語"]


def test_json_is_ascii_and_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"\x9b\u202e\udcff": "日"}
    print_json(content)
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == content


@pytest.mark.parametrize(
    ("width", "columns", "left_out"),
    [
        (80, ["layer", "block", "wd", "ρ"], ""),
        (55, ["layer", "block", "wd"], "Left out for want of room: ρ; --wide prints all."),
        (45, ["layer", "wd"], "Left out for want of room: ρ, block; --wide prints all."),
        (34, ["layer"], "Left out for want of room: ρ, block, wd; --wide prints all."),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_but_whole_values(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    columns: list[str],
    left_out: str,
) -> None:
    terminal(width, monkeypatch)
    print_table(FRAME, title="T", formats=FORMATS, optional=["not there", "ρ", "block", "wd"])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out
    assert "model.layers.1.mlp.gate_proj" in out
    lines = [line for line in out.splitlines() if line.strip()]
    assert lines[1].split() == columns
    assert (lines[-1] if left_out else "") == left_out


def test_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(FRAME.head(0), title="Nothing", formats=FORMATS)
    assert "layer" in capsys.readouterr().out


def test_json_has_null_for_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(records(FRAME.assign(inf=np.inf)))
    printed = json.loads(capsys.readouterr().out)
    assert printed[0] == {
        "layer": "model.layers.1.mlp.gate_proj", "block": 1, "wd": 0.123456,
        "ρ": "0.5 [0.4, 0.6]", "inf": None,
    }  # fmt: skip
    assert printed[1] == {
        "layer": "[red]b[/red] :smile:", "block": None, "wd": None, "ρ": None, "inf": None
    }  # fmt: skip
