"""Scores of experts: their own tokens, too few of them, and what routing does to WD."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import entangle
from entangle.errors import InvalidInput
from entangle.models.layers import find_layers
from entangle.models.mixtures import banks_of
from entangle.results.scores import NeuronScores
from entangle.seeding import numpy_rng
from entangle.stats.wasserstein import null_floor
from tests.mixtures import TEXT, mixture
from tests.reference.scoring import neuron_scores

N = 16 * 32
GATE = "model.layers.1.mlp.experts.{}.gate_proj"


def seen_by(module: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters the second block's mixture, and the experts of every token."""
    found: list[Tensor] = []
    home = module.get_submodule("model.layers.1.mlp.experts")
    handle = home.register_forward_pre_hook(lambda _module, args: found.extend(args[:2]))
    module(ids)
    handle.remove()
    return found[0], found[1]


def score(module: nn.Module, **settings: Any) -> NeuronScores:
    given: dict[str, Any] = {"proj": "experts", "min_tokens": 64, **settings}
    return entangle.score(module, TEXT(), **given)


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_an_expert_is_scored_on_the_tokens_that_it_sees(method: str) -> None:
    module: Any = mixture("Mixtral")
    hidden, index = seen_by(module, TEXT())
    scores = score(module, layers=1, method=method)
    stacked = module.model.layers[1].mlp.experts.gate_up_proj
    assert set(scores.layers["n_tokens"]) > {int((index == 0).sum())}
    for number in range(4):
        rows = hidden[(index == number).any(1)]
        own = scores.frame[scores.frame["layer"] == GATE.format(number)]
        assert (own["n_tokens"] == len(rows)).all()
        row = scores.layers.set_index("layer").loc[GATE.format(number)]
        assert (row["null_floor"], row["null_floor_high"]) == null_floor(len(rows))
        for neuron in (0, 11):
            expected = neuron_scores((rows @ stacked[number][neuron]).double().numpy())
            got = own.iloc[neuron]
            close = 3e-5 if method == "exact" else 2e-3
            assert got["wd"] == pytest.approx(expected["wd"], abs=close)
            assert got["mean"] == pytest.approx(expected["mean"], abs=1e-5)
            assert 0 < got["wd_se"] < 0.1


def test_few_tokens_are_flagged_and_not_scored() -> None:
    module: Any = mixture("Mixtral")
    scores = score(module, layers=1, min_tokens=250, routing=True)
    few = scores.frame["n_tokens"] < 250
    assert few.any()
    assert not few.all()
    assert ((scores.frame["flag"] == "few_tokens") == few).all()
    columns = ["wd", "wd_se", "ks", "md", "skewness", "wd_inside", "wd_outside", "wd_control"]
    assert scores.frame.loc[few, columns].isna().all(axis=None)
    assert scores.frame.loc[~few, columns].notna().all(axis=None)
    assert scores.frame["std"].notna().all()
    dense = entangle.score(module, TEXT(), layers=1, proj="attn", min_tokens=10**6)
    assert (dense.frame["flag"] == "").all()  # it sees all tokens


def test_experts_without_tokens_and_with_nan() -> None:
    module: Any = mixture("Mixtral")
    with torch.no_grad():
        router = module.model.layers[1].mlp.gate.weight
        router.zero_()
        module.model.layers[1].mlp.experts.gate_up_proj[0, 5, 3] = torch.nan
    _, index = seen_by(module, TEXT())  # of equal logits the first are taken, or the last
    used = index.unique().tolist()
    scores = score(module, layers=1, method="sketch")
    silent = scores.manifest["settings"]["layers_without_tokens"]  # type: ignore[index]
    assert {name.split(".")[5] for name in silent} == {str(n) for n in range(4) if n not in used}
    if 0 in used:
        own = scores.frame[scores.frame["layer"] == GATE.format(0)]
        assert own["flag"].tolist() == ["" if n != 5 else "nan" for n in range(48)]
    other = next(n for n in range(4) if n not in used)
    with pytest.raises(InvalidInput, match=f"experts.{other}.gate_proj.*sees no token"):
        score(module, layers=GATE.format(other), proj=None)


