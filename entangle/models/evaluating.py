"""A module is in eval mode and without gradients only while it is looked at."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

from entangle.models.loading import LanguageModel

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, and its parameters without gradients, while the block runs.

    Training mode of every submodule and ``requires_grad`` of every parameter come back however the
    block ends. Contexts may be nested. A module that is frozen already is not touched.
    """
    modes = [(child, child.training) for child in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
    try:
        if any(training for _, training in modes):
            module.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        _restore(modes)


def evaluates(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function hold every module and `LanguageModel` among its arguments in `evaluating`."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for value in (*args, *kwargs.values()):
                module = value.module if isinstance(value, LanguageModel) else value
                if isinstance(module, nn.Module):
                    stack.enter_context(evaluating(module))
            return function(*args, **kwargs)

    return held


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give every module its mode back, outer ones first.

    By ``train``, since some modules do more in it than set a flag (an adapter that is merged into
    its weight meanwhile); then flag by flag, since it also sets those of all modules inside.
    """
    for child, training in modes:
        if child.training != training:
            child.train(training)
    for child, training in modes:
        child.training = training
