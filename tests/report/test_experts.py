"""What is read of experts' neurons: against the experts' own numbers, token by token, by hand."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import entangle
from entangle.explorer import explore
from entangle.models.loading import as_language_model
from entangle.modes import neuron_modes
from entangle.report.content import chosen_rows, content_of
from entangle.report.evidence import OFTEN, SHADES, STEPS, UNSEEN, WINDOW, Evidence, gather, planned
from entangle.report.runs import together
from entangle.results.scores import NeuronScores
from entangle.texts.calibration import as_calibration
from tests.mixtures import TEXT, mixture
from tests.report.samples import unpacked

HOME, N, LENGTH = "model.layers.1.mlp.experts", 512, 32
silu = nn.functional.silu


class Neurons(NamedTuple):
    """A layer of an expert, by hand."""

    at: NDArray[np.int64]
    inputs: NDArray[np.float64]
    """(tokens, features)."""
    outputs: NDArray[np.float64]
    """(neurons, tokens)."""


def by_hand(name: str, module: Any) -> dict[str, Neurons]:
    """Return what the experts of block 1 get and give, from the router's and their own weights."""
    block, entered = module.model.layers[1], list[Tensor]()
    mlp = block.feed_forward if name == "Llama4" else block.mlp
    handle = mlp.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    module(TEXT())
    handle.remove()
    x = entered[0].flatten(0, 1)
    router = mlp.gate if name in ("Mixtral", "Qwen2Moe") else mlp.router
    logits = nn.functional.linear(x, router.weight, getattr(router, "bias", None))
    sent = torch.zeros_like(logits).scatter(1, logits.topk(1 if name == "Llama4" else 2)[1], 1) > 0
    found = {}
    for e in range(4):
        at = sent[:, e].nonzero()[:, 0]
        own, both, last = x[at], mlp.experts.gate_up_proj[e], mlp.experts.down_proj[e]
        if name == "Llama4":
            own = own * logits[at, e].sigmoid()[:, None]
            gate, up = (own @ both).chunk(2, 1)
            z = silu(gate) * up
            out = z @ last
        elif name == "GptOss":
            mixed = own @ both + mlp.experts.gate_up_proj_bias[e]
            gate, up = mixed[:, ::2], mixed[:, 1::2]
            low, high = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            z = (high + 1) * low * (1.702 * low).sigmoid()
            out = z @ last + mlp.experts.down_proj_bias[e]
        else:
            gate, up = (own @ both.T).chunk(2, 1)
            z = silu(gate) * up
            out = z @ last.T
        for key, inputs, outputs in (("gate", own, gate), ("down", z, out)):
            arrays = (inputs.double().numpy(), outputs.double().numpy().T)
            found[f"{e}.{key}_proj"] = Neurons(at.numpy(), *arrays)
    return found


def scored(module: nn.Module, **given: Any) -> NeuronScores:
    settings: dict[str, Any] = {
        "layers": 1, "proj": "experts", "min_tokens": 32, "method": "exact", "progress": False
    }  # fmt: skip
    return entangle.score(module, TEXT(), **settings | given)


def read(scores: NeuronScores, module: nn.Module, **given: Any) -> Evidence:
    rows = chosen_rows(together(scores, []), 1)
    return gather(scores, rows, module, TEXT(), progress=False, **given)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "GptOss", "Llama4"])
