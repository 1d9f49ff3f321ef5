"""Look through neurons in a notebook: menus, a table to sort, and views of what is clicked."""

from entangle.explorer.explorer import Explorer, explore

__all__ = ["Explorer", "explore"]
