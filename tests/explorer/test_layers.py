import pandas as pd

from entangle.explorer.views import OUTSIDE, LayerMenu


def menu(*rows: tuple[str, int | None]) -> LayerMenu:
    names, blocks = zip(*rows, strict=True)
    return LayerMenu.of(
        pd.DataFrame({"layer": names, "block": pd.array(blocks, dtype="Int64"), "projection": ""})
    )


def test_blocks_and_layers() -> None:
    found = menu(("m.0.mlp.up", 0), ("m.0.mlp.down", 0), ("m.10.mlp.up", 10), ("head", None))
    assert found.blocks == {
        "0": {"up": "m.0.mlp.up", "down": "m.0.mlp.down"},
        "10": {"up": "m.10.mlp.up"},
        OUTSIDE: {"head": "head"},
    }
    assert found.label("m.0.mlp.down") == ("0", "down")
    assert found.label("head") == (OUTSIDE, "head")


def test_equal_projections_get_longer_labels() -> None:
    found = menu(
        ("l.3.attention.output.dense", 3), ("l.3.intermediate.dense", 3), ("l.3.output.dense", 3)
    )
    assert found.blocks["3"] == {
        "attention.output.dense": "l.3.attention.output.dense",
        "intermediate.dense": "l.3.intermediate.dense",
        "3.output.dense": "l.3.output.dense",
    }


def test_a_name_that_ends_another() -> None:
    found = menu(("dense", None), ("a.dense", None))
    assert list(found.blocks[OUTSIDE].values()) == ["dense", "a.dense"]
    assert len(found.blocks[OUTSIDE]) == 2
