"""Recording once, working in pieces, and inputs that only look alike."""

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Tensor, nn

from entangle.errors import InvalidInput, Unavailable
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.results.scores import NeuronScores
from entangle.scoring import exact
from entangle.scoring.layer_scores import (
    LayerSummary,
    MeasuredLayer,
    layer_table,
    neuron_table,
    summarise,
)
from entangle.scoring.score import Method, score
from entangle.stats.mapping_difficulty import draw_pairs
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import scoring as reference

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str, str], NeuronScores]


class Stores:
    """Notes every store that is made, and what it holds when it is closed."""

    def __init__(self) -> None:
        self.features: list[int] = []
        self.spilled: list[bool] = []

    def make(self, budget: ByteBudget) -> TokenStore:
        noted = self

        class Noted(TokenStore):
            def close(self) -> None:
                noted.features.append(self._features)
                noted.spilled.append(self._file is not None)
                super().close()

        return Noted(budget)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    noted = Stores()
    monkeypatch.setattr(exact, "TokenStore", noted.make)
    return noted


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("llama", [32, 32, 32, 48]),  # q, k, v · o · gate, up · down
        ("gpt2", [32, 32, 32, 48]),  # c_attn · c_proj · c_fc · c_proj
        ("bert", [32, 32, 32, 48]),
        ("opt", [32, 32, 32, 48]),
        ("gpt_neox", [32, 32, 32, 48]),
        ("gemma3", [32, 32, 32, 48]),
    ],
)
def test_shared_inputs_are_recorded_once(
    name: str, features: list[int], tiny: Tiny, calibration: CalibrationSet, stores: Stores
) -> None:
    score(tiny(name), calibration, layers=1, proj=None, method="exact", md=False)
    assert sorted(stores.features) == features
    assert not any(stores.spilled)


def test_layers_that_share_inputs_share_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads ask before the first has drawn."""
    draws: list[int] = []

    def slowly(n_tokens: int, *, seed: int) -> Tensor:
        draws.append(n_tokens)
        threading.Event().wait(0.1)
        return draw_pairs(n_tokens, seed=seed)

    monkeypatch.setattr(exact, "draw_pairs", slowly)
    with TokenStore(ByteBudget(2**20)) as store, ThreadPoolExecutor(2) as pool:
        inputs = exact.RecordedInputs(store)
        inputs.add(0, torch.arange(60.0).view(20, 3))
        here = torch.device("cpu")
        first, second = pool.map(lambda _: inputs.pairs(seed=0, device=here), range(2))
    assert first is second
    assert draws == [20]


def test_records_of_dense_layers_are_taken_in_one_piece(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    pieces: dict[int, list[int]] = {}
    close = TokenStore.close

    def noted(self: TokenStore) -> None:
        pieces.setdefault(id(self), [len(part) for part in self.chunks()])
        close(self)

    monkeypatch.setattr(TokenStore, "close", noted)
    monkeypatch.setattr("entangle.recording.stream._SLAB_BYTES", 1)
    before = score(tiny("llama"), calibration, layers=1, proj=None, method="exact")
    assert max(map(len, pieces.values())) > 1
    pieces.clear()
    monkeypatch.setattr("entangle.recording.stream._gains", lambda _rows: True)
    after = score(tiny("llama"), calibration, layers=1, proj=None, method="exact")
    assert_frame_equal(after.frame, before.frame)
    assert list(pieces.values()) == [[calibration.n_tokens]] * 4


def measure(
    module: nn.Module, layers: int | list[str], ids: Tensor, memory: int
) -> list[LayerSummary]:
    batches = [(0, ids[:2]), (0, ids[2:5]), (1, ids[5:])]
    return exact.score_exact(
        module, find_layers(module, layers), batches,
        n_groups=2, md=True, seed=0, memory=memory, report=lambda _count: None,
    )[0]  # fmt: skip


@pytest.mark.parametrize("memory", [0, 2**14, 2**16])
def test_little_memory_spills_and_chunks_to_the_same_result(
    memory: int, tiny: Tiny, calibration: CalibrationSet, stores: Stores
) -> None:
    module = tiny("llama").module
    usual = measure(module, 1, calibration.ids, 2**30)
    assert not any(stores.spilled)
    stores.spilled.clear()
    tight = measure(module, 1, calibration.ids, memory)
    assert any(stores.spilled)
    assert_frame_equal(neuron_table(tight, "x"), neuron_table(usual, "x"), rtol=1e-4, atol=1e-6)
    assert_frame_equal(layer_table(tight), layer_table(usual), rtol=1e-4, atol=1e-6)
    for one, other in zip(tight, usual, strict=True):
        assert one.row["split_half"] == pytest.approx(other.row["split_half"], abs=1e-6)
        np.testing.assert_array_equal(one.histograms.counts.sum(1), 12 * 16)
        assert one.histograms.counts.shape[0] == other.histograms.counts.shape[0]


def test_groups_of_several_batches_are_joined(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group 0 has the first five sequences in two batches, group 1 the others."""
    module, name = tiny("llama").module, "model.layers.1.mlp.gate_proj"
    measured: list[MeasuredLayer] = []

    def note(one: MeasuredLayer, norms: Tensor | None) -> LayerSummary:
        measured.append(one)
        return summarise(one, norms)

    monkeypatch.setattr(exact, "summarise", note)
    measure(module, [name], calibration.ids, 2**30)
    outputs = reference.inputs_and_outputs(module, [name], calibration.ids)[name][1]
    for half, part in enumerate((outputs[:80], outputs[80:])):
        expected = [reference.wasserstein(y) for y in part.T]
        np.testing.assert_allclose(measured[0].sketch.wd_halves[half], expected, atol=0.02)


