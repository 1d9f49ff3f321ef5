import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.predictors import PREDICTORS, partial_spearman, predictor_table
from entangle.stats.intervals import spearman_interval

Floats = NDArray[np.float64]


def frame_of(sizes: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """Scores in which the target follows wd, in units that differ from layer to layer."""
    rng = np.random.default_rng(seed)
    parts = []
    for i, (layer, n) in enumerate(sizes.items()):
        wd = rng.gamma(2.0, size=n)
        columns = {
            "wd": wd,
            "md": wd + rng.normal(size=n),
            "skewness": rng.normal(size=n),
            "std": rng.gamma(3.0, size=n),
            "weight_norm": rng.gamma(3.0, size=n),
            "ri": 10.0**i * (5.0 * i + wd + rng.normal(size=n)),
        }
        parts.append(pd.DataFrame({"layer": layer, "neuron": np.arange(n), "flag": "", **columns}))
    return pd.concat(parts, ignore_index=True)


def of(found: pd.DataFrame, scope: str, predictor: str) -> pd.DataFrame:
    return found[(found["scope"] == scope) & (found["predictor"] == predictor)]


def test_every_layer_agrees_with_scipy() -> None:
    frame = frame_of({"b": 40, "a": 25})
    found = predictor_table(frame, "ri", predictors=["md", "variance", "abs_skewness"], n_boot=50)
    frame["variance"], frame["abs_skewness"] = frame["std"] ** 2, frame["skewness"].abs()
    rows = found[found["scope"] == "layer"]
    assert rows["layer"].tolist() == ["b"] * 3 + ["a"] * 3
    assert rows["predictor"].tolist() == ["md", "variance", "abs_skewness"] * 2
    for row in rows.itertuples():
        part = frame[frame["layer"] == row.layer]
        x, y = part[row.predictor].to_numpy(), part["ri"].to_numpy()
        interval = spearman_interval(x, y, n_boot=50)
        assert (row.n, row.n_layers, row.target) == (len(part), 1, "ri")
        assert row.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
        assert (row.spearman_low, row.spearman_high) == (interval.low, interval.high)
        assert row.r2 == pytest.approx(stats.linregress(x, y).rvalue ** 2)
        assert row.pearson == pytest.approx(stats.linregress(x, y).rvalue)


def test_pearson_lies_in_its_interval() -> None:
    found = predictor_table(frame_of({"a": 40, "b": 50}), "ri", n_boot=100)
    low, value, high = (found[f"pearson{end}"].dropna() for end in ("_low", "", "_high"))
    assert len(value) == len(low) == len(high)
    assert (low <= value).all()
    assert (value <= high).all()
    assert (found["r2"].dropna().to_numpy() >= 0.0).all()


def test_the_mean_of_layers_has_students_interval() -> None:
    found = predictor_table(frame_of({"a": 20, "b": 30, "c": 40}), "ri", level=0.9, n_boot=5)
    assert found.columns.tolist() == [
        "scope", "layer", "predictor", "target", "n", "n_layers", "spearman", "spearman_low",
        "spearman_high", "pearson", "pearson_low", "pearson_high", "r2",
    ]  # fmt: skip
    for name in ("wd", "md", "abs_skewness", "variance", "weight_norm"):
        own = found[found["predictor"] == name].set_index("scope")
        single, mean = own.loc["layer"], own.loc["mean of layers"]
        rho = single["spearman"].to_numpy()
        low, high = stats.t.interval(0.9, 2, rho.mean(), stats.sem(rho))
        assert mean["spearman"] == pytest.approx(rho.mean())
        assert (mean["spearman_low"], mean["spearman_high"]) == pytest.approx(
            (max(low, -1.0), min(high, 1.0))
        )
        assert (mean["n"], mean["n_layers"], mean["layer"]) == (90, 3, "")
        assert mean["r2"] == pytest.approx(single["r2"].mean())
        assert mean["pearson"] == pytest.approx(single["pearson"].mean())


def test_pooled_ranks_by_hand() -> None:
    # ranks inside layers, of both: a: 1 2 3 and 1 3 2; b: 1 2 3 and 2 1 3 (less ½, over 3)
    frame = pd.DataFrame(
        {
            "layer": list("aaabbb"),
            "neuron": [0, 1, 2] * 2,
            "wd": [1.0, 2, 3, 100, 200, 300],
            "ri": [1.0, 30, 2, 0.2, 0.1, 0.3],
        }
    )
    pooled = predictor_table(frame, "ri", n_boot=20).set_index("scope").loc["pooled ranks"]
    ranks = [1, 2, 3, 1, 2, 3], [1, 3, 2, 2, 1, 3]
    assert pooled["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert pooled["spearman"] == pytest.approx(0.5)
    z = [frame.groupby("layer")[c].transform(lambda v: stats.zscore(v)) for c in ("wd", "ri")]
    assert pooled["r2"] == pytest.approx(np.mean(z[0] * z[1]) ** 2)
    assert (pooled["n"], pooled["n_layers"]) == (6, 2)


def test_pooled_coefficients_do_not_see_the_units_of_layers() -> None:
    frame = frame_of({"a": 60, "b": 60, "c": 60})
    scaled = frame.assign(ri=frame["ri"] * frame["layer"].map({"a": 1.0, "b": 1e3, "c": 1e6}) + 7)
    one, other = (predictor_table(f, "ri", n_boot=20) for f in (frame, scaled))
    pd.testing.assert_frame_equal(one, other)
    raw = frame["wd"].corr(frame["ri"])
    pooled = one[(one["scope"] == "pooled ranks") & (one["predictor"] == "wd")]
    assert pooled["r2"].item() > raw**2 + 0.1


def test_partial_columns() -> None:
    frame = frame_of({"a": 40, "b": 30}).assign(variance=lambda f: f["std"] ** 2)
    found = predictor_table(
        frame, "ri", predictors=["wd", "variance"], given=["variance", "weight_norm"], n_boot=20
    )
    single = of(found, "layer", "wd")
    for row in single.itertuples():
        part = frame[frame["layer"] == row.layer]
        expected = partial_spearman(
            part["wd"].to_numpy(), part["ri"].to_numpy(),
            part[["variance", "weight_norm"]].to_numpy(), n_boot=20,
        )  # fmt: skip
        assert (row.partial, row.partial_low, row.partial_high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )
    ranks = frame.groupby("layer")[["wd", "ri", "variance", "weight_norm"]].rank(pct=True)
    ranks -= 0.5 / frame.groupby("layer")["wd"].transform("count").to_numpy()[:, None]
    table = ranks.to_numpy()
    expected = partial_spearman(table[:, 0], table[:, 1], table[:, 2:], n_boot=20)
    pooled = of(found, "pooled ranks", "wd")
    assert pooled["partial"].item() == pytest.approx(expected.value)
    assert pooled["partial_high"].item() == pytest.approx(expected.high)
    mean = of(found, "mean of layers", "wd")["partial"].item()
    assert mean == pytest.approx(single["partial"].mean())
    assert found.loc[found["predictor"] == "variance", "partial"].isna().all()


def test_default_predictors_are_those_that_there_are() -> None:
    frame = frame_of({"a": 10})
    found = predictor_table(frame, "md", n_boot=5)
    assert found["predictor"].unique().tolist() == ["wd", "abs_skewness", "variance", "weight_norm"]
    frame = frame.assign(
        excess_kurtosis=1.0, ks=frame["wd"], mean=-frame["wd"], gmm_components=[1, 2] * 5
    )
    everything = predictor_table(frame, "ri", n_boot=5)
    assert everything["predictor"].unique().tolist() == list(PREDICTORS)
    kurtosis = everything[everything["predictor"] == "excess_kurtosis"]
    assert kurtosis[["spearman", "r2"]].isna().all(axis=None)
    assert kurtosis["n_layers"].tolist() == [1, 0, 1]


def test_flags_and_missing_values_are_left_out() -> None:
    frame = frame_of({"a": 12, "b": 12})
    spoilt = frame.copy()
    spoilt.loc[3, "flag"] = "constant"
    spoilt.loc[3, ["ri", "weight_norm"]] = 1e9
    spoilt.loc[5, "md"] = np.nan
    spoilt.loc[6, "ri"] = np.inf
    found = predictor_table(spoilt, "ri", n_boot=10).set_index(["scope", "layer", "predictor"])
    for predictor, rows in {"wd": [3, 6], "md": [3, 5, 6]}.items():
        kept = frame.drop(index=rows)
        expected = predictor_table(kept, "ri", predictors=[predictor], n_boot=10)
        own = found.xs(predictor, level="predictor", drop_level=False).reset_index()
        pd.testing.assert_frame_equal(own[expected.columns.tolist()], expected)


def test_layers_too_small_for_a_coefficient() -> None:
    frame = frame_of({"a": 2, "b": 1, "c": 9})
    found = predictor_table(frame, "ri", predictors=["wd"], given=["std"], n_boot=10)
    single, mean, pooled = (found[found["scope"] == s] for s in found["scope"].unique())
    assert single["n"].tolist() == [2, 1, 9]
    assert single["spearman"].notna().tolist() == [False, False, True]
    assert mean["spearman"].item() == single["spearman"].iloc[2]
    assert np.isnan(mean["spearman_low"].item())
    assert (mean["n"].item(), mean["n_layers"].item()) == (9, 1)
    assert (pooled["n"].item(), pooled["n_layers"].item()) == (12, 3)
    nothing = predictor_table(frame.assign(md=np.nan), "ri", predictors=["md"], n_boot=10)
    assert nothing["n"].tolist() == [0, 0, 0, 0, 0]
    assert nothing["spearman"].isna().all()


def test_row_order_and_seed() -> None:
    frame = frame_of({"a": 30})
    one = predictor_table(frame, "ri", n_boot=20, seed=1)
    pd.testing.assert_frame_equal(one, predictor_table(frame, "ri", n_boot=20, seed=1))
    two = predictor_table(frame, "ri", n_boot=20, seed=2)
    assert not one["spearman_low"].equals(two["spearman_low"])
    mixed = predictor_table(frame.sample(frac=1.0, random_state=0), "ri", n_boot=20)
    np.testing.assert_allclose(mixed["spearman"], one["spearman"])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"target": "rj"}, "unknown.*'rj'"),
        ({}, {"predictors": ["wd", "wc"]}, "unknown.*'wc'"),
        ({}, {"given": ["wc"]}, "unknown.*'wc'"),
        ({}, {"predictors": []}, "at least one column"),
        ({}, {"predictors": ["wd", "ri"]}, "`given`.*'ri'"),
        ({}, {"given": ["ri"]}, "`given`.*'ri'"),
        ({}, {"n_boot": 0}, r"`n_boot`.*\b1\b.*\b0\b"),
        ({}, {"level": 1.5}, r"`level`.*\b1\.5\b"),
        ({}, {"seed": -1}, r"`seed`.*-1\b"),
        ({"neuron": 0}, {}, r"once.*\b0\b.*'a'"),
        ({"flag": "nan"}, {}, r"flag.*\b9\b"),
    ],
)
def test_bad_questions(change: dict[str, object], options: dict[str, object], says: str) -> None:
    given = {"target": "ri", **options}
    with pytest.raises(InvalidInput, match=says) as raised:
        predictor_table(frame_of({"a": 9}).assign(**change), **given)  # type: ignore[arg-type]
    assert isinstance(raised.value, UnknownName) == says.startswith("unknown")


def test_missing_columns_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"column.*'layer'"):
        predictor_table(frame_of({"a": 9}).drop(columns="layer"), "ri")
