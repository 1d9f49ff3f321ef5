import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from entangle.allocation import Allocation, load_allocation
from entangle.allocation.allocation import _check_vector
from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel


def make(**changes: Any) -> Allocation:
    fields: dict[str, Any] = {
        "zeros": {"blocks.1.up": torch.tensor([1, 2, 3]), "head": torch.tensor([8])},
        "in_features": {"blocks.1.up": 4, "head": 8},
        "experts": None,
        "manifest": {"kind": "allocation", "model": {"digest": "abc"}, "pair": (1, 2)},
        "blocks": {"blocks.1.up": 1},
    }
    return Allocation(**fields | changes)


def same(a: Allocation, b: Allocation) -> bool:
    equal = all(torch.equal(a.zeros[name], b.zeros[name]) for name in a.zeros)
    others = ("in_features", "experts", "manifest", "blocks", "pattern")
    return (
        equal
        and list(a.zeros) == list(b.zeros)
        and all(getattr(a, key) == getattr(b, key) for key in others)
    )


def test_tables_by_hand() -> None:
    allocation = make(experts={"blocks.1.up": 16, "head": 4})
    assert allocation.rows("blocks.1.up") == 3
    assert allocation.n_zeros == 14
    assert allocation.n_weights == 20
    assert allocation.overall == 0.7
    assert allocation.sparsity["blocks.1.up"].tolist() == [0.25, 0.5, 0.75]
    expected = pd.DataFrame(
        {
            "layer": ["blocks.1.up", "head"],
            "block": pd.array([1, None], dtype="Int64"),
            "projection": ["up", "head"],
            "rows": [3, 1],
            "in_features": [4, 8],
            "zeros": [6, 8],
            "sparsity": [0.5, 1.0],
            "lowest": [0.25, 1.0],
            "highest": [0.75, 1.0],
            "experts": [16, 4],
        }
    )
    pd.testing.assert_frame_equal(allocation.layers, expected)
    assert "experts" not in make().layers
    neurons = allocation.neurons
    assert neurons["layer"].tolist() == ["blocks.1.up"] * 3 + ["head"]
    assert neurons["neuron"].tolist() == [0, 1, 2, 0]
    assert neurons["zeros"].tolist() == [1, 2, 3, 8]
    assert neurons["sparsity"].tolist() == [0.25, 0.5, 0.75, 1.0]


def test_rows_of_another_layer() -> None:
    with pytest.raises(UnknownName, match=r"'up'.*blocks\.1\.up"):
        make().rows("up")


def test_sparsity_times_width_is_the_count_again() -> None:
    """As `entangle.pruning.prune` counts: for any width, no count is off by one."""
    for width in (3, 49, 576, 1536, 11008):
        zeros = torch.arange(width + 1)
        allocation = make(zeros={"a": zeros}, in_features={"a": width}, blocks={})
        assert torch.equal((allocation.sparsity["a"] * width).round().long(), zeros)


@pytest.mark.parametrize("experts", [None, {"blocks.1.up": 2, "head": 1}])
def test_round_trip(tmp_path: Path, experts: dict[str, int] | None) -> None:
    allocation = make(experts=experts)
    path = allocation.save(tmp_path / "new" / "a.safetensors")
    loaded = load_allocation(path)
    assert same(loaded, allocation)
    assert loaded.manifest["pair"] == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
    again = allocation.save(tmp_path / "b.safetensors")
    assert again.read_bytes() == path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("head").tolist() == [8]


IN_GROUPS: dict[str, Any] = {
    "zeros": {"blocks.1.up": torch.tensor([2, 0, 4]), "head": torch.tensor([8])},
    "pattern": "n:2",
}


def test_groups_of_a_file(tmp_path: Path) -> None:
    allocation = make(**IN_GROUPS)
    assert make().pattern == "row"
    loaded = load_allocation(allocation.save(tmp_path / "a.safetensors"))
    assert same(loaded, allocation)
    assert loaded.pattern == "n:2"


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"rule": "linear", "pattern": "n:2"}, "n:2"),
        ({"rule": "linear", "pattern": "row"}, "row"),
        ({"rule": "imported"}, "row"),
        (None, "row"),
    ],
)
def test_an_older_file_has_the_pattern_of_its_rule(
    tmp_path: Path, settings: object, pattern: str
) -> None:
    path = make(**IN_GROUPS | {"manifest": {"settings": settings}}).save(tmp_path / "a.safetensors")
    rewrite(path, lambda described, _tensors: described.pop("pattern"))
    found = load_allocation(path)
    assert found.pattern == pattern
    assert found.zeros["blocks.1.up"].tolist() == [2, 0, 4]


