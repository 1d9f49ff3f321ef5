import threading
from collections.abc import Callable

import pytest
import torch

from entangle.errors import NumericalError
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.scoring.layer_scores import how_many, mapped

Tiny = Callable[[str], LanguageModel]


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_come_in_order_and_without_gradients(tiny: Tiny, at_once: int) -> None:
    layers = find_layers(tiny("llama").module, "all")
    with torch.no_grad():
        found = list(
            mapped(lambda one: (one.name, torch.is_grad_enabled()), layers, at_once=at_once)
        )
    assert found == [(layer.name, False) for layer in layers]


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_failure_comes_through_and_ends_the_work(tiny: Tiny, at_once: int) -> None:
    layers = find_layers(tiny("llama").module, "all")
    begun: list[str] = []

    def work(layer: Layer) -> None:
        begun.append(layer.name)
        threading.Event().wait(0.05)
        raise NumericalError("stop")

    with pytest.raises(NumericalError, match="stop"):
        list(mapped(work, layers, at_once=at_once))
    assert len(begun) < len(layers)


def test_a_cpu_works_on_one_layer_at_a_time(tiny: Tiny) -> None:
    assert how_many(find_layers(tiny("llama").module, "all")) == 1
    assert how_many([]) == 1