def test_work_is_reported_sequence_by_sequence_and_layer_by_layer(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    module = tiny("llama").module
    counts: list[int] = []
    exact.score_exact(
        module, find_layers(module, 1, "mlp"), [(0, calibration.ids[:4]), (1, calibration.ids[4:])],
        n_groups=2, md=False, seed=0, memory=2**20, report=counts.append,
    )  # fmt: skip
    assert counts == [4, 8, 1, 1, 1]


def test_nothing_is_left_after_an_error(
    tmp_path: Path,
    tiny: Tiny,
    calibration: CalibrationSet,
    stores: Stores,
    monkeypatch: pytest.MonkeyPatch,
    count_hooks: Callable[[nn.Module], int],
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(exact, "shape_statistics", fail)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny("llama").module, 1, calibration.ids, 0)
    assert stores.spilled == [True] * 4
    assert list(tmp_path.iterdir()) == []
    assert count_hooks(tiny("llama").module) == 0


def test_no_room_for_the_temporary_file(
    tiny: Tiny, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(Unavailable, match=r"full.*TMPDIR"):
        measure(tiny("llama").module, 1, calibration.ids, 0)


class Toy(nn.Module):
    """An embedding and two linear layers of the same weights; ``run`` says how they are used."""

    def __init__(self, run: Callable[["Toy", Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.table = nn.Embedding(112, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).mul(99).sin().view(p.shape))

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(self, self.table(ids))


def changed_in_place(toy: Toy, x: Tensor) -> Tensor:
    both: Tensor = toy.a(x) + toy.b(x.relu_())
    return both


def changed_twice(toy: Toy, x: Tensor) -> Tensor:
    all_four: Tensor = toy.a(x) + toy.b(x) + toy.a(x.add_(1)) + toy.b(x)
    return all_four


@pytest.mark.parametrize("run", [changed_in_place, changed_twice])
def test_inputs_that_are_written_to_are_told_apart(
    run: Callable[[Toy, Tensor], Tensor], calibration: CalibrationSet
) -> None:
    """Both methods see the values that each layer saw."""
    toy = Toy(run)
    streams = reference.inputs_and_outputs(toy, ["a", "b"], calibration.ids)
    methods: tuple[Method, ...] = ("exact", "sketch")
    for method in methods:
        scores = score(toy, calibration, layers=["a", "b"], method=method)
        for name in ("a", "b"):
            frame, outputs = scores.layer(name).frame, streams[name][1]
            assert (frame["n_tokens"] == len(outputs)).all()
            np.testing.assert_allclose(frame["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(frame["std"], outputs.std(0), rtol=1e-4)


def test_inputs_shared_in_some_runs_only_are_refused(calibration: CalibrationSet) -> None:
    toy = Toy(lambda toy, x: toy.a(toy.a(x) + toy.b(x)))
    with pytest.raises(InvalidInput, match="'b'"):
        score(toy, calibration, layers=["a", "b"], method="exact")
    for name in ("a", "b"):
        outputs = reference.inputs_and_outputs(toy, [name], calibration.ids)[name][1]
        alone = score(toy, calibration, layers=name, method="exact").frame
        together = score(toy, calibration, layers=["a", "b"], method="sketch").layer(name).frame
        np.testing.assert_allclose(alone["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
