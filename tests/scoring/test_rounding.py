"""Outputs that are hardly more than their rounding: within the bound, or flagged."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entangle.models.layers import find_layers
from entangle.results.scores import NeuronScores
from entangle.scoring.finer import FinerOutputs, SharedSquares
from entangle.scoring.layer_scores import COARSE
from entangle.scoring.score import Method, score
from entangle.stats.wasserstein import shape_statistics
from entangle.texts.calibration_set import CalibrationSet
from tests.reference.wasserstein import exact_wd

METHODS: tuple[Method, ...] = ("exact", "sketch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES, TOKENS = 24, 1024
Rows = np.ndarray


class Toy(nn.Module):
    """Token t has row t of a table as the input of one linear layer."""

    def __init__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(inputs.to(dtype))
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
        self.head.weight.data = weight.to(dtype)
        if bias is not None:
            self.head.bias.data = bias.to(dtype)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.table(ids))
        return outputs

    def exactly(self, ids: Tensor) -> Rows:
        """Return the outputs in float64, (tokens, neurons)."""
        outputs = self.table(ids.flatten()).double() @ self.head.weight.double().T
        if self.head.bias is not None:
            outputs = outputs + self.head.bias.double()
        found: Rows = outputs.numpy()
        return found


def scored(toy: Toy, ids: Tensor, method: Method) -> NeuronScores:
    return score(toy, CalibrationSet(ids, "toy", {}), layers="head", method=method, batch_size=2)


def all_tokens(sequences: int = 8) -> Tensor:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    return order.view(sequences, -1)


SHAPES: dict[str, Callable[[np.random.Generator], Rows]] = {
    "normal": lambda rng: rng.standard_normal(TOKENS),
    "skewed": lambda rng: rng.exponential(size=TOKENS),
    "outliers": lambda rng: rng.standard_normal(TOKENS) * np.where(np.arange(TOKENS) < 3, 1e4, 1),
    "atoms": lambda rng: rng.choice([-1.0, 0.25, 3.0], TOKENS),
    "spike": lambda rng: np.where(rng.random(TOKENS) < 0.9, 0.0, rng.standard_normal(TOKENS)),
    "two values": lambda rng: rng.choice([0.0, 1.0], TOKENS),
    "lattice": lambda rng: np.round(2 * rng.standard_normal(TOKENS)),
}
OFFSETS = (0.0, 1.0, 15.0, -150.0, 1e3, 6e4)
SCALES = (1.0, 1e-2, 1e-4)


def hard_toy(dtype: torch.dtype, *, by_bias: bool, unit: float = 1.0) -> Toy:
    """One neuron for each shape, offset and scale; offsets by the bias or by a constant input."""
    rng = np.random.default_rng(0)
    inputs = 0.01 * rng.standard_normal((TOKENS, FEATURES))
    for i, make in enumerate(SHAPES.values()):
        inputs[:, i] = make(rng)
    inputs[:, -1] = 1.0
    kinds = [(i, o, s) for i in range(len(SHAPES)) for o in OFFSETS for s in SCALES]
    weight = 1e-3 * rng.standard_normal((len(kinds), FEATURES))
    weight[:, -1] = 0.0
    for row, (i, _, scale) in enumerate(kinds):
        weight[row] *= scale
        weight[row, i] = scale
    offset = torch.tensor([o for _, o, _ in kinds], dtype=torch.float64) * unit
    weights = torch.from_numpy(weight) * unit
    if not by_bias:
        weights[:, -1] = offset
    return Toy(torch.from_numpy(inputs), weights, offset if by_bias else None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_wd_is_within_its_bound_of_float64(
    dtype: torch.dtype, by_bias: bool, method: Method
) -> None:
    toy, ids = hard_toy(dtype, by_bias=by_bias), all_tokens()
    frame = scored(toy, ids, method).frame
    true = toy.exactly(ids)
    assert set(frame["flag"]) <= {"", "coarse", "constant"}
    known = np.flatnonzero(frame["flag"] == "")
    assert len(known) > len(frame) // 3
    error = np.array([frame["wd"][i] - exact_wd(true[:, i]) for i in known])
    bound = frame["wd_bound"].to_numpy()[known]
    assert (np.abs(error) <= bound).all()
    assert (bound <= COARSE).all()
    unknown = frame[frame["flag"] != ""]
    assert unknown[["wd", "wd_se", "ks", "md"]].isna().all(axis=None)


@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1e15, 1e25])
@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(unit: float, method: Method) -> None:
    ids, plain = all_tokens(), hard_toy(torch.bfloat16, by_bias=True)
    small = hard_toy(torch.bfloat16, by_bias=True, unit=unit)
    one, two = (scored(toy, ids, method).frame for toy in (plain, small))
    true = small.exactly(ids)
    known = np.flatnonzero(two["flag"] == "")
    assert abs(len(known) - (one["flag"] == "").sum()) <= 2
    error = np.array([two["wd"][i] - exact_wd(true[:, i]) for i in known])
    assert (np.abs(error) <= two["wd_bound"][known]).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_of_bfloat16_does_not_hide_the_outputs(method: Method) -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, FEATURES, generator=rng)
    weight = torch.randn(4, FEATURES, generator=rng) / FEATURES**0.5
    toy = Toy(inputs, weight, torch.tensor([0.0, 150.0, -150.0, 250.0]), torch.bfloat16)
    ids = all_tokens()
    frame, true = scored(toy, ids, method).frame, toy.exactly(ids)
    assert (frame["flag"] == "").all()
    assert frame["wd"].to_numpy() == pytest.approx(
        [exact_wd(true[:, i]) for i in range(4)], abs=0.003
    )
    assert (frame["wd_bound"] < 0.03).all()
    assert frame["std"].to_numpy() == pytest.approx(true.std(0), rel=4e-3)
    assert frame["mean"].to_numpy() == pytest.approx(true.mean(0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_one_repeated_token_is_constant(dtype: torch.dtype, method: Method) -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 501, generator=rng).abs()
    toy = Toy(inputs, torch.randn(33, 501, generator=rng), None, dtype)
    ids = torch.zeros(7, 61, dtype=torch.int64)
    frame = scored(toy, ids, method).frame
    assert (frame["flag"] == "constant").all()
    columns = ["wd", "wd_se", "wd_bound", "ks", "std", "skewness", "excess_kurtosis", "md"]
    assert frame[columns].isna().all(axis=None)


@pytest.mark.parametrize("method", METHODS)
def test_one_other_token_is_as_far_from_constant_as_can_be(method: Method) -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 501, generator=rng).abs()
    toy = Toy(inputs, torch.randn(33, 501, generator=rng), None, torch.float32)
    ids = torch.zeros(7, 61, dtype=torch.int64)
    ids[3, 5] = 1
    frame = scored(toy, ids, method).frame
    assert frame["excess_kurtosis"].to_numpy() == pytest.approx(ids.numel() - 4, rel=0.02)
    known = frame["flag"] == ""
    assert known.all() or (method == "sketch" and (frame["flag"][~known] == "coarse").all())
    error = frame["wd"] - exact_wd(np.eye(1, ids.numel())[0])
    assert (error.abs() <= frame["wd_bound"])[known].all()


class Noisy(nn.Module):
    """A layer whose products come in pieces of different sizes, so that they differ by rounding."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(1, 768, generator=rng) + 3)
        self.head = nn.Linear(768, 16, bias=False)
        weight, row = torch.randn(16, 768, generator=rng), self.table.weight[0]
        self.head.weight.data = weight - (weight @ row)[:, None] * row / row.square().sum()
        self.head.register_forward_hook(self._pieces)
        self.requires_grad_(False)

    def _pieces(self, _module: nn.Module, args: tuple[Tensor, ...], _outputs: Tensor) -> Tensor:
        weight, rows = self.head.weight, args[0]
        cuts = (torch.arange(rows.shape[1]) * 37) % 700 + 10
        pieces = [
            rows[:, i, :c] @ weight[:, :c].T + rows[:, i, c:] @ weight[:, c:].T
            for i, c in enumerate(cuts.tolist())
        ]
        return torch.stack(pieces, dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.table(ids))
        return outputs


