"""Results of every kind, as a notebook shows them."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch

from entangle.allocation import allocate
from entangle.evaluation import load_evaluation
from entangle.experiments.ablate import ablate
from entangle.experts.expand import expand
from entangle.explorer.evidence import ModeFinder
from entangle.explorer.views import NeuronTable, heading, modes_view
from entangle.runs.tables import html_table
from entangle.seeding import torch_rng

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel
    from entangle.results.decomposition import Decomposition
    from entangle.results.scores import NeuronScores
    from entangle.texts.calibration_set import CalibrationSet

Make = Callable[[str], Any]
EVIL = "<script>alert('&')</script>\x1b"


class Elements(HTMLParser):
    """The texts and the kinds of elements of a piece of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def make(
    llama: "LanguageModel",
    calibration: "CalibrationSet",
    scores: "NeuronScores",
    decomposition: "Decomposition",
) -> Make:
    """Return a function that makes a result by its kind."""
    ids = torch.randint(4, 90, (2, 16), generator=torch_rng(1, "evaluation"))

    def made(kind: str) -> Any:
        if kind == "scores":
            return scores
        if kind == "decomposition":
            return decomposition
        if kind == "allocation":
            return allocate(scores, sparsity=0.5, model=llama, by=("wd", "md"))
        quick: dict[str, Any] = {"layers": 1, "evaluation": load_evaluation(ids), "progress": False}
        if kind == "expansion":
            return expand(llama, calibration, experts=2, sparsity=0.5, restarts=1, **quick)
        return ablate(
            llama, calibration, scores=None, fraction=0.1, strengths=(0.5,), seeds=1, **quick
        )

    return made


@pytest.mark.parametrize(
    ("kind", "title", "told", "rows"),
    [
        ("scores", "Scores of LlamaForCausalLM", "192 neurons in 3 layer(s)", 10),
        ("decomposition", "Decomposition of LlamaForCausalLM", "1 layer(s), 1, 2 experts", 2),
        ("allocation", "Allocation for LlamaForCausalLM", "rule protect, by wd, md", 3),
        ("expansion", "Expansion of LlamaForCausalLM", "3 layer(s) of 2 expert(s)", 3),
        ("ablation", "Ablation of LlamaForCausalLM", "arms and the dense model", 4),
    ],
)
def test_a_title_facts_and_a_table(make: Make, kind: str, title: str, told: str, rows: int) -> None:
    result = make(kind)
    shown = Elements(result._repr_html_())
    assert shown.texts[0] == title
    assert any(told in text for text in shown.texts), shown.texts[:6]
    assert shown.tags.count("tr") == 1 + rows
    assert not any("nan" in text.split() for text in shown.texts)

    named = replace(result, manifest={**result.manifest, "model": {"name": EVIL}})
    shown = Elements(named._repr_html_())
    assert "script" not in shown.tags
    assert shown.texts[0].endswith("<script>alert('&')</script>\\x1b")


def test_layers_and_tokens_are_no_elements(
    scores: "NeuronScores", decomposition: "Decomposition"
) -> None:
    layer = decomposition.neurons["layer"].iloc[0]
    tables: dict[str, Any] = {
        name: table.assign(layer=EVIL)
        for name, table in vars(decomposition).items()
        if isinstance(table, pd.DataFrame)
    }
    tables["contexts"] = tables["contexts"].assign(before=EVIL, token=EVIL, after=EVIL)
    tables["modes"] = tables["modes"].assign(top_tokens=json.dumps([[EVIL, 3, 0.5]]))
    finder = ModeFinder(replace(decomposition, **tables), None, memory=None, seed=0)
    frame = scores.layer(layer).frame.assign(layer=EVIL, flag=EVIL)
    for source, names in (
        (modes_view(finder, EVIL, 3, asked=False).html, 4),
        (heading(NeuronTable.of(frame), EVIL, 3, 0.01), 2),
        (html_table(frame), 2),
    ):
        shown = Elements(source)
        assert "script" not in shown.tags
        assert "".join(shown.texts).count("<script>alert('&')</script>\\x1b") >= names
        assert "\x1b" not in source


def test_an_allocation_tells_its_budget(make: Make) -> None:
    allocation = make("allocation")
    total = f"{allocation.n_zeros:,} of {allocation.n_weights:,} weights"
    assert f"50 % zeros: {total} in 3 layer(s)" in allocation._repr_html_()


def test_an_expansion_tells_costs_and_perplexity(make: Make) -> None:
    found = make("expansion")
    html = found._repr_html_()
    assert f"perplexity {found.perplexity.value:.4g}" in html
    assert f"{found.costs['flops']:.4g} × flops" in html
