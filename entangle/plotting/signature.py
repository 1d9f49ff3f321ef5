"""The digest of the run that a figure shows, in small print below it."""

import re

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from entangle.checks import named
from entangle.errors import InvalidInput

DIGITS = 12
_POINTS, _INCHES = 6.0, 0.11
_NAME = "entangle-run"


def sign(figure: Figure, digest: str | None) -> Figure:
    """Write the first 12 digits of a run's digest below a figure, which grows by that line.

    Parameters
    ----------
    figure
        A finished figure; returned as well.
    digest
        SHA-256 of the run's manifest, in hexadecimal, whole or its first 12 digits or more; None
        writes nothing.

    Raises
    ------
    InvalidInput
        Another ``digest``.
    """
    if digest is None:
        return figure
    digest = named("digest", digest)
    if not re.fullmatch(rf"[0-9a-f]{{{DIGITS},}}", digest):
        raise InvalidInput(
            f"`digest` must be at least {DIGITS} hexadecimal digits (0-9, a-f); got {digest!r}; "
            "take the SHA-256 of the run's manifest.json."
        )
    before = figure.get_figheight()
    height = before + _INCHES
    figure.set_figheight(height)
    below = figure.get_supxlabel()
    if below:  # sits at the lower edge: an empty line below it makes the room
        next(text for text in figure.texts if text.get_text() == below).set_text(f"{below}\n")
    else:
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)  # noqa: S101 - all figures have one
        left, low, wide, high = engine.get().get("rect", (0.0, 0.0, 1.0, 1.0))
        rect = left, (low * before + _INCHES) / height, wide, high * before / height
        engine.set(rect=rect)
    figure.text(
        0.995, 0.02 / height, f"run {digest[:DIGITS]}",
        ha="right", va="bottom", fontsize=_POINTS, color="0.35", gid=_NAME,
    )  # fmt: skip
    return figure


def add_seed(figure: Figure, seed: int) -> Figure:
    """Write the seed of a run behind its digest, where `sign` wrote one; return the figure."""
    for text in figure.texts:
        if text.get_gid() == _NAME:
            text.set_text(f"{text.get_text()}, seed {seed}")
    return figure
