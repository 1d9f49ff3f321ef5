"""What the modes of a neuron's output distribution mean: borders, tokens and contexts."""

from entangle.modes.modes import NeuronModes, describe_modes, find_modes, neuron_modes
from entangle.texts.words import TokenText

__all__ = ["NeuronModes", "TokenText", "describe_modes", "find_modes", "neuron_modes"]
