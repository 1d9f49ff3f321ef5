"""What a view of the explorer shows: pictures, HTML below them, and work it offers to do."""

import base64
import io
from dataclasses import dataclass

from matplotlib.figure import Figure

_DPI = 200.0
_SHOWN_DPI = 115.0


@dataclass(frozen=True)
class Content:
    """What a view shows of one neuron."""

    pictures: tuple[bytes, ...] = ()
    """PNGs, at most two."""
    html: str = ""
    """Escaped, shown below the pictures."""
    offer: str = ""
    """What a click would compute; empty if there is nothing more to compute."""


def picture(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def shown_width(png: bytes) -> int:
    """Return how wide a PNG of `picture` is shown, in pixels, so that its text can be read."""
    return round(int.from_bytes(png[16:20], "big") / _DPI * _SHOWN_DPI)


def image(png: bytes) -> str:
    """Return an HTML element that shows a PNG without a file beside it."""
    data = base64.b64encode(png).decode("ascii")
    style = f"width: {shown_width(png)}px; max-width: 100%"
    return f'<img alt="" style="{style}" src="data:image/png;base64,{data}">'
