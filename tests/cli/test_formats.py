"""Every command's tables: 80 columns, whole keys, and standard output for one format alone."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

from entangle.cli.main import _parsers
from entangle.cli.tables import Table, present
from tests.cli.runs import Run

COMMANDS = {
    "scores": "score", "ablation": "ablate", "comparison": "compare --evaluation demo",
    "decomposition": "decompose --layer 1", "expansion": "expand", "pruning": "prune",
    "allocation": "allocate S --sparsity 0.5",
}  # fmt: skip
"""Command that prints a kind of result again."""
Show = Callable[..., tuple[str, str]]


@pytest.fixture
def show(made: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> Show:
    """Print a result as the command that made it does, with more options; return what is said."""

    def show(kind: str, *more: str) -> tuple[str, str]:
        words = COMMANDS[kind].split()
        arguments = _parsers()[0].parse_args([*words, "--out", str(made[kind]), *more])
        capfd.readouterr()
        arguments.show(arguments)
        sys.stdout.flush()
        return capfd.readouterr()

    return show


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def narrow(width: int) -> None:
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda _self: True)
        for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("NO_COLOR", "1")):
            monkeypatch.setenv(name, value)

    return narrow


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize("kind", COMMANDS)
def test_tables_fit_a_terminal(
    show: Show, terminal: Callable[[int], None], kind: str, made: dict[str, Path]
) -> None:
    terminal(80)
    lines, prose = plain(show(kind)[0]), ("Saved", "Figure", "Left out")
    rules = [place for place, line in enumerate(lines) if line.strip() and not line.strip(" ─")]
    assert rules
    for place in rules:  # the head above, rows below until an empty line
        end = next(i for i in range(place, len(lines) + 1) if not "".join(lines[i : i + 1]).strip())
        widths = [cell_len(line) for line in lines[place - 1 : end]]
        assert max(widths) <= 80
    assert not any("…" in line for line in lines if not line.startswith(prose))
    wide = plain(show(kind, "--wide")[0])
    assert not any(line.startswith("Left out") for line in wide)
    assert len(max(wide, key=cell_len)) >= len(max((lines[p] for p in rules), key=cell_len))


@pytest.mark.parametrize("kind", COMMANDS)
def test_one_format_alone_is_on_standard_output(show: Show, kind: str) -> None:
    content = json.loads(show(kind, "--json")[0])
    assert content["out"]
    out, err = show(kind, "--csv")
    frame = pd.read_csv(io.StringIO(out))
    assert len(frame)
    assert "Saved to" in err
    out, err = show(kind, "--latex")
    lines = out.splitlines()
    assert lines[0] == r"\begin{table}"
    assert lines[-1] == r"\end{table}"
    assert out.count(r"\begin{table}") == out.count(r"\toprule") == out.count(r"\end{table}")
    assert "Saved to" in err


def test_numbers_are_whole_in_csv(show: Show, made: dict[str, Path]) -> None:
    out, err = show("scores", "--csv", "--table", "neurons", "--top", "3")
    frame = pd.read_csv(io.StringIO(out))
    kept = pd.read_parquet(made["scores"] / "scores.parquet")
    np.testing.assert_allclose(frame["wd"], kept["wd"].nlargest(3), rtol=1e-15)
    assert set(frame.columns) == set(kept.columns)
    assert "--table" not in err


@pytest.mark.parametrize("options", [["--json", "--csv"], ["--csv", "--latex"]])
def test_one_format_at_a_time(run: Run, options: list[str]) -> None:
    ran = run("score", *options)
    assert (ran.status, ran.out) == (2, "")
    assert options[0] in ran.err


@pytest.mark.parametrize("options", [["--wide", "--csv"], ["--table", "layers", "--json"]])
def test_options_that_say_nothing_are_refused(run: Run, options: list[str]) -> None:
    ran = run("score", *options)
    assert (ran.status, ran.out) == (2, "")
    assert f"{options[0]} has no meaning" in ran.err


ODD = ["<b>&\x1b[31m", "\u202eabc", "👩\u200d🔬", "a\nb", "[red]x[/red]", "=1,2", '"', "50 %_$"]


def arguments(**more: Any) -> Any:
    from argparse import Namespace

    given = dict.fromkeys(("json", "csv", "latex", "wide"), False) | {"table": None}
    return Namespace(**(given | more))


def test_odd_tokens_in_every_format(
    capfd: pytest.CaptureFixture[str], terminal: Callable[[int], None]
) -> None:
    frame = pd.DataFrame({"token": ODD, "n": range(len(ODD))})
    table = Table("tokens", frame, "Tokens")
    present(arguments(csv=True), [table], {})
    sys.stdout.flush()
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(capfd.readouterr().out)), frame)
    for asked in ({}, {"csv": True}, {"latex": True}):
        terminal(80)
        present(arguments(**asked), [table], {})
        sys.stdout.flush()
        out = capfd.readouterr().out
        assert not set("\x1b\u202e") & set("".join(plain(out)))
        assert r"x1b" in out
        assert "👩\u200d🔬" in out


def test_rows_become_blocks_where_keys_have_no_room(
    capfd: pytest.CaptureFixture[str], terminal: Callable[[int], None]
) -> None:
    terminal(20)
    frame = pd.DataFrame({"layer": ["model.layers.1.mlp.up", "b"], "wd": [0.5, None], "n": [1, 2]})
    present(arguments(), [Table("t", frame, "T", {"wd": ".2f"}, keys=("layer",))], {})
    sys.stdout.flush()
    lines = [line.split() for line in capfd.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        ["T"], ["layer", "model.layers.1.mlp.up"], ["wd", "0.50"], ["n", "1"],
        ["layer", "b"], ["wd", "–"], ["n", "2"],
    ]  # fmt: skip


def test_columns_go_in_the_declared_order_then_from_the_right(
    capfd: pytest.CaptureFixture[str], terminal: Callable[[int], None]
) -> None:
    frame = pd.DataFrame({name: ["x" * 8] for name in ("a", "key", "b", "c", "d")})
    table = Table("t", frame, "T", keys=("key",), optional=("c",))
    for width, left in ((70, ""), (50, "c"), (40, "c, d"), (30, "c, d, b"), (20, "c, d, b, a")):
        terminal(width)
        present(arguments(), [table], {})
        sys.stdout.flush()
        said = [one for one in plain(capfd.readouterr().out) if one.startswith("Left out")]
        assert [line.split(": ")[1].split(";")[0] for line in said] == ([left] if left else [])


def test_a_table_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    from entangle.errors import InvalidInput

    tables = [Table("one", pd.DataFrame({"a": [1]}), "One")]
    with pytest.raises(InvalidInput, match=r"'kl'.*one"):
        present(arguments(table="kl"), tables, {})
