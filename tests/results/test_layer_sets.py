import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.results.ablation import layer_names, layer_set


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["lm_head"], "lm_head"),
        (["model.layers.1.mlp.up_proj"], "model.layers.1.mlp.up_proj"),
        ([f"h.{i}.mlp.c_fc" for i in (4, 0, 2, 3)], "h.{0,2-4}.mlp.c_fc"),
        (
            ["b.0.up", "b.0.down", "b.1.up", "b.1.down", "head"],
            "b.{0-1}.up; b.{0-1}.down; head",
        ),
        (["b.0.experts.1.up", "b.1.experts.1.up"], "b.{0-1}.experts.1.up"),
        (["b.00.up", "b.1x.up", "0", "1"], "b.00.up; b.1x.up; {0-1}"),
    ],
)
def test_by_hand_and_back(names: list[str], text: str) -> None:
    assert layer_set(names) == text
    assert sorted(layer_names(text)) == sorted(names)


parts = st.sampled_from(["h", "mlp", "up", "0", "7", "12", "013", "2b"])


@given(st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), unique=True))
def test_no_name_is_lost(names: list[str]) -> None:
    assert sorted(layer_names(layer_set(names))) == sorted(names)
