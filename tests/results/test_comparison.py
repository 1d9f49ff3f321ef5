import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import figure_comparison
from entangle.results.comparison import KIND, Comparison, at_equal_nonzeros, load_comparison
from entangle.runs.provenance import make_manifest, write_json
from tests.saved import without_digests


def table(*rows: tuple[str, int, float, float]) -> pd.DataFrame:
    """Method, experts, non-zeros and perplexity of some models, at made-up sparsities."""
    frame = pd.DataFrame(list(rows), columns=["method", "experts", "nonzeros", "perplexity"])
    return frame.assign(sparsity=np.arange(len(frame)) / 10)


PLAIN = (
    ("dense", 1, 1.0, 10.0),
    ("sparsegpt", 1, 0.7, 20.0),
    ("sparsegpt", 1, 0.52, 80.0),
    ("magnitude", 1, 0.7, 1000.0),
)


def test_equal_nonzeros_by_hand() -> None:
    frame = table(
        *PLAIN,
        ("expansion", 2, 0.61, 50.0),
        ("expansion", 4, 0.85, 60.0),
        ("expansion-random", 2, 0.7, 30.0),
    )
    equal = at_equal_nonzeros(frame)
    assert equal["competitor"].tolist() == ["sparsegpt"] * 3
    expected = [math.sqrt(20 * 80), math.sqrt(10 * 20), 20.0]
    assert equal["competitor_perplexity"].tolist() == pytest.approx(expected)
    assert equal["ratio"].tolist() == pytest.approx([50 / 40, 60 / math.sqrt(200), 1.5])
    kept = ["method", "sparsity", "experts", "nonzeros", "perplexity"]
    pd.testing.assert_frame_equal(
        equal[kept], frame.loc[4:, kept].reset_index(drop=True), check_dtype=False
    )


@pytest.mark.parametrize("nonzeros", [1.0, 1.4, 3.25])
def test_an_expansion_as_large_as_dense_competes_with_dense(nonzeros: float) -> None:
    row = at_equal_nonzeros(table(*PLAIN, ("expansion", 16, nonzeros, 25.0))).iloc[0]
    assert row[["competitor", "competitor_perplexity", "ratio"]].tolist() == ["dense", 10.0, 2.5]


def test_nothing_is_extrapolated() -> None:
    rows = at_equal_nonzeros(table(*PLAIN, ("expansion", 2, 0.5199, 90.0), PLAIN[1]))
    assert rows["competitor"].tolist() == ["outside the range"]
    assert rows[["competitor_perplexity", "ratio"]].isna().all(axis=None)


def test_infinite_perplexities_end_the_range_of_the_plain_method() -> None:
    rows = [*PLAIN[:2], ("sparsegpt", 1, 0.52, math.inf), ("expansion", 2, 0.6, 30.0)]
    assert at_equal_nonzeros(table(*rows))["competitor"].tolist() == ["outside the range"]


def test_without_its_plain_method_an_expansion_has_only_dense_to_compete_with() -> None:
    rows = [PLAIN[0], PLAIN[3], ("expansion", 2, 0.8, 30.0), ("expansion", 4, 1.1, 30.0)]
    equal = at_equal_nonzeros(table(*rows))
    assert equal["competitor"].tolist() == ["outside the range", "dense"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    frame = table(*PLAIN, ("expansion", 2, 0.61, 50.0))
    pd.testing.assert_frame_equal(at_equal_nonzeros(frame[::-1]), at_equal_nonzeros(frame))


def test_no_expansion_makes_an_empty_table_of_the_same_columns() -> None:
    empty = at_equal_nonzeros(table(*PLAIN))
    full = at_equal_nonzeros(table(*PLAIN, ("expansion", 2, 0.61, 50.0)))
    assert empty.empty
    assert empty.dtypes.equals(full.dtypes)


def test_tables_that_are_no_comparison_are_refused() -> None:
    frame = table(*PLAIN)
    with pytest.raises(InvalidInput, match="'nonzeros'"):
        at_equal_nonzeros(frame.drop(columns="nonzeros"))
    with pytest.raises(InvalidInput, match=r"`frame`.*dense.*\b0\b"):
        at_equal_nonzeros(frame[1:])
    with pytest.raises(UnknownName, match=r"method.*'mine'"):
        at_equal_nonzeros(table(*PLAIN, ("mine", 2, 0.61, 50.0)))


def test_a_loaded_comparison_is_the_saved_one_and_draws(found: Comparison, tmp_path: Path) -> None:
    loaded = load_comparison(found.save(tmp_path / "c"))
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    pd.testing.assert_frame_equal(loaded.windows, found.windows)
    assert loaded.manifest == found.manifest
    assert len(figure_comparison(loaded.frame).axes) == 2


def test_folders_that_hold_no_comparison_are_refused(found: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="missing'"):
        load_comparison(tmp_path / "missing")
    as_scores = found.save(tmp_path / "other")
    write_json(as_scores / "manifest.json", make_manifest("scores"))
    with pytest.raises(InvalidInput, match=r"'comparison'.*'scores'"):
        load_comparison(as_scores)
    folder = without_digests(found.save(tmp_path / "c"))
    found.frame.drop(columns="ratio").to_parquet(folder / "comparison.parquet")
    with pytest.raises(InvalidInput, match="'ratio'"):
        load_comparison(folder)
    (folder / "comparison.parquet").write_bytes(b"no table")
    with pytest.raises(InvalidInput, match=r"comparison\.parquet.*read"):
        load_comparison(folder)


def test_only_the_seconds_are_kept_apart(found: Comparison, tmp_path: Path) -> None:
    slower = found.frame.assign(seconds=found.frame["seconds"] + 1)
    first = found.save(tmp_path / "a")
    second = Comparison(slower, found.windows, found.manifest).save(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == [
        "comparison.parquet", "equal_nonzeros.parquet", "manifest.json", "seconds.parquet",
        "windows.parquet",
    ]  # fmt: skip
    same = [(first / name).read_bytes() == (second / name).read_bytes() for name in names]
    assert same == [True, True, False, False, True]  # the manifest has the digest of the seconds
    assert load_comparison(second).frame["seconds"].equals(slower["seconds"])


def test_tables_without_allocations_are_uniform(found: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    frame = found.frame.drop(columns="allocation")  # with its seconds
    frame.to_parquet(folder / "comparison.parquet")
    found.windows.drop(columns="allocation").to_parquet(folder / "windows.parquet")
    write_json(folder / "manifest.json", make_manifest(KIND))
    loaded = load_comparison(folder)
    assert loaded.frame["seconds"].equals(found.frame["seconds"])
    assert set(loaded.frame["allocation"]) == set(loaded.windows["allocation"]) == {"uniform"}
