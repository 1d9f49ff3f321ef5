"""Doors for routers, columns and measures: contracts, manifests, and masks on routed weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import entangle
from entangle.activation import Masks, measure
from entangle.errors import EntangleError, InvalidInput
from entangle.evaluation.measures import MEASURES
from entangle.experiments.masked import Rivals
from entangle.experts.router import ROUTERS, fit_router
from entangle.models.layers import list_layers
from entangle.models.loading import as_language_model
from entangle.results.comparison import knees
from entangle.scoring.columns import COLUMNS
from entangle.testing import check_column, check_measure, check_router
from entangle.texts.calibration import as_calibration
from entangle.texts.evaluation import as_evaluation
from tests.tiny_models import TINY

IDS = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))


def planes(tokens: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(k, tokens.shape[1], generator=rng), torch.randn(k, generator=rng)


def drawn(tokens: Tensor, k: int, seed: int) -> Tensor:
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:k]]


def peak(inputs: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
    return outputs.abs().amax(0)


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, tokens)


@pytest.fixture
def own() -> Iterator[None]:
    ROUTERS.register("planes", planes, source="here")
    COLUMNS.register("peak", peak)
    MEASURES.register("loss", loss)
    yield
    ROUTERS.remove("planes")
    COLUMNS.remove("peak")
    MEASURES.remove("loss")


def test_good_ones_pass_the_checks() -> None:
    check_router(planes)
    check_router(drawn)
    check_column(peak)
    check_measure(loss)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (check_router, lambda t, k, s: t[:1]),
        (check_router, lambda t, k, s: t[:k] * float("nan")),
        (check_router, lambda t, k, s: 1 / 0),
        (check_router, lambda t, k, s: torch.rand(k, t.shape[1])),
        (check_router, lambda t, k, s: t.mul_(2)[:k]),
        (check_column, lambda x, y, w: y.sum()),
        (check_column, lambda x, y, w: y.mean(0) * float("nan")),
        (check_column, lambda x, y, w: torch.arange(len(w))),
        (check_measure, lambda logits, tokens: logits),
        (check_measure, lambda logits, tokens: float("inf")),
    ],
)
def test_what_breaks_its_contract_is_found(check: Any, wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check(wrong)
    assert all("__checked__" not in door for door in (ROUTERS, COLUMNS, MEASURES))


def test_a_router_of_ones_own_sends_tokens_where_its_scores_are_largest(own: None) -> None:
    tokens = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) + 2
    for k in (2, 5, 15):  # more clusters than features, too
        router = fit_router([tokens], k, seed=3, kind="planes")
        directions, offsets = planes(tokens, k, 3)
        expected = (tokens @ directions.T + offsets).argmax(1)
        assert torch.equal(router.route(tokens), expected)
        counts = router.statistics.tokens_per_cluster
        assert torch.equal(counts, torch.bincount(expected, minlength=k))
        folded: Any = router.folded()
        assert torch.equal(folded(tokens).flatten(), expected)


def test_names_are_taken_once_and_must_not_mean_something_else(own: None) -> None:
    for door, name in ((ROUTERS, "kmeans"), (COLUMNS, "wd"), (COLUMNS, "layer"),
                       (MEASURES, "perplexity"), (MEASURES, "kl")):  # fmt: skip
        with pytest.raises(EntangleError):
            door.register(name, planes)


def test_they_are_used_by_name_and_told_in_manifests(own: None) -> None:
    model = TINY["llama"]()
    found = entangle.compare(
        model, IDS, IDS, ["expansion:planes", "teal", "teal:expansion:planes"], sparsity=0.4,
        experts=2, measures="loss", progress=False,
    )  # fmt: skip
    settings: Any = found.manifest["settings"]
    assert settings["plugins"] == {"planes": "here", "loss": ""}
    frame = found.frame.dropna(subset=["perplexity"])
    assert len(frame) == 4
    np.testing.assert_allclose(np.exp(frame["loss"]), frame["perplexity"], rtol=1e-4)
    scores = entangle.score(model, IDS, columns="peak", md=False, progress=False)
    again = entangle.ablate(
        model, IDS, evaluation=IDS, by="peak", measures=["perplexity", "loss"], seeds=1,
        interventions="zero", fraction=0.1, progress=False,
    )  # fmt: skip
    assert scores.frame["peak"].gt(0).all()
    assert {"loss", "perplexity"} <= set(again.frame["measure"])


def test_masks_on_experts_cost_the_columns_of_the_expert_that_a_token_goes_to() -> None:
    torch.manual_seed(0)
    model = as_language_model(TINY["llama"]())
    text = as_evaluation(IDS, model)
    rivals = Rivals(model, as_calibration(IDS, model), text, Masks(), 0, 2**28)
    built = entangle.expand(
        model, IDS, experts=3, sparsity=0.5, proj="mlp", keep=True, progress=False
    )
    fitted = rivals._on(built, "teal", 3)
    made = fitted.at(0.5)
    found = measure(made, text, progress=False)
    assert built.model is not None
    expected, dense = 0.0, 0
    with torch.no_grad():
        for layer in made.subject.layers:
            seen: list[Tensor] = []
            module: Any = layer.module
            handle = module.register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))
            with made.applied():  # the hook was set first, so it sees what is not masked
                built.model.module(input_ids=text.windows)
            handle.remove()
            rule = made.inputs[layer.name]
            for x in seen:
                rows = x.reshape(-1, x.shape[-1])
                kept = rule.chosen(rows.abs()).double()
                where = module.routing.router.route(rows)
                nonzeros = (module.weight != 0).sum(1).double()
                expected += float((kept * nonzeros[where]).sum()) / len(rows)
            dense += layer.in_features * layer.out_features
    routers = {id(made.subject.routed[x.name].routing): made.subject.routed[x.name].router
               for x in made.subject.layers}  # fmt: skip
    assert found.density == pytest.approx((expected + sum(routers.values())) / dense, rel=1e-9)
    everything = sum(x.in_features * x.out_features for x in list_layers(model.module))
    saved = (1 - found.density) * dense / everything  # of all linears, the head included
    assert 1 - found.flops == pytest.approx(saved, rel=1e-9)


def test_combined_arms_have_the_density_asked_for() -> None:
    model = TINY["llama"]()
    found = entangle.compare(
        model, IDS, IDS, ["teal:sparsegpt", "cats:wanda", "column-norm:expansion"], density=0.6,
        experts=2, progress=False,
    )  # fmt: skip
    rows: Any = found.frame.set_index("method")
    assert rows.loc["teal:sparsegpt", "density"] == pytest.approx(0.6, rel=0.03)
    assert rows.loc["cats:wanda", "density"] == pytest.approx(0.6, rel=0.03)
    assert np.isnan(rows.loc["column-norm:expansion", "perplexity"])  # one weight a layer alone
    assert (rows["token_bytes"].dropna() <= 1.01).all()
    late = entangle.compare(  # what is dense first is not counted when levels are solved
        model, IDS, IDS, "teal:sparsegpt", density=0.6, prefix=8, progress=False
    ).frame.set_index("method")
    assert late.loc["teal:sparsegpt", "density"] == pytest.approx(0.6, rel=0.06)


def test_knees_of_a_curve_made_by_hand() -> None:
    logs = {0.2: 0.01, 0.4: 0.03, 0.5: 0.05, 0.6: 0.5, 0.7: 3.0}
    rows: list[dict[str, object]] = [{"method": "dense", "sparsity": 0.0, "ratio": 1.0}]
    rows += [{"method": "m", "sparsity": s, "ratio": np.exp(v)} for s, v in logs.items()]
    frame = pd.DataFrame(rows).assign(experts=1, allocation="uniform")
    found = knees(frame).iloc[0]
    assert (found["within"], found["doubling"]) == (0.5, 0.5)
    assert knees(frame, most=0.02).iloc[0]["within"] == pytest.approx(0.2)
    assert knees(frame[:3]).empty


def test_global_magnitude_is_one_threshold() -> None:
    model = TINY["llama"]()
    found = entangle.compare(
        model, IDS, IDS, ["magnitude-global", "magnitude"], sparsity=0.5, progress=False
    )
    rows: Any = found.frame.set_index("method")
    assert rows.loc["magnitude-global", "nonzeros"] == pytest.approx(
        rows.loc["magnitude", "nonzeros"], abs=1e-3
    )
    assert rows.loc["magnitude-global", "perplexity"] != rows.loc["magnitude", "perplexity"]
    with pytest.raises(InvalidInput):
        ROUTERS.register("magnitude-global", 3)
    mixture = entangle.compare(
        TINY["mixtral"](), IDS, IDS, "magnitude-global", sparsity=0.5, progress=False
    )
    assert np.isnan(mixture.frame["perplexity"].iloc[1])  # a line, and a row without numbers


def test_first_tokens_are_dense_where_asked_and_density_1_has_no_masks() -> None:
    model: Any = TINY["llama"]()
    late = [
        entangle.compare(
            model, IDS, IDS, "teal", density=0.5, prefix=4, dense_prefix=first, progress=False
        ).frame["density"].iloc[1]
        for first in (0, 10)
    ]  # fmt: skip
    assert late[1] == pytest.approx((6 + 6 * late[0]) / 12, abs=0.05)  # of tokens 4 to 15
    found = entangle.compare(
        model, IDS, IDS, ["expansion", "teal:expansion"], density=1.0, experts=2, progress=False
    ).frame
    assert found["density"].iloc[1] == pytest.approx(found["density"].iloc[2])
    assert found["perplexity"].iloc[0] == pytest.approx(found["perplexity"].iloc[2], rel=1e-5)


def test_masks_on_sparse_weights_take_sequences_of_several_lengths() -> None:
    mask = torch.ones_like(IDS)
    mask[2:, -4:] = 0
    text: Any = {"input_ids": IDS, "attention_mask": mask}
    found = entangle.compare(
        TINY["llama"](), text, IDS, ["teal:wanda"], density=0.6, progress=False
    )
    assert found.frame["density"].iloc[-1] == pytest.approx(0.6, rel=0.03)
