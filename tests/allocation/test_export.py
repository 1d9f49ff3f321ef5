"""Exports come back as far as the format can hold them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from entangle.allocation import FORMATS, Allocation, export, import_allocation
from entangle.allocation.by_row import evopress_step
from entangle.errors import EntangleError, InvalidInput, UnknownName
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from tests.allocation.samples import allocations, layers_of, made, random_allocation, same_zeros

Tiny = Callable[[str], LanguageModel]
BY_LAYER, BY_ROW = ("llmcompressor", "alphapruning", "evopress"), ("csv", "safetensors")
BY_HAND = made({"b.0.up": [0, 3], "b.0.down": [5]}, {"b.0.up": 4, "b.0.down": 8})
FILES = {name: f"x{ending}" for name, ending in FORMATS.items()}


def test_the_formats() -> None:
    assert tuple(FORMATS) == (*BY_LAYER, *BY_ROW)


@pytest.mark.parametrize("name", FORMATS)
def test_a_pattern_that_is_lost_is_told(name: str, tmp_path: Path) -> None:
    grouped = made({"b.0.up": [2, 4]}, {"b.0.up": 8}, pattern="n:4")
    notes = export(grouped, tmp_path / FILES[name], name)
    told = [note for note in notes if note.startswith("lost: the pattern, n:4;")]
    assert len(told) == (name in BY_LAYER)


@pytest.mark.parametrize("name", BY_ROW)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_row_comes_back(name: str, architecture: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(architecture)
    allocation = random_allocation(model)
    assert export(allocation, tmp_path / FILES[name], name) == []
    found = import_allocation(tmp_path / FILES[name], name)
    assert same_zeros(found, allocation)
    found.check(find_layers(model.module, "all", "mlp"), model.digest)


@pytest.mark.parametrize("name", ["llmcompressor", "alphapruning"])
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(allocation=allocations())
def test_every_layer_comes_back_to_the_weight(
    name: str, allocation: Allocation, tmp_path: Path
) -> None:
    path, layers = tmp_path / FILES[name], layers_of(allocation)
    export(allocation, path, name, force=True)
    if allocation.n_zeros == 0 and name == "llmcompressor":
        with pytest.raises(InvalidInput, match=r"`zeros`.*\b0\b"):
            import_allocation(path, name, layers=layers)
        return
    found = import_allocation(path, name, layers=layers)
    for layer, zeros in found.zeros.items():
        assert zeros.sum() == allocation.zeros[layer].sum()
        assert zeros.max() - zeros.min() <= 1
        assert len(zeros) == len(allocation.zeros[layer])
    left_out = set(allocation.zeros) - set(found.zeros)
    assert all(allocation.zeros[layer].sum() == 0 for layer in left_out)
    assert found.blocks == {n: b for n, b in allocation.blocks.items() if n in found.zeros}


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(allocation=allocations())
def test_evopress_comes_back_to_the_nearest_level(allocation: Allocation, tmp_path: Path) -> None:
    export(allocation, tmp_path / "x.txt", "evopress", force=True)
    step = evopress_step(allocation)
    found = import_allocation(
        tmp_path / "x.txt", "evopress", layers=layers_of(allocation),
        sparsity=allocation.overall, step=step,
    )  # fmt: skip
    for layer, zeros in found.zeros.items():
        assert abs(int(zeros.sum()) - int(allocation.zeros[layer].sum())) <= step + 0.5


def test_alphapruning_lists_all_linears_of_the_blocks(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all")
    allocation = random_allocation(model)
    export(allocation, tmp_path / "x.npy", "alphapruning", layers=layers)
    found = import_allocation(tmp_path / "x.npy", "alphapruning", layers=layers)
    assert list(found.zeros) == [layer.name for layer in layers]
    assert found.n_zeros == allocation.n_zeros
    with pytest.raises(InvalidInput, match=r"x\.npy'.*\b9\b"):
        import_allocation(tmp_path / "x.npy", "alphapruning", layers=layers_of(allocation))


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    routed = made({"b.0.up": [0, 3], "b.0.down": [5]}, {"b.0.up": 4, "b.0.down": 8},
                  {"b.0.up": 2, "b.0.down": 3})  # fmt: skip
    for name in BY_LAYER:
        told = " ".join(export(routed, tmp_path / FILES[name], name))
        assert "the sparsity of single rows" in told
        assert "the number of experts" in told
    even = made({"b.0.up": [1, 1], "b.1.up": [2]}, {"b.0.up": 4, "b.1.up": 4})
    for name in BY_LAYER:
        assert "lost" not in " ".join(export(even, tmp_path / FILES[name], name, force=True))


def test_the_manifest_of_an_import_says_where_it_came_from(tmp_path: Path) -> None:
    export(BY_HAND, tmp_path / "x.csv", "csv")
    manifest = import_allocation(tmp_path / "x.csv", "csv").manifest
    assert manifest["kind"] == "allocation"
    assert manifest["settings"] == {"rule": "imported", "format": "csv", "file": "x.csv"}


def test_rows_take_what_is_left_one_by_one(tmp_path: Path) -> None:
    uneven = made({"b.0.up": [4, 1, 0]}, {"b.0.up": 4})
    export(uneven, tmp_path / "x.yaml", "llmcompressor")
    found = import_allocation(tmp_path / "x.yaml", "llmcompressor", layers=layers_of(uneven))
    assert found.zeros["b.0.up"].tolist() == [2, 2, 1]


def test_files_are_not_replaced_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("mine")
    with pytest.raises(InvalidInput, match=r"x\.csv'.*--force.*force=True"):
        export(BY_HAND, tmp_path / "x.csv", "csv")
    assert (tmp_path / "x.csv").read_text() == "mine"
    export(BY_HAND, tmp_path / "x.csv", "csv", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert (tmp_path / "x.csv").read_text().startswith("layer,")


def test_mistakes_in_exports_are_one_clear_line(tmp_path: Path) -> None:
    for path, name, message in (
        ("x.csv", "cvs", "'cvs'"),
        ("x.txt", "csv", r"format.*x\.txt'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            export(BY_HAND, tmp_path / path, name)
    (tmp_path / "y.csv").mkdir()
    with pytest.raises(InvalidInput, match=r"y\.csv'"):
        export(BY_HAND, tmp_path / "y.csv", "csv")
    with pytest.raises(EntangleError, match=r"x\.csv'"):
        export(BY_HAND, "/proc/x.csv", "csv")
    with pytest.raises(UnknownName, match=r"'b\.0\.up'"):
        export(BY_HAND, tmp_path / "x.npy", "alphapruning", layers=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.csv"]


def test_mistakes_in_imports_are_one_clear_line(tmp_path: Path) -> None:
    for name in FORMATS:
        export(BY_HAND, tmp_path / FILES[name], name)
    layers = layers_of(BY_HAND)
    with pytest.raises(UnknownName, match="'cvs'"):
        import_allocation(tmp_path / "x.csv", "cvs")
    with pytest.raises(InvalidInput, match=r"z\.csv'"):
        import_allocation(tmp_path / "z.csv", "csv")
    for name in BY_LAYER:
        with pytest.raises(InvalidInput, match=rf"`layers`.*{name}"):
            import_allocation(tmp_path / FILES[name], name)
    with pytest.raises(InvalidInput, match=r"`sparsity`.*`step`"):
        import_allocation(tmp_path / "x.txt", "evopress", layers=layers)
    with pytest.raises(UnknownName, match=r"'b\.0\.up'"):
        import_allocation(tmp_path / "x.yaml", "llmcompressor", layers=layers[1:])


def test_zeros_beyond_a_row_are_refused(tmp_path: Path) -> None:
    export(BY_HAND, tmp_path / "x.csv", "csv")
    text = (tmp_path / "x.csv").read_text().replace(",3,0.75", ",5,1.25")
    assert ",5,1.25" in text
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InvalidInput, match=r"x\.csv.*\[0, 4\]"):
        import_allocation(tmp_path / "x.csv", "csv")


def test_the_allocation_is_not_changed(tmp_path: Path) -> None:
    before = {name: zeros.clone() for name, zeros in BY_HAND.zeros.items()}
    for name in FORMATS:
        export(BY_HAND, tmp_path / FILES[name], name)
    assert all(torch.equal(BY_HAND.zeros[name], zeros) for name, zeros in before.items())
