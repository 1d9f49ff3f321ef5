"""Look through neurons in a notebook: menus, a table to sort, and views of what is clicked."""

from entangle.explorer.explore import explore
from entangle.explorer.explorer import Explorer

__all__ = ["Explorer", "explore"]
