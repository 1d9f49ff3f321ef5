"""Recipes, read by llm-compressor's own classes where they can be imported."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from entangle.allocation import Allocation, import_allocation
from entangle.allocation.export import read_recipe, recipe_losses, write_recipe
from entangle.errors import InvalidInput
from tests.allocation.samples import allocations, layers_of, made

BY_HAND = made({"b.0.up": [0, 2], "b.0.down": [2], "b.1.up": [4, 4], "b.1.down": [0]},
               {"b.0.up": 4, "b.0.down": 8, "b.1.up": 4, "b.1.down": 3})  # fmt: skip
ALLOWED = {"sparsity", "mask_structure", "targets", "ignore", "block_size", "dampening_frac"}
"""Fields of `SparseGPTModifier` in llm-compressor 0.14, as far as they matter here."""


def modifiers(recipe: Any) -> list[dict[str, Any]]:
    """Unfold stages → groups → modifiers as `Recipe.from_dict` does."""
    found = []
    for stage_key, stage in recipe.items():
        assert stage_key.endswith("_stage")
        for group_key, group in stage.items():
            assert group_key.endswith("_modifiers")
            assert list(group) == ["SparseGPTModifier"]
            found.append(group["SparseGPTModifier"])
    return found


def shares_of(allocation: Allocation) -> dict[str, float]:
    frame = allocation.layers[allocation.layers["zeros"] > 0]
    return dict(zip(frame["layer"], frame["sparsity"], strict=True))


def test_by_hand() -> None:
    text = write_recipe(BY_HAND).decode()
    assert modifiers(yaml.safe_load(text)) == [
        {"sparsity": 0.25, "targets": ["b.0.up", "b.0.down"]},
        {"sparsity": 1.0, "targets": ["b.1.up"]},
    ]
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert "of 4 layer(s) are zeros" in comments[1]
    assert "lost: the sparsity of single rows (1 of 4 layers" in comments[2]
    assert "1 layer(s) without zeros are named in no modifier" in comments[3]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(allocation=allocations())
def test_documented_schema_and_round_trip(allocation: Allocation, tmp_path: Path) -> None:
    content = write_recipe(allocation)
    found = modifiers(yaml.safe_load(content))
    assert all(set(modifier) <= ALLOWED for modifier in found)
    assert len({modifier["sparsity"] for modifier in found}) == len(found)
    (tmp_path / "x.yaml").write_bytes(content)
    found_shares = read_recipe(tmp_path / "x.yaml", list(allocation.zeros))
    assert found_shares == pytest.approx(shares_of(allocation), abs=1e-15)


def test_losses_are_told() -> None:
    even = made({"b.0.up": [2, 2]}, {"b.0.up": 4})
    assert recipe_losses(even) == []
    routed = made({"b.0.up": [2, 2]}, {"b.0.up": 4}, {"b.0.up": 3})
    assert recipe_losses(routed) == ["lost: the number of experts of each layer."]


def test_llmcompressor_reads_it(tmp_path: Path) -> None:
    reason = "llm-compressor requires transformers below the version that entangle needs"
    recipe = pytest.importorskip("llmcompressor.recipe", reason=reason, exc_type=ImportError)
    (tmp_path / "x.yaml").write_bytes(write_recipe(BY_HAND))
    found = recipe.Recipe.create_instance(str(tmp_path / "x.yaml")).modifiers
    assert [type(one).__name__ for one in found] == ["SparseGPTModifier"] * 2
    assert [(one.sparsity, one.targets) for one in found] == [
        (0.25, ["b.0.up", "b.0.down"]), (1.0, ["b.1.up"]),
    ]  # fmt: skip


@pytest.mark.parametrize("targets", [["b.0.up", "b.1.up"], ["b.1.up", "b.0.up"]])
def test_a_list_of_sparsities_runs_through_the_model(targets: list[str], tmp_path: Path) -> None:
    """The modifier pairs it with the targets as it meets them among the model's modules."""
    modifier = {"sparsity": [0.5, 0.25], "targets": targets}
    recipe = {"x_stage": {"y_modifiers": {"SparseGPTModifier": modifier}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    found = read_recipe(tmp_path / "x.yaml", ["b.0.up", "b.0.down", "b.1.up"])
    assert found == {"b.0.up": 0.5, "b.1.up": 0.25}
    single = made({"b.0.up": [1] * 4, "b.0.down": [1], "b.1.up": [1] * 4},
                  {"b.0.up": 4, "b.0.down": 8, "b.1.up": 4})  # fmt: skip
    read = import_allocation(tmp_path / "x.yaml", "llmcompressor", layers=layers_of(single))
    assert {name: int(zeros.sum()) for name, zeros in read.zeros.items()} == {
        "b.0.up": 8, "b.1.up": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ({"sparsity": 0.5, "targets": ["Linear"]}, "'Linear'"),
        ({"sparsity": 0.5, "targets": "re:.*up"}, r"'re:.*up'"),
        ({"sparsity": 1.5, "targets": ["b.0.up"]}, r"'b\.0\.up'.*\[0, 1\].*\b1\.5\b"),
        ({"sparsity": [0.5], "targets": ["b.0.up", "b.1.up"]}, r"x\.yaml'.*\b1\b.*sparsities"),
        ({"targets": ["b.0.up"]}, "SparseGPTModifiers"),
    ],
)
def test_other_recipes_are_refused(modifier: object, message: str, tmp_path: Path) -> None:
    recipe = {"x_stage": {"y_modifiers": {"SparseGPTModifier": modifier}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InvalidInput, match=message):
        read_recipe(tmp_path / "x.yaml", ["b.0.up", "b.1.up"])


@pytest.mark.parametrize("content", [b"{", b"- a\n- b\n", b"\xff\xfe", b"x_stage: 3\n"])
def test_what_is_no_recipe_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(InvalidInput, match="SparseGPTModifiers") as caught:
        read_recipe(tmp_path / "x.yaml", ["b.0.up", "b.1.up"])
    assert "\n" not in str(caught.value)
