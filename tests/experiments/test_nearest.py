import numpy as np
import pytest
from numpy.typing import NDArray

from entangle.experiments.selection import select, select_listed
from tests.experiments.frames import as_lists, frame_of


@pytest.mark.parametrize(
    ("rule", "column"), [("random-norm", "weight_norm"), ("random-variance", "std")]
)
def test_a_matched_draw_resembles_the_rows_it_stands_for(rule: str, column: str) -> None:
    frame = frame_of({}, (400, 300))
    frame["wd"] = frame[column]  # the top ones are the hardest to match
    top = select(frame, "top", fraction=0.05)
    drawn = [select(frame, rule, like=top, seed=seed) for seed in range(3)]
    plain = select(frame, "random", fraction=0.05)
    values = frame.set_index(["layer", "neuron"])[column]
    for one in drawn:
        assert one.describe()["layers"] == top.describe()["layers"]
        for name, rows in one.rows.items():
            assert not set(rows) & set(top.rows[name])
            far = np.log(values[name][plain.rows[name]]).median()
            near, wanted = (np.log(values[name][r]).median() for r in (rows, top.rows[name]))
            assert abs(near - wanted) < abs(far - wanted) / 2
    assert as_lists(drawn[0]) != as_lists(drawn[1])
    assert as_lists(drawn[0]) == as_lists(select(frame, rule, like=top, seed=0))


def nearest_unused(like: float, values: NDArray[np.float64], taken: set[int], n: int) -> set[int]:
    free = sorted((abs(np.log(v / like)), i) for i, v in enumerate(values) if i not in taken)
    return {i for _, i in free[:n]}


def test_a_single_row_is_matched_by_one_of_its_five_nearest() -> None:
    frame = frame_of({}, (50,))
    values = frame["weight_norm"].to_numpy()
    for row in (int(values.argmin()), 7, int(values.argmax())):
        top, near = (
            select_listed({"l0": [row]}, frame),
            nearest_unused(values[row], values, {row}, 5),
        )
        drawn = {
            int(select(frame, "random-norm", like=top, seed=seed).rows["l0"][0])
            for seed in range(60)
        }
        assert drawn == near


def test_the_match_is_reported() -> None:
    frame = frame_of({"weight_norm": [1.0, 2.0, 8.0, 0.0, 4.0, 1.0], "std": [1.0, 3.0] + [2.0] * 4})
    frame.loc[[3, 4, 5], "flag"] = ["", "nan", "constant"]
    like = select_listed({"l0": [1]}, frame.iloc[[1, 2]])
    match = select(frame.iloc[[1, 2]], "random-norm", like=like).likeness
    assert match is not None
    assert match.keys() == {"median_abs_log_ratio", "max_abs_log_ratio", "median_log_ratio"}
    assert list(match.values()) == pytest.approx([np.log(4)] * 3)
    for seed in range(20):  # rows 3 (a norm of 0), 4 and 5 (flagged) are never drawn
        drawn = select(frame, "random-norm", like=select_listed({"l0": [1]}, frame), seed=seed)
        assert drawn.rows["l0"][0] in (0, 2)
    variance = select(frame.iloc[[0, 1]], "random-variance", like=like)
    assert variance.likeness is not None
    assert variance.likeness["median_log_ratio"] == pytest.approx(-np.log(9))


def test_all_rows_can_be_drawn_when_half_are_matched() -> None:
    frame = frame_of({}, (40,))
    top = select(frame, "top", count=20)
    other = select(frame, "random-norm", like=top)
    assert sorted([*top.rows["l0"], *other.rows["l0"]]) == list(range(40))
