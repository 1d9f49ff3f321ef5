from collections.abc import Callable

import pytest
import torch

from entangle.evaluation import EvaluationText, perplexity
from entangle.experts import build
from entangle.experts.expand import expand
from entangle.models.blocks import BlockRunner
from entangle.models.loading import LanguageModel
from entangle.recording.states import HiddenStates, _joined, _most_tokens
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY


def test_batches_are_joined_in_order_and_within_the_limit() -> None:
    ids = torch.arange(70).view(10, 7)
    joined = _joined(ids.split(3), 42)
    assert [tuple(part.shape) for part in joined] == [(6, 7), (4, 7)]
    assert torch.equal(torch.cat(joined), ids)


def test_other_lengths_are_not_joined() -> None:
    batches = [torch.zeros(1, 4), torch.zeros(1, 5), torch.zeros(2, 5), torch.zeros(9, 5)]
    assert [tuple(part.shape) for part in _joined(batches, 20)] == [(1, 4), (3, 5), (9, 5)]


def test_a_pass_is_smaller_where_layers_are_wide() -> None:
    assert _most_tokens(576) == _most_tokens(4096) == 2**15
    assert _most_tokens(11008) == 2**27 // 11008 == 12192
    assert _most_tokens(2**30) == 1
    batches = torch.zeros(7, 5, dtype=torch.int64).split(2)
    assert HiddenStates(batches, memory=0).pass_tokens == [10, 10, 10, 5]


@pytest.mark.parametrize(
    ("name", "widest"), [("llama", 48), ("phi3", 96), ("gpt2", 96), ("gpt_neox", 96)]
)
def test_the_widest_layer_counts_its_inputs_and_outputs(name: str, widest: int) -> None:
    """48 is the width of the MLPs; 96 that of fused gate and up, or of query, key and value."""
    assert BlockRunner(TINY[name]()).widest == widest


def test_calibration_tokens_go_no_further_than_the_last_expanded_block(
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed: list[tuple[int, int]] = []
    whole = BlockRunner.run

    def noted(self: BlockRunner, index: int, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        passed.append((index, hidden.shape[0] * hidden.shape[1]))
        return whole(self, index, hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockRunner, "run", noted)
    model = tiny("llama")
    one = expand(
        model, calibration, experts=3, sparsity=0.5, restarts=2, layers=[0], evaluation=text,
        keep=False, progress=False,
    )  # fmt: skip
    probe = 4  # tokens, to see which layers run
    tokens = [sum(n for i, n in passed if i == block and n > probe) for block in range(3)]
    assert tokens == [calibration.ids.numel() + text.windows.numel()] + 2 * [text.windows.numel()]
    monkeypatch.undo()
    same = expand(
        model, calibration, experts=3, sparsity=0.5, restarts=2, layers=[0], evaluation=text,
        progress=False,
    )  # fmt: skip
    assert same.model is not None
    assert one.perplexity is not None
    assert one.perplexity.value == pytest.approx(perplexity(same.model, text).value, rel=1e-5)


def test_calibration_states_are_let_go_before_the_last_blocks_experts_are_solved(
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = list[str]()
    close, solve = HiddenStates.close, build._expand_group

    def closed(self: HiddenStates) -> None:
        events.append("closed")
        close(self)

    def solved(*args: object) -> object:
        events.append("solved")
        return solve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(HiddenStates, "close", closed)
    monkeypatch.setattr(build, "_expand_group", solved)
    expand(
        tiny("llama"), calibration, experts=2, sparsity=0.5, restarts=1, layers=[0, 1],
        evaluation=text, progress=False,
    )  # fmt: skip
    groups = 2  # of a block: gate and up, down
    assert events == ["solved"] * groups + ["closed"] + ["solved"] * groups
