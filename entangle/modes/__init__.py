"""What the modes of a neuron's output distribution mean: borders, tokens and contexts."""

from entangle.modes.modes import NeuronModes, TokenText, describe_modes, find_modes, neuron_modes

__all__ = ["NeuronModes", "TokenText", "describe_modes", "find_modes", "neuron_modes"]