def test_rounding_noise_of_one_token_is_constant() -> None:
    module, ids = Noisy(), torch.zeros(4, 100, dtype=torch.int64)
    outputs = module(ids).flatten(0, 1).double()
    assert (outputs.std(0) > 4 * torch.finfo(torch.float32).eps * outputs.mean(0).abs()).sum() > 3
    frame = score(module, CalibrationSet(ids, "toy", {}), layers="head", method="sketch").frame
    assert (frame["flag"] == "constant").all()


def test_outputs_that_are_not_products_stay_the_modules_own() -> None:
    class SquaredLinear(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows).square() + 100

    rng = torch.Generator().manual_seed(0)
    toy = Toy(torch.randn(TOKENS, FEATURES, generator=rng), torch.ones(1, 1), None, torch.bfloat16)
    toy.head = SquaredLinear(FEATURES, 8, bias=False, dtype=torch.bfloat16)
    toy.head.weight.data = (torch.randn(8, FEATURES, generator=rng) / 5).bfloat16()
    toy.requires_grad_(False)
    frame = scored(toy, all_tokens(), "sketch").frame
    assert (frame["flag"] == "coarse").all()
    assert (frame["mean"] > 100).all()
    assert (frame["wd_bound"] > COARSE).all()
    assert frame[["skewness", "excess_kurtosis"]].isna().all(axis=None)


def test_differences_that_are_rounding_have_no_mapping_difficulty() -> None:
    inputs = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = torch.arange(TOKENS) % 50 == 0
    inputs[:, -1] = 1.0
    weight = torch.zeros(2, FEATURES)
    weight[0, 0] = weight[1, 1] = 1.0
    weight[0, 1:-1] = 1.5e-6  # differences of most tokens: about 1e-5, at 100 spaced by 8e-6
    weight[0, -1] = 100.0
    toy = Toy(inputs, weight, None, torch.float32)
    outputs = toy(all_tokens()).flatten()[::2]
    assert (outputs[::2] - outputs[1::2]).abs().median() > 0
    frame = scored(toy, all_tokens(), "exact").frame
    assert frame["wd"].notna().all()
    assert frame["md"].isna().tolist() == [True, False]


def test_rounding_of_sums_that_start_with_the_bias() -> None:
    toy = Toy(torch.zeros(2, 16), torch.ones(1, 16), torch.tensor([100.0]), torch.float32)
    counted = FinerOutputs(find_layers(toy, "head")[0], SharedSquares())
    inputs = torch.zeros(1, 2, 16)
    outputs = counted.of(inputs, toy.head(inputs))
    error = counted.error(shape_statistics(torch.tensor([[99.0, 101.0]])), torch.tensor([100.0]))
    assert outputs.tolist() == [[100.0], [100.0]]
    assert error.bound.item() > 16 * 2.0**-24 * 100