def test_routing_is_measured_on_matched_tokens() -> None:
    module: Any = mixture("Mixtral")
    hidden, index = seen_by(module, TEXT())
    scores = score(module, layers=1, method="exact", routing=True, seed=3)
    np.testing.assert_allclose(scores.frame["wd_inside"], scores.frame["wd"], atol=2e-6)
    stacked, number = module.model.layers[1].mlp.experts.gate_up_proj, 2
    count = int((index == number).sum())
    rng = numpy_rng(3, "routing", f"model.layers.1.mlp.experts.{number}")
    own = scores.frame[scores.frame["layer"] == GATE.format(number)].iloc[7]
    for name in ("wd_outside", "wd_control"):
        rows = hidden[np.sort(rng.permutation(N)[:count])]
        expected = neuron_scores((rows @ stacked[number][7]).double().numpy())
        assert own[name] == pytest.approx(expected["wd"], abs=3e-5)
    logs = np.log(scores.frame[["wd_outside", "wd_inside"]])
    ratio = (logs["wd_outside"] - logs["wd_inside"]).groupby(scores.frame["layer"]).mean()
    table = scores.routing(n_boot=50).set_index("projection")
    gates = [ratio[GATE.format(n)] for n in range(4)]
    assert table.loc["gate_proj", "drop"] == pytest.approx(np.exp(np.mean(gates)))
    assert (table["low"] <= table["drop"]).all()
    assert (table["drop"] <= table["high"]).all()
    assert table["control"].between(0.8, 1.25).all()


def test_a_router_that_parts_two_kinds_of_tokens_disentangles() -> None:
    """Inputs of two kinds, each Gaussian: all together two modes, one for the expert of each."""
    module: Any = mixture("Mixtral", num_experts_per_tok=1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.model.embed_tokens.weight.normal_(generator=rng)
        module.model.embed_tokens.weight[:, 0] = 30.0
        module.model.embed_tokens.weight[56:, 0] = -30.0
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.post_attention_layernorm.weight.fill_(1.0)
            block.mlp.gate.weight.zero_()
            block.mlp.gate.weight[0, 0], block.mlp.gate.weight[1, 0] = 4.0, -4.0
    scores = score(module, layers=0, routing=True, method="exact")
    assert scores.frame["layer"].nunique() == 6  # two experts take all tokens
    drop = scores.routing().set_index("projection")["drop"]
    assert drop["gate_proj"] > 2
    assert scores.routing()["control"].between(0.7, 1.4).all()


def test_routing_needs_experts_that_tell_their_tokens() -> None:
    with pytest.raises(InvalidInput, match="experts"):
        entangle.score(mixture("Mixtral"), TEXT(), layers=0, proj="attn", routing=True)
    with pytest.raises(InvalidInput, match="routing"):
        score(mixture("JetMoe"), layers=0, routing=True)
    with pytest.raises(InvalidInput, match="--routing"):
        score(mixture("Mixtral"), layers=0).routing()


def test_a_mixture_that_gets_other_rows_than_the_texts_is_refused() -> None:
    module = mixture("Mixtral")
    (bank, *_) = banks_of(module)
    bank.tokens = 7
    assert not bank.holds(8)
    sorted_bank = banks_of(mixture("JetMoe"))[0]
    sorted_bank.tokens = 16
    assert sorted_bank.holds(8)
    assert not sorted_bank.holds(7)


def test_scores_with_routing_are_saved_and_drawn(tmp_path: Any) -> None:
    scores = score(mixture("GptOss"), layers=0, routing=True, method="exact", min_tokens=100)
    scores.save(tmp_path / "scores")
    loaded = entangle.load_scores(tmp_path / "scores")
    assert loaded.frame["wd_control"].equals(scores.frame["wd_control"])
    assert len(find_layers(mixture("GptOss"), 0, "experts")) == 12
    drawn = loaded.figures(tmp_path / "figures", only="routing", formats="png")
    assert (tmp_path / "figures" / "routing.png").exists(), drawn
