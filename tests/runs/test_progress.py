import errno
import sys
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from entangle.runs import progress
from entangle.runs.progress import Progress, ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `ProgressBar` sees, in its only element."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _self: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")


def work(bar: Progress, clock: list[float], *, seconds: float) -> None:
    bar.start(4, "sequences")
    for _ in range(4):
        clock[0] += seconds
        bar.advance()


def test_off_a_terminal_plain_lines_tell_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("scoring", enabled=True) as bar:
        work(bar, clock, seconds=10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "scoring: 0/4 sequences",
        "scoring: 2/4 sequences, 20 s, 20 s left",
        "scoring: 4/4 sequences, 40 s",
    ]


@pytest.mark.parametrize("enabled", [None, False])
def test_off_a_terminal_nothing_is_said_unasked(
    clock: list[float], capsys: pytest.CaptureFixture[str], enabled: bool | None
) -> None:
    with ProgressBar("scoring", enabled=enabled) as bar:
        work(bar, clock, seconds=10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("enabled", [None, True])
def test_a_terminal_shows_a_bar_with_a_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str], enabled: bool | None
) -> None:
    with ProgressBar("scoring", enabled=enabled) as bar:
        work(bar, clock, seconds=2)
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("scoring", "4/4", "sequences", "100%", "0.5/s"):
        assert part in err


ODD = "[bold]\x1b[35m\n[/]\udcff"
SPELLED = r"[bold]\x1b[35m\n[/]\udcff"


@pytest.mark.usefixtures("terminal")
def test_names_act_on_no_bar(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(ODD) as bar:
        bar.start(1, ODD)
        bar.advance()
    err = capsys.readouterr().err
    assert SPELLED in err
    assert "\x1b[35m" not in err


def test_names_are_spelled_out_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress.tell(ODD)
    with ProgressBar(ODD, enabled=True) as bar:
        bar.start(1, ODD)
    assert capsys.readouterr().err.splitlines() == [
        f"entangle: {SPELLED}", f"{SPELLED}: 0/1 {SPELLED}"
    ]  # fmt: skip


@pytest.mark.parametrize("stream", ["closed", "full"])
def test_work_goes_on_where_nothing_can_be_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    def write(_text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    full = SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False)
    monkeypatch.setattr(sys, "stderr", None if stream == "closed" else full)
    progress.tell("a line")
    with ProgressBar("scoring") as bar:
        bar.start(1, "steps")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_nothing_when_switched_off(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("scoring", enabled=False) as bar:
        work(bar, clock, seconds=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
def test_an_error_stops_the_bar() -> None:
    bar = ProgressBar("scoring")

    def interrupted() -> None:
        with bar:
            bar.start(2, "sequences")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(bar._view, progress._Terminal)
    assert bar._view.bar.live.is_started is False


def test_a_second_start_counts_anew(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("scoring", enabled=True) as bar:
        work(bar, clock, seconds=1)
        capsys.readouterr()
        bar.start(3, "layers")
        bar.advance(3)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 0/3 layers",
        "scoring: 3/3 layers, 0 s",
    ]


def test_the_base_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work(Progress(), clock, seconds=20)
    assert capsys.readouterr() == ("", "")


class Handle:
    """Stands for IPython's display handle; keeps what was shown."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, bundle: dict[str, str], **settings: object) -> "Handle":
        assert settings == {"raw": True, "display_id": True}
        self.shown.append(bundle)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(bundle)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Handle:
    handle = Handle()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    shown = SimpleNamespace(display=handle.display)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return handle


def test_a_notebook_replaces_one_output(
    notebook: Handle, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("a < b") as bar:
        work(bar, clock, seconds=10)
    assert capsys.readouterr() == ("", "")
    assert [one["text/plain"] for one in notebook.shown] == [
        "a < b: 0/4 sequences",
        "a < b: 1/4 sequences, 10 s, 30 s left",
        "a < b: 2/4 sequences, 20 s, 20 s left",
        "a < b: 3/4 sequences, 30 s, 10 s left",
        "a < b: 4/4 sequences, 40 s",
    ]
    last = notebook.shown[-1]["text/html"]
    assert '<progress value="4" max="4"' in last
    assert "a &lt; b: 4/4" in last
    assert "a < b" not in last


def test_a_notebook_is_not_flooded(notebook: Handle, clock: list[float]) -> None:
    with ProgressBar("scoring") as bar:
        bar.start(10_000, "layers")
        for _ in range(10_000):
            clock[0] += 1e-4
            bar.advance()
    assert 4 <= len(notebook.shown) <= 7
    assert notebook.shown[-1]["text/plain"].startswith("scoring: 10000/10000 layers, 1 s")


def test_a_notebook_says_that_the_work_was_stopped(notebook: Handle, clock: list[float]) -> None:
    def interrupted() -> None:
        with ProgressBar("scoring") as bar:
            bar.start(2, "layers")
            clock[0] += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert notebook.shown[-1]["text/plain"] == "scoring: 0/2 layers, stopped after 3 s"


def test_a_notebook_shows_nothing_when_switched_off(notebook: Handle, clock: list[float]) -> None:
    with ProgressBar("scoring", enabled=False) as bar:
        work(bar, clock, seconds=2)
    assert notebook.shown == []


def test_a_kernel_keeps_one_output_a_bar() -> None:
    code = """
from entangle.runs.progress import ProgressBar
for title in ("first", "second"):
    with ProgressBar(title) as bar:
        bar.start(500, "steps")
        for _ in range(500):
            bar.advance()
"""
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    executed: Any = NotebookClient(document, timeout=60, kernel_name="python3").execute()
    outputs = executed.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data", "display_data"]
    plain = [output.data["text/plain"] for output in outputs]
    assert plain[0].startswith("first: 500/500 steps, ")
    assert plain[1].startswith("second: 500/500 steps, ")