def test_an_allocation_does_not_change() -> None:
    given: dict[str, Any] = {"model": {"digest": "abc"}}
    allocation = make(manifest=given)
    given["model"] = None
    assert allocation.manifest["model"] == {"digest": "abc"}
    with pytest.raises(TypeError, match="item assignment"):
        allocation.zeros["other"] = torch.tensor([1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zeros": {}, "in_features": {}}, r"`zeros`.*\b0\b.*\b0\b"),
        ({"in_features": {"head": 8}}, r"`zeros`.*order.*\b2\b"),
        ({"zeros": {"a": torch.tensor([5])}, "in_features": {"a": 4}}, r"`zeros`.*\[0, 4\].*\b5\b"),
        ({"zeros": {"a": torch.tensor([-1, 2])}, "in_features": {"a": 4}}, r"`zeros`.*-1\b.*\b2\b"),
        ({"zeros": {"a": torch.zeros(0).long()}, "in_features": {"a": 4}}, r"`zeros`.*\(0,\)"),
        ({"experts": {"head": 1}}, r"`experts`.*\b2\b"),
        ({"pattern": "n:2"}, r"\b2\b.*\b2\b.*'n:2'.*\b1\b"),
        (IN_GROUPS | {"pattern": "n:3"}, r"\b3\b.*'blocks\.1\.up'.*\b4\b"),
        (IN_GROUPS | {"pattern": "n:16"}, r"\b16\b.*'blocks\.1\.up'.*\b4\b"),
        (IN_GROUPS | {"pattern": "2:4"}, r"`pattern`.*n:m.*'2:4'"),
        ({"experts": {"blocks.1.up": 0, "head": 1}}, r"experts.*\b1\b.*\b0\b"),
        ({"experts": {"blocks.1.up": True, "head": 1}}, r"experts.*\b1\b.*\bTrue\b"),
    ],
)
def test_what_is_no_allocation(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make(**changes)


@pytest.mark.parametrize("wrong", [torch.tensor([0.5]), torch.zeros(1, 1).long()])
def test_counts_are_vectors_of_integers(wrong: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"CPU.*int64"):
        _check_vector("a", wrong)


def test_check_names_what_does_not_fit(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, 1, "mlp")
    fields = {"in_features": {layer.name: layer.in_features for layer in layers}, "blocks": {}}
    zeros = {layer.name: torch.zeros(layer.out_features).long() for layer in layers}
    digest = {"model": {"digest": model.digest}}
    fitting = make(zeros=zeros, manifest=digest, **fields)
    fitting.check(layers, model.digest)
    make(zeros=zeros, manifest={}, **fields).check(layers, model.digest)
    fitting.check(layers, None)
    with pytest.raises(InvalidInput, match=r"digest.*\b000\b"):
        fitting.check(layers, "000")
    with pytest.raises(InvalidInput, match=r"'model\.layers\.0\.mlp\.gate_proj'"):
        fitting.check(find_layers(model.module, [0, 1], "mlp"), model.digest)
    with pytest.raises(InvalidInput, match=r"includes.*model\.layers\.1\.mlp\.down"):
        fitting.check(layers[:2], model.digest)
    fewer = zeros | {layers[0].name: torch.zeros(3).long()}
    with pytest.raises(InvalidInput, match=r"gate_proj.*\(48, 32\).*\(3, 32\)"):
        make(zeros=fewer, manifest=digest, **fields).check(layers, model.digest)


def test_what_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"a\.npy'"):
        make().save(tmp_path / "a.npy")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(InvalidInput, match=r"d\.safetensors'"):
        make().save(tmp_path / "d.safetensors", force=True)
    path = make().save(tmp_path / "a.safetensors")
    with pytest.raises(InvalidInput, match=r"a\.safetensors'.*--force.*force=True"):
        make().save(path)
    make(experts={"blocks.1.up": 2, "head": 1}).save(path, force=True)
    assert load_allocation(path).experts == {"blocks.1.up": 2, "head": 1}


def rewrite(
    path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["entangle"])
    del described["digests"]  # as an earlier version wrote it
    tensors = safetensors.torch.load_file(path)
    change(described, tensors)
    safetensors.torch.save_file(tensors, path, {"entangle": json.dumps(described)})


CHANGES: list[tuple[Any, str]] = [
    (lambda d, t: d.update(kind="scores"), r"'allocation'.*'scores'"),
    (lambda d, t: d.update(schema_version=99), r"a\.safetensors'.*\b99\b"),
    (lambda d, t: t["head"].fill_(7), r"a\.safetensors'.*digest"),
    (lambda d, t: t.pop("head"), r"a\.safetensors'.*altered.*layers"),
    (lambda d, t: t.update(head=t["head"].float()), r"a\.safetensors'.*altered.*layers"),
    (lambda d, t: d.pop("layers"), r"a\.safetensors'.*altered"),
    (lambda d, t: d.pop("in_features"), r"a\.safetensors'.*altered"),
    (lambda d, t: d.update(in_features={"blocks.1.up": 2, "head": 8}), r"altered.*`zeros`.*\b1\b"),
    (lambda d, t: d.update(in_features=[1]), r"a\.safetensors'.*altered"),
    (lambda d, t: d.update(manifest=None), r"a\.safetensors'.*altered"),
    (lambda d, t: d.update(pattern="n:2"), r"`zeros`.*multiples.*\b2\b"),
    (lambda d, t: d.update(pattern=4), r"`pattern`.*n:m.*'4'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_altered_files(tmp_path: Path, change: Any, message: str) -> None:
    path = make().save(tmp_path / "a.safetensors")
    rewrite(path, change)
    with pytest.raises(InvalidInput, match=message) as caught:
        load_allocation(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"in_features": {"blocks.1.up": 8, "head": 8}}, {"blocks": {}}, {"pattern": "n:1"}]
)
def test_a_file_with_digests_that_was_altered(tmp_path: Path, change: dict[str, Any]) -> None:
    path = make().save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["entangle"])
    tensors = safetensors.torch.load_file(path)
    metadata = {"entangle": json.dumps(described | change)}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(InvalidInput, match=r"a\.safetensors'"):
        load_allocation(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="`entangle allocate`"):
        load_allocation(tmp_path)
    path = make().save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidInput, match=r"a\.safetensors'.*read"):
            load_allocation(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(InvalidInput, match=r"a\.safetensors'.*`entangle allocate`"):
        load_allocation(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"entangle": "{"})
    with pytest.raises(InvalidInput, match=r"a\.safetensors'.*\b1\b.*\b2\b"):
        load_allocation(path)