def test_what_is_read_is_of_the_tokens_that_an_expert_is_sent(name: str) -> None:
    module: Any = mixture(name)
    if name == "GptOss":  # else the bias alone chooses
        module.model.layers[1].mlp.router.bias.zero_()
    scores, known = scored(module), by_hand(name, module)
    found = read(scores, module)
    assert not found.left_out
    ids, checked = TEXT().flatten().numpy(), 0
    different = np.unique(ids)
    neurons: Any = found.windows.reset_index().groupby(["layer", "neuron"])
    for (layer, neuron), windows in neurons:
        own = known.get(".".join(layer.split(".")[-2:]))
        if own is None:
            continue  # up_proj
        checked, at = checked + 1, own.at
        row = scores.layer(layer).frame.iloc[neuron]
        z = (own.outputs[neuron] - row["mean"]) / row["std"]
        assert found.sent[layer] == len(at) == row["n_tokens"]
        for one in windows.to_dict("records"):
            before, after = int(one["before"]), int(one["after"])
            text = different[found.ids[one["place"] - before :][: before + after + 1]]
            spans = [
                np.arange(p - min(p % LENGTH, WINDOW), p + min(LENGTH - p % LENGTH - 1, WINDOW) + 1)
                for p in at[np.abs(z - one["output"]) < 1e-4].tolist()
            ]
            (span,) = [own for own in spans if np.array_equal(ids[own], text)]
            shades = found.shades[one["index"]][WINDOW - before : WINDOW + after + 1]
            seen = np.isin(span, at)
            assert ((shades == UNSEEN) == ~seen).all()
            wanted = np.arcsinh(z[np.searchsorted(at, span[seen])]) * STEPS
            assert np.abs(shades[seen] - wanted.clip(-SHADES, SHADES)).max() <= 0.5 + 1e-3
        groups = windows.groupby("group")["output"]
        assert groups.max()["largest"] == pytest.approx(z.max(), abs=1e-4)
        assert groups.min()["smallest"] == pytest.approx(z.min(), abs=1e-4)
        tables = {
            key: table[(table["layer"] == layer) & (table["neuron"] == neuron)]
            for key, (table, _) in found.tables().items()
        }
        assert tables["modes"]["tokens"].sum() == len(at)
        counts = {one: int((ids[at] == one).sum()) for one in different}
        means = [z[ids[at] == one].mean() for one, n in counts.items() if n >= OFTEN]
        ends = tables["tokens"]
        assert ends["count"].ge(OFTEN).all()
        assert ends["mean"].max() == pytest.approx(max(means), abs=1e-4)
        assert len(tables["near"])
        for one in tables["near"].to_dict("records"):
            word_a, word_b = different[found.ids[[one["place_a"], one["place_b"]]]].tolist()
            a, b = (
                np.flatnonzero((np.abs(z - one[f"output_{side}"]) < 1e-4) & (ids[at] == word))
                for side, word in (("a", word_a), ("b", word_b))
            )
            apart = np.linalg.norm(own.inputs[a][:, None] - own.inputs[b], axis=2)
            assert np.abs(apart - one["input_distance"]).min() < 1e-4
            assert one["output_distance"] == pytest.approx(z[b[0]] - z[a[0]], abs=2e-4)
    assert checked == (scores.layers["n_tokens"] >= 32).sum() * 2 // 3 >= 6
    (note,) = [one for one in found.notes if "experts" in one]
    low, high = (100 * f(found.sent.values()) / N for f in (min, max))
    assert f"{low:.3g} to {high:.3g} %" in note


def test_a_page_tells_how_many_tokens_an_expert_is_sent(
    any_memory: None,
) -> None:
    module: Any = mixture("Mixtral")
    scores = scored(module, layers=f"{HOME}.*.gate_proj", proj=None)
    found, again = read(scores, module), read(scores, module, memory=1)
    for name, (table, _) in found.tables().items():
        assert table.equals(again.tables()[name][0]), name
    rows = chosen_rows(together(scores, []), 1)
    known, text = as_language_model(module), as_calibration(TEXT(), as_language_model(module))
    assert [len(planned(scores, rows, known, text, most)) for most in (1, 10**9)] == [4, 1]
    data: Any = content_of(together(scores, []), rows=rows, evidence=found).data
    told = {one["name"]: (one["sent"], one["tokens"], one["of"]) for one in data["layers"]}
    assert all(sent == tokens < whole == N for sent, tokens, whole in told.values())
    starts = unpacked(data["tables"]["windows"]["starts"])
    assert (np.diff(starts.astype(int)) > 10).all()

    module.model.layers[1].mlp.gate.weight.zero_()  # two experts take all tokens
    model = as_language_model(module).describe()
    taken = replace(scores, manifest={**scores.manifest, "model": model})
    silent = gather(taken, rows, module, TEXT(), memory=1, progress=False)
    assert list(silent.sent.values()) == [N, N]
    assert ["router" in one for one in silent.left_out.values()] == [True, True]


def test_a_mixture_that_does_not_tell_is_named() -> None:
    module = mixture("JetMoe")
    scores = scored(module, layers=f"{HOME}.*.down_proj", proj=None)
    found = read(scores, module)
    assert len(found.windows) == len(found.sent) == 0
    assert ["does not tell" in one for one in found.left_out.values()] == [True] * 4
    assert any(next(iter(found.left_out.values())) in one for one in found.notes)


def test_the_explorer_reads_them_too() -> None:
    module = mixture("Mixtral")
    scores = scored(module, layers=f"{HOME}.1.gate_proj", proj=None)
    finder = explore(scores, TEXT(), model=module)._modes
    name = str(scores.layers["layer"].iloc[0])
    known = neuron_modes(module, TEXT(), name, 3, progress=False)
    found = finder.find(name, 3)
    assert found.modes.equals(known.modes)
    assert found.contexts.equals(known.contexts)
    outputs = finder.outputs(name, 3)
    assert known.at is not None
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(outputs)), known.at)
    pairs = finder.pairs(name, 3)
    assert len(pairs)
    for side in "ab":
        np.testing.assert_allclose(outputs[pairs[f"position_{side}"]], pairs[f"output_{side}"])
    assert f"{len(known.at)} of {N}" in found.sent
