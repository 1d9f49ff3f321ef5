"""What is read from the model: against its own outputs, position by position."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from entangle.errors import InvalidInput
from entangle.modes.pairs import farthest_pairs
from entangle.report.content import chosen_rows, content_of
from entangle.report.evidence import GROUPS, OFTEN, PAIRS, SHADES, STEPS, WINDOW, Evidence, gather
from entangle.report.runs import together
from tests.report.samples import unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from entangle.models.loading import LanguageModel
    from entangle.results.scores import NeuronScores
    from entangle.texts.calibration_set import CalibrationSet

GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def scores(scored: "Callable[[str, str], NeuronScores]") -> "NeuronScores":
    return scored("llama", "exact")


@pytest.fixture(scope="module")
def rows(scores: "NeuronScores") -> "NDArray[np.int64]":
    return chosen_rows(together(scores, []), 2)


@pytest.fixture(scope="module")
def evidence(
    scores: "NeuronScores", rows: "NDArray[np.int64]", tiny: "Callable[[str], LanguageModel]",
    calibration: "CalibrationSet",
) -> Evidence:  # fmt: skip
    return gather(scores, rows, tiny("llama"), calibration, progress=False)


@pytest.fixture(scope="module")
def recorded(
    tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet"
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Inputs, (tokens, features), and outputs, (neurons, tokens), of the gate of block 1."""
    module, seen = tiny("llama").module, []
    gate = module.get_submodule(GATE)
    handle = gate.register_forward_hook(lambda _m, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        module(calibration.ids)
    handle.remove()
    inputs, outputs = (part.flatten(0, 1).double().numpy() for part in seen[0])
    return inputs, outputs.T


def standardised(
    scores: "NeuronScores", neuron: int, outputs: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    row = scores.layer(GATE).frame.iloc[neuron]
    mean, std = float(row["mean"]), float(row["std"])
    return np.asarray((outputs[neuron] - mean) / std, dtype=np.float64)


def test_contexts_are_those_of_the_outputs(
    evidence: Evidence, scores: "NeuronScores", calibration: "CalibrationSet",
    recorded: "tuple[NDArray[np.float64], NDArray[np.float64]]",
) -> None:  # fmt: skip
    ids = calibration.ids.flatten().numpy()
    windows = evidence.windows[evidence.windows["layer"] == GATE].reset_index()
    shades = evidence.shades[windows["index"]]
    assert set(windows["neuron"]) == set(scores.layer(GATE).top(2)["neuron"])
    for neuron, own in windows.groupby("neuron"):
        z = standardised(scores, int(str(neuron)), recorded[1])
        for row in own.to_dict("records"):
            position = int(np.abs(z - row["output"]).argmin())
            assert z[position] == pytest.approx(row["output"], abs=1e-4)
            before, after = int(row["before"]), int(row["after"])
            place = position % calibration.seq_len
            assert (before, after) == (
                min(place, WINDOW), min(calibration.seq_len - place - 1, WINDOW)
            )  # fmt: skip
            words = [
                evidence.words[i]
                for i in evidence.ids[row["place"] - before :][: before + after + 1]
            ]
            wanted = ids[position - before : position + after + 1]
            assert words == [evidence.words[np.searchsorted(np.unique(ids), one)] for one in wanted]
            line = shades[own.index[own["output"] == row["output"]][0]]
            inside = line[WINDOW - before : WINDOW + after + 1]
            near = np.arcsinh(z[position - before : position + after + 1]) * STEPS
            assert np.abs(inside - near.clip(-SHADES, SHADES)).max() <= 0.5 + 1e-3
            assert (np.delete(line, range(WINDOW - before, WINDOW + after + 1)) == -8).all()
        groups = {name: part["output"].to_numpy() for name, part in own.groupby("group")}
        assert groups["largest"].max() == pytest.approx(z.max(), abs=1e-4)
        assert groups["smallest"].min() == pytest.approx(z.min(), abs=1e-4)
        assert groups["median"] == pytest.approx(np.sort(z)[95:98], abs=1e-4)
        assert set(groups) >= set(GROUPS)


def test_tokens_by_mean_output(
    evidence: Evidence, scores: "NeuronScores", calibration: "CalibrationSet",
    recorded: "tuple[NDArray[np.float64], NDArray[np.float64]]",
) -> None:  # fmt: skip
    ids = calibration.ids.flatten().numpy()
    found = evidence.tokens[evidence.tokens["layer"] == GATE]
    neuron = int(found["neuron"].iloc[0])
    z = standardised(scores, neuron, recorded[1])
    means = {one: z[ids == one].mean() for one in np.unique(ids) if (ids == one).sum() >= OFTEN}
    own = found[found["neuron"] == neuron]
    largest, smallest = (own[own["end"] == end]["mean"].to_numpy() for end in (1, 0))
    ordered = np.sort(list(means.values()))
    np.testing.assert_allclose(smallest, ordered[: len(smallest)], atol=1e-4)
    np.testing.assert_allclose(largest, ordered[::-1][: len(largest)], atol=1e-4)


def test_pairs_come_in_near_and_go_out_far(
    evidence: Evidence, scores: "NeuronScores",
    recorded: "tuple[NDArray[np.float64], NDArray[np.float64]]",
) -> None:  # fmt: skip
    inputs, outputs = recorded
    distance = np.linalg.norm(inputs[:, None] - inputs[None], axis=2)
    for neuron, own in evidence.near[evidence.near["layer"] == GATE].groupby("neuron"):
        assert 1 <= len(own) <= PAIRS
        z = standardised(scores, int(str(neuron)), outputs)
        for row in own.to_dict("records"):
            a, b = (int(np.abs(z - row[f"output_{side}"]).argmin()) for side in "ab")
            assert row["input_distance"] == pytest.approx(distance[a, b], abs=1e-4)
            assert row["output_distance"] == pytest.approx(z[b] - z[a], abs=1e-4)
            assert row["output_distance"] > 0
            assert distance[a, b] <= np.quantile(distance[np.triu_indices(len(z), 1)], 0.05)
        assert (np.diff(own["output_distance"]) <= 0).all()


def test_the_page_holds_it_and_says_where_it_is_from(
    evidence: Evidence, scores: "NeuronScores", rows: "NDArray[np.int64]"
) -> None:
    content = content_of(together(scores, []), rows=rows, evidence=evidence)
    tables = content.data["tables"]
    assert set(tables) == {"modes", "windows", "near", "tokens"}  # type: ignore[call-overload]
    starts = unpacked(tables["windows"]["starts"])  # type: ignore[index]
    assert len(starts) == len(rows) + 1
    assert (np.diff(starts.astype(int)) > 10).all()
    assert any("the text of the scores" in note for note in evidence.notes)


def test_another_text_is_told_and_another_model_refused(
    scores: "NeuronScores", rows: "NDArray[np.int64]", tiny: "Callable[[str], LanguageModel]",
    calibration: "CalibrationSet",
) -> None:  # fmt: skip
    other = replace(calibration, ids=calibration.ids[:4])
    found = gather(scores, rows[:1], tiny("llama"), other, progress=False)
    assert any("NOT the text of the scores" in note for note in found.notes)
    assert [*found.elsewhere] == [*found.notes[:1]]
    with pytest.raises(InvalidInput, match="digest"):
        gather(scores, rows, tiny("gpt2"), calibration, progress=False)


def test_little_memory_gives_the_same(
    evidence: Evidence, scores: "NeuronScores", rows: "NDArray[np.int64]",
    tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet", any_memory: None,
) -> None:  # fmt: skip
    again = gather(scores, rows, tiny("llama"), calibration, memory=1, progress=False)
    assert again.windows.equals(evidence.windows)
    assert again.modes.equals(evidence.modes)
    assert again.near.equals(evidence.near)


def test_farthest_of_many_pairs_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    outputs = np.round(rng.normal(size=300), 2)  # with ties
    pairs = np.stack(np.triu_indices(300, 1), axis=1)
    moved = np.abs(outputs[pairs[:, 0]] - outputs[pairs[:, 1]])
    wanted: list[tuple[int, int]] = []
    taken: set[int] = set()
    for i in np.argsort(-moved, kind="stable"):
        a, b = pairs[i].tolist()
        if moved[i] > 0 and not {a, b} & taken:
            wanted.append((a, b) if outputs[a] < outputs[b] else (b, a))
            taken |= {a, b}
    assert farthest_pairs(outputs, pairs, 10) == wanted[:10]
    assert farthest_pairs(outputs, pairs, 1000) == wanted
    assert farthest_pairs(outputs, pairs[:0], 3) == []
    assert farthest_pairs(outputs, pairs, 0) == []
