"""Formats that hold every neuron come back as they were."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings

from entangle.allocation import Allocation
from entangle.allocation.by_row import read_csv, read_rows, write_csv, write_rows
from entangle.errors import InvalidInput
from tests.allocation.samples import allocations, made, same_zeros

FORMATS: dict[str, tuple[Callable[[Allocation], bytes], Callable[[Path], dict[str, Any]]]] = {
    "csv": (write_csv, read_csv),
    "safetensors": (write_rows, read_rows),
}
BY_HAND = made({"b.0.up": [0, 3], "head": [5]}, {"b.0.up": 4, "head": 5}, {"b.0.up": 16, "head": 2})


@pytest.mark.parametrize("name", FORMATS)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(allocation=allocations())
def test_what_is_written_is_read(name: str, allocation: Allocation, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    file = tmp_path / "x"
    file.write_bytes(write(allocation))
    found = Allocation(**read(file), manifest={})
    assert same_zeros(found, allocation)
    assert found.in_features == allocation.in_features
    assert found.blocks == allocation.blocks
    assert found.experts is None


def test_csv_by_hand() -> None:
    assert write_csv(BY_HAND).decode().splitlines() == [
        "layer,block,neuron,in_features,zeros,sparsity,experts",
        "b.0.up,0,0,4,0,0.0,16",
        "b.0.up,0,1,4,3,0.75,16",
        "head,,0,5,5,1.0,2",
    ]


def test_vectors_are_plain_sparsities() -> None:
    vectors = safetensors.torch.load(write_rows(BY_HAND))
    assert {name: vector.tolist() for name, vector in vectors.items()} == {
        "b.0.up": [0.0, 0.75],
        "head": [1.0],
    }


@pytest.mark.parametrize("name", FORMATS)
def test_groups_come_back(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    grouped = made({"b.0.up": [0, 4], "head": [6]}, {"b.0.up": 8, "head": 6}, pattern="n:2")
    (tmp_path / "x").write_bytes(write(grouped))
    found = Allocation(**read(tmp_path / "x"), manifest={})
    assert found.pattern == "n:2"
    assert same_zeros(found, grouped)


def test_a_table_with_two_patterns(tmp_path: Path) -> None:
    grouped = made({"b.0.up": [0, 4], "head": [6]}, {"b.0.up": 8, "head": 6}, pattern="n:2")
    text = write_csv(grouped).decode().splitlines()
    assert text[0].endswith(",sparsity,pattern")
    (tmp_path / "x").write_text("\n".join([*text[:3], text[3].replace("n:2", "n:3")]))
    with pytest.raises(InvalidInput, match=r"'pattern'.*'n:2'"):
        read_csv(tmp_path / "x")


@pytest.mark.parametrize("name", FORMATS)
def test_experts_and_layers_outside_the_blocks_come_back(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    (tmp_path / "x").write_bytes(write(BY_HAND))
    found = Allocation(**read(tmp_path / "x"), manifest={})
    assert found.experts == BY_HAND.experts
    assert found.blocks == {"b.0.up": 0}


def test_the_order_of_a_table_does_not_matter_within_a_layer(tmp_path: Path) -> None:
    table = pd.read_csv(io.BytesIO(write_csv(BY_HAND))).iloc[[1, 0, 2]]
    table.to_csv(tmp_path / "x", index=False)
    assert same_zeros(Allocation(**read_csv(tmp_path / "x"), manifest={}), BY_HAND)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("zeros", "nulls", "it has no column 'zeros'"),
        ("b.0.up,0,1", "b.0.up,0,2", "the neurons of 'b.0.up' are not 0 to 1, once each"),
        ("b.0.up,0,1,4", "b.0.up,0,1,5", "'in_features' must be one whole number throughout"),
        ("0.75,16", "0.75,15", "'experts' must be one whole number throughout 'b.0.up'"),
        (",3,", ",3.5,", "column 'zeros' must hold whole numbers"),
        (",3,", ",x,", "column 'zeros' must hold whole numbers"),
    ],
)
def test_a_table_that_was_changed_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    text = write_csv(BY_HAND).decode()
    assert old in text
    (tmp_path / "x.csv").write_text(text.replace(old, new))
    with pytest.raises(InvalidInput, match=r"x\.csv'") as caught:
        read_csv(tmp_path / "x.csv")
    assert message in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "shares"])
def test_vectors_that_were_changed_are_refused(damage: str, tmp_path: Path) -> None:
    content = write_rows(BY_HAND)
    if damage == "truncated":
        content = content[:-3]
    else:
        vectors = safetensors.torch.load(content)
        vectors["b.0.up"] += 0.01
        described = b'{"layers": ["b.0.up"], "in_features": {"b.0.up": 4}}'
        metadata = {"entangle rows": described.decode()} if damage == "shares" else {}
        content = safetensors.torch.save(vectors, metadata)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"x'.*allocation"):
        read_rows(tmp_path / "x")


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(InvalidInput, match=r"x\.csv'.*allocation"):
        read_csv(tmp_path / "x.csv")
