"""Padded sets, left and right, against the same sequences without pads, in every function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from entangle import ablate, allocate, decompose, expand, neuron_modes, perplexity, score
from entangle.allocation.search import search
from entangle.errors import InvalidInput
from entangle.evaluation import (
    DenseReference,
    EvaluationText,
    compare_with_dense,
    load_evaluation,
    perplexity_ratio,
    window_losses,
)
from entangle.evaluation.logits import next_token_logits
from entangle.experiments.compare import compare
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.recording.recorder import Recorder
from entangle.seeding import torch_rng
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from tests.reference.wasserstein import exact_wd
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
CAUSAL = ["llama", "gpt_neox", "gpt2", "opt", "gemma3", "qwen3", "bloom", "falcon"]
LENGTHS = [9, 16, 4, 12, 16, 7, 11, 5, 13, 8]
FILL = 111  # what pads hold, which must not matter


def _sequences() -> list[Tensor]:
    rng = torch_rng(0, "padded")
    return [torch.randint(4, 110, (n,), generator=rng) for n in LENGTHS]


def _padded(rows: list[Tensor], side: str, columns: int = 16) -> dict[str, Tensor]:
    """Return what a tokenizer gives with padding on one side."""
    ids = torch.full((len(rows), columns), FILL)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(columns - len(row), columns)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=["left", "right"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_set_holds_the_sequences(side: str) -> None:
    got = load_calibration(_padded(_sequences(), side))
    assert (got.n_seq, got.seq_len, got.n_tokens) == (10, 16, sum(LENGTHS))
    assert [got.rows.sequence(i).tolist() for i in range(10)] == [r.tolist() for r in _sequences()]
    cut = load_calibration(_padded(_sequences(), side), n_seq=3, seq_len=8)
    assert [cut.rows.sequence(i).tolist() for i in range(3)] == [
        row[:8].tolist() for row in _sequences()[:3]
    ]
    lists = load_calibration([row.tolist() for row in _sequences()])
    assert [lists.rows.sequence(i).tolist() for i in range(10)] == [
        row.tolist() for row in _sequences()
    ]


def test_what_pads_hold_does_not_matter(side: str, tiny: Tiny) -> None:
    one, other = _padded(_sequences(), side), _padded(_sequences(), side)
    other["input_ids"][other["attention_mask"] == 0] = -100
    assert load_calibration(one).digest == load_calibration(other, vocab_size=111).digest
    assert load_evaluation(one).digest == load_evaluation(other, vocab_size=111).digest


@pytest.mark.parametrize("name", CAUSAL)
def test_perplexity_is_that_of_the_sequences_one_by_one(name: str, side: str, tiny: Tiny) -> None:
    model, text = tiny(name), load_evaluation(_padded(_sequences(), side))
    losses = [
        float(window_losses(next_token_logits(model, row[None]), row[None])[0])
        for row in _sequences()
    ]
    got = perplexity(model, text)
    np.testing.assert_allclose(got.window_losses, losses, rtol=1e-5)
    assert got.n_tokens == text.n_tokens == sum(LENGTHS) - 10
    assert got.value == pytest.approx(np.exp(sum(losses) / (sum(LENGTHS) - 10)), rel=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_scores_are_of_the_sequences_one_by_one(
    name: str, method: Any, side: str, tiny: Tiny
) -> None:
    model = tiny(name)
    layer = find_layers(model.module, 1, "mlp")[0]
    parts: list[Tensor] = []
    recorder = Recorder([layer], lambda found: parts.append(found.outputs))
    recorder.run(model.module, ((0, row[None]) for row in _sequences()))
    outputs = torch.cat(parts).double().numpy()
    got = score(model, _padded(_sequences(), side), layers=layer.name, method=method, md=False)
    assert set(got.frame["n_tokens"]) == {sum(LENGTHS)}
    right = [exact_wd(outputs[:, i]) for i in range(5)]
    bound = got.frame["wd_bound"][:5] if "wd_bound" in got.frame else 0.0
    assert (np.abs(got.frame["wd"][:5] - right) <= bound + 1e-5).all()


def test_divergence_is_that_of_the_sequences_one_by_one(side: str, tiny: Tiny) -> None:
    dense, changed = tiny("llama"), as_language_model(TINY["llama"]())
    with torch.no_grad():
        find_layers(changed.module, 1, "mlp")[0].weight.mul_(0.5)
    expected = []
    for row in _sequences():
        p, q = (next_token_logits(m, row[None])[0, :-1].log_softmax(-1) for m in (dense, changed))
        expected.append(float((p.exp() * (p - q)).sum()))
    text = load_evaluation(_padded(_sequences(), side))
    with DenseReference(dense, text, progress=False) as reference:
        got = compare_with_dense(changed, reference, progress=False)
    np.testing.assert_allclose(got.window_kl, expected, rtol=1e-3, atol=1e-6)
    assert got.window_positions.tolist() == [n - 1 for n in LENGTHS]


def test_ratios_weigh_windows_as_they_are_long(tiny: Tiny) -> None:
    text = load_evaluation(_padded(_sequences(), "left"))
    result = perplexity(tiny("llama"), text)
    counts = np.array(LENGTHS) - 1.0
    assert result.window_tokens.tolist() == counts.tolist()
    doubled = type(result)(result.window_losses + counts * 0.3, result.protocol, text.n_tokens,
                           None, None)  # fmt: skip
    ratio = perplexity_ratio(doubled, result)
    assert (ratio.low, ratio.high) == pytest.approx((np.exp(0.3), np.exp(0.3)))


def _frames(model: LanguageModel, calibration: Any, text: Any) -> dict[str, pd.DataFrame]:
    """Run everything that takes a calibration set or a text; return tables of numbers."""
    layers: Any = {"layers": 1, "proj": "mlp"}
    quiet: Any = {"progress": False}
    scores = score(model, calibration, **layers, **quiet)
    name = find_layers(model.module, 1, "mlp")[0].name
    found = {"scores": scores.frame}
    ablation = ablate(
        model, calibration, evaluation=text, **layers, fraction=0.1, strengths=(0.5,),
        seeds=1, experts=(1, 2), measures=("perplexity", "divergence"), **quiet,
    )  # fmt: skip
    found |= {"ablation": ablation.frame, "windows": ablation.windows}
    expanded = expand(
        model, calibration, experts=2, sparsity=0.5, **layers, evaluation=text, **quiet
    )
    assert expanded.perplexity is not None
    found["expansion"] = pd.DataFrame({"loss": expanded.perplexity.window_losses})
    compared = compare(model, calibration, text, methods="expansion", sparsity=0.5, experts=(1, 2))
    found["comparison"] = compared.frame.drop(columns="seconds")
    pieces = decompose(model, calibration, layers=name, neurons=[0, 3], experts=(1, 2), **quiet)
    found |= {"decomposition": pieces.neurons, "separated": pieces.separated}
    found["contexts"] = neuron_modes(model, calibration, name, [0, 3], **quiet).contexts
    for rule in ("trim", "neuroal", "sensitivity", "owl"):
        allocation = allocate(
            scores, sparsity=0.5, rule=rule, model=model, calibration=calibration, **quiet
        )
        zeros = {key: value.tolist() for key, value in allocation.zeros.items()}
        found[rule] = pd.DataFrame({"zeros": [str(zeros)]})
    tuned = search(
        scores, model=model, calibration=calibration, sparsity=0.5, tune="protect",
        evaluations=2, **quiet,
    )  # fmt: skip
    found["search"] = pd.DataFrame({"tried": [str(tuned.manifest["search"]["tried"])]})  # type: ignore[index]
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=SLOW) for n in ("llama", "opt"))])
def test_columns_of_pads_change_nothing(name: str, tiny: Tiny) -> None:
    rng = torch_rng(2, "whole")
    rows = list(torch.randint(4, 110, (10, 16), generator=rng))
    whole = _frames(tiny(name), torch.stack(rows), torch.stack(rows[:4]))
    for side in ("left", "right"):
        padded = _padded(rows, side, columns=21)
        text = _padded(rows[:4], side, columns=21)
        found = _frames(tiny(name), padded, text)
        for key, table in whole.items():
            pd.testing.assert_frame_equal(found[key], table, obj=f"{key}, {side}")


@pytest.mark.parametrize(
    "name", ["gpt_neox", *(pytest.param(n, marks=SLOW) for n in ("qwen3", "gemma3"))]
)
def test_left_and_right_pads_are_alike(name: str, tiny: Tiny) -> None:
    rows = _sequences()
    left, right = (
        _frames(tiny(name), _padded(rows, side), _padded(rows[:4], side))
        for side in ("left", "right")
    )
    for key, table in left.items():
        pd.testing.assert_frame_equal(right[key], table, obj=key)


def test_rows_of_pads_alone_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _sequences()
    rows[2], rows[5] = rows[2][:0], rows[5][:1]
    got = load_calibration(_padded(rows, "right"))
    assert (got.n_seq, got.settings["rows_left_out"]) == (9, 1)
    assert got.n_tokens == sum(map(len, rows))
    text = load_evaluation(_padded(rows, "left"))
    assert (text.n_windows, text.settings["rows_left_out"]) == (8, 2)
    assert capsys.readouterr().err.count("left out") == 2
    assert load_calibration([[], [1, 2], [3]]).n_seq == 2
    with pytest.raises(InvalidInput, match="2"):
        load_evaluation([[1], [], [2]])
    empty: dict[str, Any] = _padded([rows[2]] * 3, "left")
    with pytest.raises(InvalidInput):
        load_calibration(empty)
    mask = torch.tensor([[1, 1], [0, 0]]).bool()
    with pytest.raises(InvalidInput, match="row 1"):
        CalibrationSet(torch.ones(2, 2, dtype=torch.int64), "x", {}, mask)


def test_a_mask_with_holes_is_refused() -> None:
    ids = torch.arange(8).view(2, 4)
    for mask in ([[1, 1, 1, 1], [1, 0, 1, 1]], [[1, 1, 2, 1], [1, 1, 1, 1]]):
        with pytest.raises(InvalidInput, match="attention_mask"):
            load_calibration({"input_ids": ids, "attention_mask": torch.tensor(mask)})
    with pytest.raises(InvalidInput, match=r"`attention_mask of dict`.*\(2, 3\)"):
        load_calibration({"input_ids": ids, "attention_mask": torch.ones(2, 3).long()})


def test_pads_of_a_running_text_are_no_tokens() -> None:
    got = load_evaluation(
        {"input_ids": [9, 9, 1, 2, 3, 4, 5], "attention_mask": [0, 0, 1, 1, 1, 1, 1]}, seq_len=2
    )
    assert got.windows.tolist() == [[1, 2], [3, 4]]


def test_windows_that_are_longer_than_the_context_without_pads(tiny: Tiny) -> None:
    text = load_evaluation(_padded(_sequences(), "left", columns=500), context_length=16)
    assert (text.seq_len, text.longest) == (500, 16)
    assert isinstance(text, EvaluationText)
    assert perplexity(tiny("llama"), text).n_tokens == sum(LENGTHS) - 10


@pytest.mark.parametrize("load", [load_calibration, load_evaluation])
@pytest.mark.parametrize(
    ("rows", "n_padded"),
    [
        ([[5, 6, 7, 3, 3], [3, 3, 5, 6, 7], [5, 6, 7, 8, 3]], 2),
        ([[5, 3, 3, 6, 7], [3, 5, 6, 7, 8]], 0),
    ],
)
def test_pads_without_a_mask_are_told(
    load: Callable[..., object],
    rows: list[list[int]],
    n_padded: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == 3
    load(torch.tensor(rows), tokenizer, seq_len=5)
    told = capsys.readouterr().err
    assert (f"{n_padded} of {len(rows)} row(s)" in told and "attention_mask" in told) == (
        n_padded > 0
    )
    mask = torch.tensor([[int(one != 3) for one in row] for row in rows])
    if n_padded:
        load({"input_ids": torch.tensor(rows), "attention_mask": mask}, tokenizer, seq_len=5)
        assert "attention_mask" not in capsys.readouterr().err
