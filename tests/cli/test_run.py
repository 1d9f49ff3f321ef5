"""``entangle run``: text and speed, the dense model beside it where it is at hand."""

import json
from pathlib import Path

import pytest

from tests.cli.expansions import SMALL, check_one_line
from tests.cli.runs import Run

pytestmark = pytest.mark.usefixtures("place", "expansion")
RUN = ("run", "x", "--device", "cpu", "--prompt", "a prompt", "--max-new-tokens", 4)


@pytest.fixture
def expansion(place: Path, run: Run) -> None:
    assert run(*SMALL, "--out", "x").status == 0


def test_text_and_speed_beside_the_dense_model(run: Run) -> None:
    found = json.loads(run(*RUN, "--json").out)
    assert [row["model"] for row in found["results"]] == ["expansion", "dense"]
    assert found["results"][1]["× dense"] == 1
    for row in found["results"]:
        assert row["tokens a second"] == pytest.approx(row["new tokens"] / row["seconds"])
        assert row["new tokens"] <= 4
    again = json.loads(run(*RUN, "--json").out)
    assert [row["text"] for row in again["results"]] == [row["text"] for row in found["results"]]
    drawn = [json.loads(run(*RUN, "--temperature", 1, "--json").out) for _ in range(2)]
    assert drawn[0]["results"][0]["text"] == drawn[1]["results"][0]["text"]


def test_without_the_dense_model(run: Run) -> None:
    status, out, err = run(*RUN, "--no-dense")
    assert (status, err) == (0, "")
    assert out.startswith("a prompt")
    Path("model").rename("moved")
    found = json.loads(run(*RUN, "--json").out)
    assert [row["model"] for row in found["results"]] == ["expansion"]
    found = json.loads(run(*RUN, "--json", "--dense", "moved").out)
    assert [row["model"] for row in found["results"]] == ["expansion", "dense"]


def test_a_dense_model_runs_alone(run: Run) -> None:
    found = json.loads(run("run", "model", *RUN[2:], "--json").out)
    assert [row["model"] for row in found["results"]] == ["model"]


def test_what_is_wrong_is_one_line(run: Run) -> None:
    check_one_line(run(*RUN[:-1], 0), "max_new_tokens")
    check_one_line(run("run", "nowhere", *RUN[2:]), "nowhere")
    check_one_line(run(*RUN, "--dense", "nowhere"), "nowhere")
