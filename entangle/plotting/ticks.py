"""Ticks of logarithmic axes, their numbers on one line: superscripts would be too small."""

import re

from matplotlib.ticker import Locator, LogLocator, MaxNLocator

_EXPONENT = re.compile(r"e\+?(-?)0*")


def plain_number(value: float, _position: int | None = None) -> str:
    """Return a number as ``"0.1"``, ``"10,000"`` or, from a million and below 1e-4, ``"2e6"``."""
    return _EXPONENT.sub(r"e\1", f"{value:,g}").replace("-", "−")


def log_locator(span: float) -> Locator:
    """Return what places the ticks of a logarithmic axis whose ends have the ratio ``span``."""
    if span < 4.0:
        return MaxNLocator(5, steps=(1, 2, 5, 10))
    if span < 50.0:
        return LogLocator(subs=(1.0, 2.0, 5.0))
    return LogLocator(subs=(1.0, 3.0) if span < 1000.0 else (1.0,))
