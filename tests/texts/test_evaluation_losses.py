"""`window_losses` against a loop in float64, by hand, in parts, and on broken logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.seeding import torch_rng
from entangle.texts import evaluation
from entangle.texts.evaluation import losses_in_parts, window_losses
from tests.reference import perplexity as reference


def _case(windows: int, tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch_rng(0, "losses", windows, tokens, vocabulary)
    logits = 4 * torch.randn(windows, tokens, vocabulary, generator=rng)
    return logits, torch.randint(vocabulary, (windows, tokens), generator=rng)


@given(windows=st.integers(1, 4), tokens=st.integers(2, 9), vocabulary=st.integers(1, 30))
def test_against_the_reference(windows: int, tokens: int, vocabulary: int) -> None:
    logits, ids = _case(windows, tokens, vocabulary)
    got = window_losses(logits, ids)
    expected = [reference.window_loss(a, b) for a, b in zip(logits, ids.tolist(), strict=True)]
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_uniform_logits_by_hand() -> None:
    got = window_losses(torch.full((2, 5, 16), 3.0), torch.zeros(2, 5, dtype=torch.int64))
    assert got.tolist() == pytest.approx([4 * math.log(16)] * 2, rel=1e-6)


def test_two_tokens_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, -5.0]]])  # 1/4 and 3/4; the last is unused
    assert window_losses(logits, torch.tensor([[0, 1]])).item() == pytest.approx(math.log(4 / 3))
    assert window_losses(logits, torch.tensor([[1, 0]])).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    logits, ids = _case(2, 6, 50)
    got = window_losses(logits.to(dtype), ids)
    assert torch.equal(got, window_losses(logits.to(dtype).float(), ids))


def test_parts_and_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = _case(3, 11, 7)
    whole = window_losses(logits, ids)
    alone = [window_losses(logits[i : i + 1], ids[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), whole)
    shapes = []
    original = torch.nn.functional.cross_entropy

    def spy(part: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        shapes.append(tuple(part.shape))
        return original(part, target, reduction=reduction)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 4 * 7)
    assert torch.equal(window_losses(logits, ids), whole)
    assert shapes == [(4, 7), (4, 7), (2, 7)] * 3


def test_arguments_stay_as_they_are() -> None:
    logits, ids = _case(2, 6, 9)
    before = logits.clone(), ids.clone()
    window_losses(logits, ids)
    assert torch.equal(logits, before[0])
    assert torch.equal(ids, before[1])


@pytest.mark.parametrize(
    ("value", "expected"), [(math.nan, math.nan), (-math.inf, math.inf), (math.inf, math.nan)]
)
def test_a_broken_logit_spoils_its_window_only(value: float, expected: float) -> None:
    logits, ids = _case(3, 6, 9)
    clean = window_losses(logits, ids)
    logits[1, 2, ids[1, 3]] = value
    got = window_losses(logits, ids)
    assert got[1].item() == pytest.approx(expected, nan_ok=True)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    logits[1, 2] = 0.0
    logits[:, -1] = math.nan  # predicts a token that is not there
    assert window_losses(logits, ids).isfinite().all()


@pytest.mark.parametrize("bad", [-100, -1, 9])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    logits, ids = _case(1, 6, 9)
    ids[0, 2] = bad
    with pytest.raises(InvalidInput, match=rf"\[0, 9\).*{bad}"):
        window_losses(logits, ids)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1)])
def test_nothing_to_predict(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"`ids`.*\b1\b.*\b2\b"):
        window_losses(torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("around", [(0, 0), (1, 0), (3, 2)])
@pytest.mark.parametrize("sizes", [[11], [1, 10], [4, 4, 3], [2, 1, 1, 7], [1] * 11])
def test_parts_of_the_tokens_change_no_bit(sizes: list[int], around: tuple[int, int]) -> None:
    logits, ids = _case(3, 11, 7)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = zip(starts, logits.split(sizes, 1), strict=True)
    whole = window_losses(logits, ids, around=around)
    assert torch.equal(losses_in_parts(parts, ids, around=around), whole)


def test_each_part_must_have_logits_of_all_tokens() -> None:
    logits, ids = _case(1, 4, 7)
    ids[0, 1] = 6
    with pytest.raises(InvalidInput, match=r"\[0, 6\)"):
        losses_in_parts([(0, logits[:, :2]), (2, logits[:, 2:, :6])], ids)
