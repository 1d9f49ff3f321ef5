import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entangle.errors import Unavailable
from entangle.models import hub
from entangle.models.loading import load_model
from entangle.texts.documents import load_texts

ANSWERS = hub.answers


@pytest.fixture(autouse=True)
def asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub_answers: None) -> None:
    """Here the Hub is asked; nothing is known of it, and its cache is empty."""
    monkeypatch.setattr(hub, "answers", ANSWERS)
    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def _address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_silence_costs_one_short_timeout(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", _address(server))
    start = time.perf_counter()
    for _ in range(3):
        with pytest.raises(Unavailable, match="some/model") as caught:
            load_model("some/model")
        assert _address(server) in str(caught.value)
        with pytest.raises(Unavailable, match="some/data"):
            list(load_texts("some/data"))
    assert time.perf_counter() - start < 5


def test_a_refused_connection_and_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = _address(closed)
    for endpoint in (address, "http://no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert not hub.answers()
        assert endpoint in hub.silence()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n", b"?\r\n"]
)
def test_any_answer_counts(
    answer: bytes, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    def reply() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer + b"\r\n\r\n")

    threading.Thread(target=reply, daemon=True).start()
    monkeypatch.setattr(hub, "SECONDS", 5.0)
    monkeypatch.setenv("HF_ENDPOINT", _address(server))
    assert hub.answers()
    assert hub.answers()  # kept: the server would answer no more
    assert hub.silence() == ""


def test_what_is_cached_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: socket.socket
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", _address(server))
    assert not hub.is_cached("a/b", "model")
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert hub.is_cached("a/b", "model")
    assert not hub.is_cached("a/b", "dataset")
    (tmp_path / "datasets" / "a___b").mkdir(parents=True)
    assert hub.is_cached("a/b", "dataset")
    hub.check_model("a/b")
    hub.check_data_set("a/b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.check_model("other")
    assert hub._asked == {}


def test_the_libraries_are_held_to_their_caches_only_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from huggingface_hub import constants

    def flags() -> tuple[bool, bool]:
        return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    before = flags()
    monkeypatch.setattr(hub, "answers", lambda: False)
    with contextlib.suppress(ZeroDivisionError), hub.caches_alone():
        assert flags() == (True, True)
        raise ZeroDivisionError
    assert flags() == before
    monkeypatch.setattr(hub, "answers", lambda: True)
    with hub.caches_alone():
        assert flags() == before
