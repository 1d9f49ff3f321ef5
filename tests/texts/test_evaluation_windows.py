"""`Cut`: windows end to end, and sizes that do not fit."""

from typing import Any

import pytest
import torch

from entangle.errors import InvalidInput
from entangle.texts.evaluation import Cut


def _cut(**options: Any) -> Cut:
    return Cut(**{"seq_len": None, "n_windows": None, "context_length": None, **options})


def test_running_text_by_hand() -> None:
    got = _cut(seq_len=3).running_text(torch.arange(11), where="x")
    assert got.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    got = _cut(seq_len=3, n_windows=2).running_text(torch.arange(11), where="x")
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]
    got = _cut(seq_len=4, n_windows=2).running_text(torch.arange(6), where="x", around=([9], []))
    assert got.tolist() == [[9, 0, 1, 2], [9, 3, 4, 5]]


def test_rows_by_hand() -> None:
    table = torch.arange(12).view(3, 4)
    got, mask, left_out = _cut().rows(table, where="x")
    assert (mask, left_out) == (None, 0)
    assert torch.equal(got, table)
    got[0, 0] = 99
    assert table[0, 0] == 0
    assert _cut(seq_len=2, n_windows=1).rows(table, where="x")[0].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, 2048),
        ({"context_length": 128}, 128),
        ({"context_length": 4096}, 2048),
        ({"seq_len": 64, "context_length": 128}, 64),
        ({"seq_len": 128, "context_length": 128}, 128),
    ],
)
def test_length_of_a_window(options: dict[str, int], window: int) -> None:
    assert _cut(**options).window == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "`seq_len` must be an integer of at least 2; got 1."),
        ({"n_windows": 0}, "`n_windows` must be an integer of at least 1; got 0."),
        ({"n_windows": True}, "`n_windows` must be an integer of at least 1; got True."),
        (
            {"seq_len": 129, "context_length": 128},
            "`seq_len` must be at most the model's context, 128; got 129.",
        ),
    ],
)
def test_sizes_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        _cut(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "before", "after", "message"),
    [
        ({"seq_len": 8}, (), (), r"\b8\b.*seq_len.*\b7\b"),
        ({"seq_len": 9}, (1,), (), r"\b8\b.*seq_len.*\b8\b"),
        ({"seq_len": 2}, (1,), (2,), r"seq_len.*\b2\b.*\b2\b"),
        ({"seq_len": 3, "n_windows": 3}, (), (), r"\b2\b.*'x'.*\b3\b"),
    ],
)
def test_text_too_short(
    options: dict[str, int], before: tuple[int, ...], after: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        _cut(**options).running_text(torch.arange(7), where="'x'", around=(before, after))


def test_no_text_has_no_size_that_fits() -> None:
    with pytest.raises(InvalidInput, match=r"'x'.*\b0\b.*\b8\b"):
        _cut(seq_len=8).running_text(torch.arange(0), where="'x'")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 4), {"seq_len": 5}, r"\b4\b.*'x'.*\b5\b"),
        ((2, 4), {"n_windows": 3}, r"\b2\b.*'x'.*\b3\b"),
        ((2, 4), {"context_length": 3}, r"seq_len.*context.*\b3\b.*\b4\b"),
        ((2, 1), {}, r"seq_len.*\b2\b.*\b1\b"),
    ],
)
def test_rows_that_do_not_fit(
    shape: tuple[int, int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        _cut(**options).rows(torch.zeros(shape, dtype=torch.int64), where="'x'")
