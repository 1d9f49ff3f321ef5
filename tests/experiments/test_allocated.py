"""An ablation by an allocation: all rows as it says, beside the same zeros spread evenly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.allocation.allocation import even
from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import EvaluationText, load_evaluation, perplexity
from entangle.experiments.ablate import ablate
from entangle.experiments.arms import plan_allocated
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.results.ablation import AblationResult, load_ablation
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.samples import made, random_allocation
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (5, 12), generator=torch_rng(1, "evaluation tokens"))
    return load_evaluation(ids)


def run(model: LanguageModel, calibration: CalibrationSet, **settings: Any) -> AblationResult:
    chosen = {"allocation": random_allocation(model), "md": False, "progress": False}
    return ablate(model, calibration, **{**chosen, **settings})


@pytest.mark.parametrize("group", [None, 4])
def test_both_arms_are_pruned_row_by_row(
    group: int | None, tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    """And with an allocation for n:m, each row in groups."""
    model = tiny("llama")
    allocation = random_allocation(model, group=group)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    found = run(
        model, calibration, evaluation=text, interventions=("prune", "prune-magnitude"),
        allocation=allocation,
    )  # fmt: skip
    frame = found.frame[found.frame["measure"] == "perplexity"]
    keys = frame[["intervention", "selection", "by"]].to_numpy().tolist()
    assert keys == [
        ["dense", "dense", ""],
        ["prune", "all", ""], ["prune", "allocation", "drawn"],
        ["prune-magnitude", "all", ""], ["prune-magnitude", "allocation", "drawn"],
    ]  # fmt: skip
    assert frame["n_rows"].tolist()[1:] == [sum(map(len, allocation.zeros.values()))] * 4
    for selection, level in (("all", even(allocation)), ("allocation", allocation)):
        rows = torch.cat(list(level.sparsity.values()))
        own = frame[frame["selection"] == selection]
        assert own["realised_sparsity"].tolist() == pytest.approx([float(rows.mean())] * 2)
        assert own["realised_low"].tolist() == pytest.approx([float(rows.min())] * 2)
        copied = as_language_model(TINY["llama"]())
        for layer in find_layers(copied.module, "all", "mlp"):
            share = level.zeros[layer.name] / layer.in_features
            solved = prune(layer.weight, method="magnitude", sparsity=share, pattern=level.pattern)
            with torch.no_grad():
                layer.weight.copy_(solved.weight)
            groups = (layer.weight == 0).unflatten(1, (-1, group or layer.in_features)).sum(2)
            each = level.zeros[layer.name] // groups.shape[1]
            assert torch.equal(groups, each[:, None].expand_as(groups))
            assert torch.equal(groups.sum(1), level.zeros[layer.name])
        value = own.set_index("intervention").loc["prune-magnitude", "value"]
        assert value == pytest.approx(perplexity(copied, text).value, rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_the_allocation_is_compared_with_the_even_spread(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path
) -> None:
    found = run(tiny("llama"), calibration, evaluation=text, out=tmp_path / "x")
    values = found.summary("perplexity").set_index("selection")["value"]
    (row,) = found.contrasts().to_dict("records")
    assert (row["by"], row["against"]) == ("drawn", "all")
    assert row["ratio"] == pytest.approx(values["allocation"] / values["all"])
    assert row["low"] <= row["ratio"] <= row["high"]
    loaded = load_ablation(tmp_path / "x")
    assert loaded.frame.equals(found.frame)
    settings = loaded.manifest["settings"]
    assert isinstance(settings, dict)
    assert settings["selections"] == ["all", "allocation"]
    assert settings["allocation"]["settings"]["rule"] == "drawn"


def test_another_allocation_does_not_resume_the_first(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from entangle.experiments.experiment import Evaluation

    measure, calls = Evaluation.measure, []

    def killed(*given: Any, **options: Any) -> object:
        calls.append(1)
        if len(calls) == 3:  # the dense model and one arm are measured
            raise KeyboardInterrupt
        return measure(*given, **options)

    monkeypatch.setattr(Evaluation, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), calibration, evaluation=text, out=tmp_path / "x")
    monkeypatch.setattr(Evaluation, "measure", measure)
    other = random_allocation(tiny("llama"), seed=1)
    with pytest.raises(InvalidInput, match=r"x'.*settings.*--force.*--resume"):
        run(
            tiny("llama"), calibration, evaluation=text, out=tmp_path / "x", resume=True,
            allocation=other,
        )  # fmt: skip
    rest = run(tiny("llama"), calibration, evaluation=text, out=tmp_path / "x", resume=True)
    whole = run(tiny("llama"), calibration, evaluation=text)
    assert rest.frame.equals(whole.frame)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selections": ("top",)}, r"leave.*`selections`"),
        ({"match": True}, r"`match`.*selection"),
        ({"experts": (1, 4)}, r"`experts`.*\b1\b.*\[1, 4\].*`entangle\.expand`"),
        ({"interventions": ("prune", "zero")}, "'zero'"),
        ({"proj": "up_proj"}, r"budget.*includes"),
        ({"layers": "all", "proj": None}, "the allocation has no layer"),
    ],
)
def test_what_has_no_meaning_beside_an_allocation_is_refused(
    settings: dict[str, Any], message: str, tiny: Tiny, calibration: CalibrationSet,
    text: EvaluationText,
) -> None:  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        run(tiny("llama"), calibration, evaluation=text, **settings)


def test_an_allocation_of_another_model_is_refused(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    other = random_allocation(tiny("qwen3"))
    with pytest.raises(InvalidInput, match=r"allocation.*digest"):
        run(tiny("llama"), calibration, evaluation=text, allocation=other)


def test_arms_by_hand() -> None:
    allocation = made({"b.0.up": [4, 0, 2]}, {"b.0.up": 4})
    uniform, allocated = plan_allocated(allocation, ["prune"], experts=[1])
    assert uniform.strength == allocated.strength == 0.5
    assert uniform.selection.rows["b.0.up"].tolist() == [0, 1, 2]
    assert uniform.allocation is not None
    assert uniform.allocation.zeros["b.0.up"].tolist() == [2, 2, 2]
    assert allocated.allocation is allocation
    other = plan_allocated(made({"b.0.up": [0, 4, 2]}, {"b.0.up": 4}), ["prune"], experts=[1])
    assert len({arm.key for arm in (uniform, allocated, other[1])}) == 3
    with pytest.raises(UnknownName, match="'prone'"):
        plan_allocated(allocation, ["prone"], experts=[1])
