"""Whole calls of modules: what they were given, by position and by name, and what they returned."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from entangle.models.blocks import uncompiled

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments by position, and by name."""
Before = Callable[[tuple[Any, ...], dict[str, Any]], Given | None]
"""Sees the arguments of a call; returns others to take their place, or None."""
After = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
"""Sees arguments and output of a call; returns another output to take its place, or None."""


@contextmanager
def on_calls(
    before: Mapping[nn.Module, Before], after: Mapping[nn.Module, After]
) -> Iterator[None]:
    """Call functions before and after every run of modules inside the ``with`` block.

    Parameters
    ----------
    before, after
        A function for each module that is watched. Those `before` run after hooks that were set
        earlier, as do those `after`. Compiled modules run uncompiled meanwhile.
    """
    with uncompiled(), ExitStack() as stack:
        for module, see in before.items():
            handle = module.register_forward_pre_hook(_first_dropped(see), with_kwargs=True)
            stack.callback(handle.remove)
        for module, take in after.items():
            handle = module.register_forward_hook(_first_dropped(take), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _first_dropped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _module, *given: function(*given)


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first(value: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """Return the arguments of a call with another one in the first one's place."""
    if args:
        return (value, *args[1:]), dict(kwargs)
    return args, {**kwargs, next(iter(kwargs)): value}
