"""From a model and a calibration set to one row of scores a neuron."""

from entangle.results.scores import NeuronScores, load_scores

__all__ = ["NeuronScores", "load_scores"]
