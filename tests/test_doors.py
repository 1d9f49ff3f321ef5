"""Doors: names, entry points of installed packages, contracts of what comes in."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import entangle
from entangle import doors
from entangle.activation import ACTIVATION_METHODS
from entangle.activation.methods import Teal
from entangle.allocation.rules import RULES
from entangle.cli.main import COMPARED, _joined
from entangle.doors import Door
from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.compare import arms
from entangle.mixtures import MIXTURE_METHODS
from entangle.pruning import METHODS, PRUNERS, prune
from entangle.testing import check_activation_method, check_pruner, check_rule
from tests.tiny_models import TINY

IDS = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))


def by_wanda(weight: Tensor, gram: Tensor, zeros: Tensor) -> Tensor:
    rank = (weight.abs() * gram.diagonal().sqrt()).argsort(1).argsort(1)
    return weight.masked_fill(rank < zeros[:, None], 0)


@pytest.fixture
def own() -> Iterator[str]:
    PRUNERS.register("own", by_wanda, source="here")
    yield "own"
    PRUNERS.remove("own")


def test_a_pruner_of_ones_own_is_a_method_like_ours(own: str) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    ours, mine = (prune(weight, x.T @ x, method=m, sparsity=0.4).weight for m in ("wanda", own))
    assert torch.equal(ours, mine)
    assert PRUNERS.source(own) == "here"
    model = TINY["llama"]()
    found = entangle.compare(model, IDS, IDS, ["wanda", own], sparsity=0.5, progress=False)
    rows = found.frame.set_index("method")["perplexity"]
    settings: Any = found.manifest["settings"]
    assert settings["plugins"] == {own: "here"}
    assert rows["own"] == pytest.approx(rows["wanda"], rel=1e-6)


def test_names_are_taken_once(own: str) -> None:
    assert (*METHODS, own) == tuple(PRUNERS)
    for name in (own, "wanda", "a b", "", "a,b", "teal:wanda", "a\n"):
        with pytest.raises(InvalidInput):
            PRUNERS.register(name, by_wanda)
    with pytest.raises(InvalidInput, match="function"):
        PRUNERS.register("other", 3)
    with pytest.raises(UnknownName, match="wanda"):
        PRUNERS["wand"]


@pytest.mark.parametrize("name", ["teal", "dense", "magnitude-global", "expansion"])
def test_a_name_that_means_something_else_is_not_compared(name: str) -> None:
    PRUNERS.register(name, by_wanda)
    try:
        with pytest.raises(InvalidInput, match="two things"):
            arms([name], 0.5, 1)
    finally:
        PRUNERS.remove(name)


def changed(weight: Tensor, gram: Tensor, zeros: Tensor) -> Tensor:
    gram.zero_()
    return by_wanda(weight, gram, zeros)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda w, g, z: w, "zeros"),
        (lambda w, g, z: w[:1, :2], "shape"),
        (lambda w, g, z: w * float("nan"), "NaN"),
        (lambda w, g, z: 1 / 0, "ZeroDivisionError"),
        (lambda w, g, z: None, "NoneType"),
        (lambda w, g, z: torch.rand_like(w) * by_wanda(w, g, z), "repeated"),
        (changed, "changed"),
    ],
)
def test_a_pruner_that_breaks_its_contract_is_told_so(wrong: Callable[..., Any], said: str) -> None:
    check_pruner(by_wanda)
    with pytest.raises(AssertionError, match=said):
        check_pruner(wrong)
    assert "__checked__" not in PRUNERS


def test_activation_methods_and_rules_are_checked() -> None:
    check_activation_method(lambda x, w: x.abs() * w.norm(dim=0))
    negative, joined = lambda x, w: -x.abs() - 1, lambda x, w: x.abs() / x.abs().sum()
    for wrong in (negative, joined, lambda x, w: x[0], lambda x, w: 1 / 0, 3, Teal):
        with pytest.raises(AssertionError):
            check_activation_method(wrong)  # type: ignore[arg-type]
    check_rule(lambda score, share: np.full_like(score, share))
    for bad in (lambda score, share: score, lambda score, share: share, lambda score: score):
        with pytest.raises(AssertionError):
            check_rule(bad)


def test_a_rule_of_ones_own_allocates() -> None:
    model = TINY["llama"]()
    scores = entangle.score(model, IDS, layers=[1], proj="mlp", md=False, progress=False)
    RULES.register("halves", lambda score, share: np.where(score > np.median(score), 0.2, 0.8))
    try:
        found = entangle.allocate(scores, sparsity=0.5, rule="halves", across="model", model=model)
        assert found.overall == pytest.approx(0.5, abs=0.02)
        RULES.register("wrong", lambda score, share: score[:2])
        with pytest.raises(InvalidInput, match="wrong"):
            entangle.allocate(scores, sparsity=0.5, rule="wrong", across="model", model=model)
    finally:
        for name in ("halves", "wrong"):
            RULES.remove(name)


def test_global_magnitude_is_one_threshold_and_erk_keeps_its_total() -> None:
    model = TINY["llama"]()
    scores = entangle.score(model, IDS, proj="mlp", md=False, progress=False)
    found = entangle.allocate(scores, sparsity=0.5, rule="magnitude-global", model=model)
    parameters = dict(model.named_parameters())
    weights = {n: parameters[f"{n}.weight"] for n in found.zeros}
    every = torch.cat([w.abs().flatten() for w in weights.values()])
    limit = every.kthvalue(round(0.5 * len(every))).values
    for name, zeros in found.zeros.items():
        assert (weights[name].abs() <= limit).sum(1).tolist() == list(zeros)
    erk = entangle.allocate(scores, sparsity=0.5, rule="erk", model=model)
    assert erk.overall == pytest.approx(0.5, abs=0.005)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with entry points."""
    info = tmp_path / "mine-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[entangle.pruners]\nmine = mine_pruner:prune\nbroken = mine_pruner:nothing\n"
    )
    (tmp_path / "mine_pruner.py").write_text(
        "def prune(weight, gram, zeros):\n"
        "    rank = weight.abs().argsort(1).argsort(1)\n"
        "    return weight.masked_fill(rank < zeros[:, None], 0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    doors._installed.cache_clear()
    yield tmp_path
    doors._installed.cache_clear()
    sys.modules.pop("mine_pruner", None)
    PRUNERS._things.pop("mine", None)


def test_an_installed_package_brings_a_pruner(package: Path) -> None:
    assert {"mine", "broken"} <= set(PRUNERS)
    assert PRUNERS.source("mine") == "mine 1.2"
    assert doors.packages() == {"pruners": {"mine": "mine 1.2", "broken": "mine 1.2"}}
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = prune(weight, method="mine", sparsity=0.5).weight
    assert torch.equal(found, prune(weight, method="magnitude", sparsity=0.5).weight)
    with pytest.raises(InvalidInput, match=r"mine 1\.2"):
        PRUNERS["broken"]
    with pytest.raises(InvalidInput, match=r"mine 1\.2"):  # before anything is built
        arms(["wanda", "broken"], 0.5, 1)
    assert _joined("dsnot:mine", COMPARED)  # at the shell as in Python
    assert not _joined("dsnot:other", COMPARED)
    assert arms(["dsnot:mine"], 0.5, 1)


def test_two_packages_with_one_name_are_refused(package: Path) -> None:
    other = package / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text("[entangle.pruners]\nmine = elsewhere:prune\n")
    doors._installed.cache_clear()
    with pytest.raises(InvalidInput, match="both"):
        list(PRUNERS)


def test_what_is_listed_has_a_source() -> None:
    for door in (PRUNERS, RULES, ACTIVATION_METHODS, MIXTURE_METHODS):
        assert isinstance(door, Door)
        assert all(one.source for one in door.listed())
