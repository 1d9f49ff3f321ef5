"""What rounding can do to a WD: against float64, by hand, its properties, its edges."""

import math

import numpy as np
import pytest
import torch

from entangle.stats.wasserstein import (
    MOST,
    FeatureSizes,
    feature_squares,
    judge_products,
    judged,
    output_error,
    reach,
    shape_statistics,
    wd_error,
)
from tests.reference.wasserstein import exact_wd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.5, 0.9, 1.5, 10.0])
@pytest.mark.parametrize("kind", ["normal", "atoms", "outlier", "opposite"])
def test_no_error_changes_a_wd_by_more_than_its_bound(size: float, kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = rng.standard_normal(200) + rng.choice([0.0, 3.0], 200)
        made = {
            "normal": rng.standard_normal(200),
            "atoms": rng.choice([-1.0, 1.0], 200),
            "outlier": np.eye(1, 200, int(rng.integers(200)))[0],
            "opposite": -y,
        }[kind]
        error = size * made / np.sqrt(np.mean(made**2))
        moved = y + error
        bound = float(wd_error(tensor(size), tensor(float(moved.std()))))
        assert abs(exact_wd(moved) - exact_wd(y)) <= bound <= MOST


def test_bound_by_hand() -> None:
    found = wd_error(tensor(0, 0.1, 1, 1, 1, math.inf, 1), tensor(1, 1, 1, 0.75, 0.5, 1, math.nan))
    expected = [0, 0.2 / 1.9, 2, 2, 2, 2, math.nan]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_error_of_outputs_by_hand() -> None:
    single, half = 2.0**-24, 2.0**-8
    found = output_error(
        tensor(3, -103), tensor(4, 4), tensor(2, -2), reach=tensor(10, 0), in_features=64,
        dtype=torch.bfloat16, bias=tensor(0, -100),
    )  # fmt: skip
    rounded = [half * (5 + 5), half * (math.hypot(103, 4) + 5)]
    assert found.bound.tolist() == pytest.approx([34 * single * 10 + rounded[0], rounded[1]])
    assert found.typical.tolist() == pytest.approx([2 * single * 10 + half * 2, half * 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 5, 300, 3000])
@pytest.mark.parametrize("kind", ["signed", "positive", "tiny", "outlier"])
def test_linear_layers_stay_within_the_error(dtype: torch.dtype, features: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(features)
    x, w = (torch.randn(n, features, generator=rng) for n in (150, 20))
    if kind == "positive":
        x, w = x.abs() + 0.5, w.abs()
    if kind == "tiny":
        w *= 1e-7
    if kind == "outlier":
        x[0] *= 1000
        x[:, 0] *= 20
    x, w = x.to(dtype), w.to(dtype)
    b = torch.randn(20, generator=rng).mul(10).to(dtype)
    for bias in (None, b):
        y = torch.nn.functional.linear(x, w, bias).double()
        true = x.double() @ w.double().T + (0 if bias is None else bias.double())
        start = torch.zeros(20) if bias is None else bias.double().abs()
        error = output_error(
            y.mean(0), y.std(0, correction=0), y.median(0).values,
            reach=reach(w, FeatureSizes.of([x]).rms()) + start, in_features=features, dtype=dtype,
            bias=None if bias is None else bias.double(),
        )  # fmt: skip
        assert ((y - true).square().mean(0).sqrt() <= error.bound).all()


def test_reach_is_no_less_than_the_sums_of_magnitudes() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(70, 9, generator=rng).exp(), torch.randn(5, 9, generator=rng)
    sums = (x.double() @ w.double().abs().T).square().mean(0).sqrt()
    sets = torch.stack([FeatureSizes.of(x.split(n)).rms() for n in (70, 8)])
    found = reach(w, sets)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0], reach(w, sets[0]), rtol=1e-6, atol=0)
    assert (found[0] >= sums).all()
    assert (found[0] < 2 * sums).all()
    constant = reach(w, FeatureSizes.of([torch.full((3, 9), -2.0)]).rms())
    torch.testing.assert_close(constant, 2 * w.abs().sum(1).double(), rtol=1e-6, atol=0)


def test_squares_beyond_and_below_float32() -> None:
    rows = torch.tensor([[3e30, 3e-25, 0.0], [4e30, 4e-25, 0.0]])
    assert feature_squares(rows)[0].item() == pytest.approx(25e60)
    sizes = FeatureSizes.of([rows]).rms()
    assert sizes[1:].tolist() == [1e-22, 1e-22]  # no less than what was lost
    assert feature_squares(torch.tensor([[math.nan, 1.0]]))[0].isnan()


def test_judged_constant_by_rounding() -> None:
    shape = shape_statistics(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [math.nan, 0.0]]))
    found = judged(shape, tensor(0.49, 0.5, math.inf, 1))
    assert found.constant.tolist() == [False, True, False, False]
    assert found.nan.tolist() == [False, False, False, True]
    assert found.wd.isnan().tolist() == [False, True, False, True]
    assert found.mean.isnan().tolist() == [False, True, False, True]
    assert shape.constant.tolist() == [False] * 4


def test_products_are_judged_by_their_own_tokens() -> None:
    weight, sizes = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1e5, 1e5]])
    judge = judge_products(weight, torch.zeros(1), sizes)
    shape = shape_statistics(torch.tensor([[0.0, 1e-3]]))
    assert [judge(i, shape).constant.tolist() for i in range(2)] == [[False], [True]]
