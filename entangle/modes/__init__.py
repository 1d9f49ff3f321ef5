"""What the modes of a neuron's output distribution mean: borders, tokens and contexts."""

from entangle.modes.find import find_modes
from entangle.modes.neuron import NeuronModes, describe_modes, neuron_modes
from entangle.modes.text import TokenText

__all__ = ["NeuronModes", "TokenText", "describe_modes", "find_modes", "neuron_modes"]
