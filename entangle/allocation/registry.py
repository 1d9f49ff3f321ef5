"""All rules by name."""

from collections.abc import Callable
from dataclasses import dataclass

from entangle.allocation import losses, rules
from entangle.allocation.alphapruning import alphapruning
from entangle.allocation.budget import Wish
from entangle.allocation.neuroal import neuroal, neuroal_blocks
from entangle.allocation.owl import owl
from entangle.allocation.request import Request
from entangle.allocation.trim import trim

MODEL = "model"
"""Value of ``across`` that lets neurons of all layers compete."""


@dataclass(frozen=True, eq=False)
class Rule:
    """An allocation rule."""

    summary: str
    """One line for a listing."""
    wish: Callable[[Request], Wish]
    """Makes one wish a neuron, or one a layer for a rule of layers."""
    of_layers: bool = False
    """Whether it decides how sparse layers are, all neurons of one alike."""
    across: str = "uniform"
    """For a rule of neurons: the rule of layers that it keeps to by default, or ``model``."""
    strength: float = 0.0
    """Default of ``strength``; 0 for a rule without one."""
    calibrated: bool = False
    """Whether it needs the model and a calibration set."""
    weighed: bool = False
    """Whether it needs the model's weights."""
    scored: bool = True
    """Whether it reads columns of the scores."""


RULES: dict[str, Rule] = {
    "uniform": Rule("the same sparsity everywhere", rules.uniform, of_layers=True, scored=False),
    "layer": Rule(
        "layers with a larger mean score are less sparse", rules.by_layer,
        of_layers=True, strength=0.08,
    ),
    "protect": Rule("the neurons with the largest scores stay (nearly) dense", rules.protect),
    "linear": Rule("sparsity falls linearly with the z-score", rules.linear, strength=0.05),
    "rank": Rule("sparsity falls linearly with the rank", rules.rank, strength=0.1),
    "owl": Rule(
        "blocks with more outlying weights are less sparse (OWL)", owl,
        of_layers=True, strength=0.08, calibrated=True, scored=False,
    ),
    "alphapruning": Rule(
        "blocks with heavier-tailed spectra are less sparse (AlphaPruning)", alphapruning,
        of_layers=True, strength=0.3, weighed=True, scored=False,
    ),
    "trim": Rule(
        "rows whose pruned outputs keep their direction are sparser (TRIM)", trim,
        calibrated=True, scored=False,
    ),
    "neuroal": Rule(
        "the schedule that keeps inputs most alike, then rows that feed them (NeuroAL)", neuroal,
        across="neuroal-blocks", calibrated=True, scored=False,
    ),
    "neuroal-blocks": Rule(
        "sparsity grows with depth, as keeps inputs most alike (NeuroAL's first step)",
        neuroal_blocks, of_layers=True, calibrated=True, scored=False,
    ),
    "loss": Rule(
        "the last zero of each row costs as much, weighed by the score", losses.loss,
        strength=0.3, calibrated=True,
    ),
    "sensitivity": Rule(
        "the same in units of the model's own loss, across layers", losses.sensitivity,
        across=MODEL, strength=0.3, calibrated=True,
    ),
    "depth": Rule(
        "layers by their mean score, rows by what their last zero costs", losses.depth,
        across="layer", strength=0.3, calibrated=True,
    ),
}  # fmt: skip
"""Rules by name, in the order in which they are listed."""
