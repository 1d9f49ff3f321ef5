import sys
from types import SimpleNamespace

import pytest

from entangle import progress
from entangle.progress import Progress, ProgressBar


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
        "scoring: 4/4 sequences, 40 s, 0 s left",
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
    assert bar._bar is not None
    assert bar._bar.live.is_started is False


def test_a_second_start_counts_anew(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("scoring", enabled=True) as bar:
        work(bar, clock, seconds=1)
        capsys.readouterr()
        bar.start(3, "layers")
        bar.advance(3)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 0/3 layers",
        "scoring: 3/3 layers, 0 s, 0 s left",
    ]


def test_the_base_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work(Progress(), clock, seconds=20)
    assert capsys.readouterr() == ("", "")
