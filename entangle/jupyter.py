"""Where Python runs: in a Jupyter kernel or not, and for a page that can be clicked or not."""

import re
import sys
from typing import Any

_PYTHON_CLIENT = re.compile(r"_\d+_\d+$")


def in_kernel() -> bool:
    """Tell whether this process is a Jupyter kernel, without importing IPython."""
    return _kernel() is not None


def in_browser() -> bool:
    """Tell whether the cell that runs was sent by a page that can show widgets.

    Clients written in Python (nbclient, nbconvert, papermill, consoles) show none. They number
    their messages ``session_process_count``; pages give theirs random names.
    """
    kernel = _kernel()
    if kernel is None:
        return False
    header = kernel.get_parent("shell").get("header", {})
    return _PYTHON_CLIENT.search(str(header.get("msg_id", ""))) is None


def _kernel() -> Any:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None)
