"""Checks of ideas of one's own: whether a pruner, a method or a rule keeps its contract.

Each raises `AssertionError` that says what is wrong, as scikit-learn's ``check_estimator`` does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entangle.doors import Door

if TYPE_CHECKING:
    from entangle.mixtures import MixtureMethod

__all__ = [
    "check_activation_method",
    "check_column",
    "check_measure",
    "check_mixture_method",
    "check_pruner",
    "check_router",
    "check_rule",
]

_SHAPES = ((1, 8), (5, 16), (12, 33))


def _problem(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(4 * cols, cols, generator=rng)
    return torch.randn(rows, cols, generator=rng), x.T @ x


def check_pruner(function: Callable[..., Any], *, name: str = "the pruner") -> None:
    """Check a function for the door ``entangle.pruners`` (see `entangle.pruning.methods.pruner`).

    Parameters
    ----------
    function
        Takes ``weight`` (rows, cols), ``gram`` (cols, cols) and ``zeros`` (rows,).
    name
        In messages.

    Raises
    ------
    AssertionError
        If it changes what it is given; returns another shape, NaN, or too few zeros in a row; is
        not the same twice; does not leave a weight as it is where no zeros are asked for; or does
        not give 0 where all are.
    """
    from entangle.errors import EntangleError
    from entangle.pruning.methods import PRUNERS, prune

    PRUNERS.register("__checked__", function)
    try:
        for rows, cols in _SHAPES:
            weight, gram = _problem(rows, cols)
            kept = weight.clone(), gram.clone()
            for share in (0.0, 0.25, 0.5, 1.0):
                try:
                    found = prune(weight, gram, method="__checked__", sparsity=share)
                    again = prune(weight, gram, method="__checked__", sparsity=share)
                except EntangleError as error:
                    raise AssertionError(
                        str(error).replace("the pruner '__checked__'", name)
                    ) from error
                where = f"{name}, {rows} × {cols}, sparsity {share:g}"
                same = torch.equal(weight, kept[0]) and torch.equal(gram, kept[1])
                _require(same, f"{where}: it changed what it was given")
                _require(
                    torch.equal(found.weight, again.weight), f"{where}: it differs when repeated"
                )
                if share == 0:
                    _require(torch.equal(found.weight, weight), f"{where}: it changed the weight")
                if share == 1:
                    _require(not found.weight.any(), f"{where}: weights are left")
    finally:
        PRUNERS.remove("__checked__")


def check_activation_method(function: Callable[..., Any], *, name: str = "the method") -> None:
    """Check a function for the door ``entangle.methods`` (see `entangle.activation.input_method`).

    Parameters
    ----------
    function
        Maps inputs (tokens, features) and a weight (rows, features) to scores (tokens, features).
    name
        In messages.

    Raises
    ------
    AssertionError
        If it is no function, or raises; if the scores have another shape, are negative or not
        finite, depend on other tokens, or it changes what it is given.
    """
    rng = torch.Generator().manual_seed(0)
    for rows, cols in _SHAPES:
        x, weight = torch.randn(7, cols, generator=rng), torch.randn(rows, cols, generator=rng)
        x[0] = 0
        kept = x.clone(), weight.clone()
        where = f"{name}, inputs of {cols} features"
        scores = _called(where, function, x, weight)
        shaped = isinstance(scores, Tensor) and scores.shape == x.shape
        _require(shaped, f"{where}: scores must have the inputs' shape")
        _require(bool(scores.isfinite().all()), f"{where}: scores must be finite")
        _require(bool((scores >= 0).all()), f"{where}: scores must not be negative")
        alone = torch.cat([_called(where, function, one, weight) for one in x.split(1)])
        close = torch.allclose(alone, scores, rtol=1e-4, atol=1e-6)
        _require(close, f"{where}: the scores of a token depend on others")
        same = torch.equal(x, kept[0]) and torch.equal(weight, kept[1])
        _require(same, f"{where}: it changed what it was given")


def check_rule(function: Callable[..., Any], *, name: str = "the rule") -> None:
    """Check a function for the door ``entangle.rules`` (see `entangle.allocation.rules.OwnRule`).

    Parameters
    ----------
    function
        Maps scores (neurons,) and the overall sparsity to sparsities (neurons,).
    name
        In messages.

    Raises
    ------
    AssertionError
        If it is no function, or raises; if it returns another shape or what is no share, or changes
        what it is given.
    """
    scores = np.linspace(0.0, 2.0, 9)
    for share in (0.0, 0.3, 1.0):
        given = scores.copy()
        where = f"{name}, sparsity {share:g}"
        found = _called(where, lambda *a: np.asarray(function(*a), dtype=np.float64), given, share)
        _require(found.shape == scores.shape, f"{where}: a sparsity for every neuron is needed")
        inside = bool(((found >= 0) & (found <= 1)).all())
        _require(inside, f"{where}: sparsities must be in [0, 1]")
        _require(bool((given == scores).all()), f"{where}: it changed what it was given")


def check_router(function: Callable[..., Any], *, name: str = "the router") -> None:
    """Check a function for the door ``entangle.routers`` (`entangle.experts.own_router`).

    Parameters
    ----------
    function
        Maps tokens (tokens, features), a number of clusters and a seed to centroids (clusters,
        features), or to directions of that shape and offsets (clusters,).
    name
        In messages.

    Raises
    ------
    AssertionError
        If it returns other shapes or what is not finite, is not the same twice, changes the tokens,
        or sends a token elsewhere when others are beside it.
    """
    from entangle.experts.own_router import scores_of
    from entangle.experts.router import ROUTERS, fit_router

    rng = torch.Generator().manual_seed(0)
    with _registered(ROUTERS, function, name):
        for k, width in ((2, 5), (3, 8), (7, 16)):
            tokens = torch.randn(64, width, generator=rng) + 0.5
            first, second = (scores_of(name, function, tokens, k, 0) for _ in range(2))
            where = f"{name}, {k} clusters of {width} features"
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            _require(same, f"{where}: it differs when repeated")
            router = fit_router([tokens], k, seed=0, kind="__checked__")
            clusters = router.route(tokens)
            alone = torch.cat([router.route(one) for one in tokens.split(1)])
            _require(torch.equal(clusters, alone), f"{where}: a token's cluster depends on others")
            _require(len(clusters.unique()) > 1, f"{where}: all tokens go to one cluster")


def check_column(function: Callable[..., Any], *, name: str = "the column") -> None:
    """Check a function for the door ``entangle.columns`` (`entangle.scoring.columns`).

    Parameters
    ----------
    function
        Maps inputs (tokens, features), outputs (tokens, neurons) and a weight (neurons, features)
        to numbers (neurons,).
    name
        In messages.

    Raises
    ------
    AssertionError
        If it returns another shape or what is not finite, is not the same twice, changes what it is
        given, or gives a neuron another number when the neurons come in another order.
    """
    from entangle.scoring.columns import COLUMNS

    rng = torch.Generator().manual_seed(0)
    with _registered(COLUMNS, function, name):
        column: Any = COLUMNS["__checked__"]
        for rows, cols in _SHAPES:
            x, weight = (torch.randn(n, cols, generator=rng) for n in (40, rows))
            given = x, x @ weight.T, weight
            kept = [one.clone() for one in given]
            values, again = column(*given), column(*given)
            where = f"{name}, {rows} neurons"
            _require(bool((values == again).all()), f"{where}: it differs when repeated")
            same = all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
            _require(same, f"{where}: it changed what it was given")
            turned = column(x, given[1].flip(1), weight.flip(0))
            close = np.allclose(turned[::-1], values, rtol=1e-4, atol=1e-6)
            _require(close, f"{where}: a neuron's number depends on the order of the neurons")


def check_measure(function: Callable[..., Any], *, name: str = "the measure") -> None:
    """Check a function for the door ``entangle.measures`` (`entangle.evaluation.measures`).

    Parameters
    ----------
    function
        Maps logits (tokens, vocabulary) and the tokens that come next (tokens,) to a number.
    name
        In messages.

    Raises
    ------
    AssertionError
        If it returns what is no finite number, is not the same twice, or changes what it is given.
    """
    from entangle.evaluation.measures import MEASURES

    rng = torch.Generator().manual_seed(0)
    with _registered(MEASURES, function, name):
        measure: Any = MEASURES["__checked__"]
        for length, words in ((1, 4), (6, 9), (33, 20)):
            logits = torch.randn(length, words, generator=rng)
            tokens = torch.randint(words, (length,), generator=rng)
            kept = logits.clone(), tokens.clone()
            where = f"{name}, {length} tokens"
            same = measure(logits, tokens) == measure(logits, tokens)
            _require(same, f"{where}: it differs when repeated")
            same = torch.equal(logits, kept[0]) and torch.equal(tokens, kept[1])
            _require(same, f"{where}: it changed what it was given")


def check_mixture_method(
    function: "Callable[..., Any] | MixtureMethod", *, name: str = "the method"
) -> None:
    """Check a function for the door ``entangle.mixtures`` (`entangle.mixtures.MIXTURE_METHODS`).

    On a mixture of 6 random experts, one of which sees no token.

    Parameters
    ----------
    function
        Maps a `entangle.mixtures.Mixture` to a number for every expert (experts,), or for every
        neuron of every expert (experts, neurons); the lowest go. Or a
        `entangle.mixtures.MixtureMethod`.
    name
        In messages.

    Raises
    ------
    AssertionError
        If it returns another shape or what is not finite, is not the same twice, changes what it is
        given, gives experts other numbers when they come in another order, or prunes another share
        than was asked for.
    """
    from entangle.mixtures import MIXTURE_METHODS, prune_mixtures
    from entangle.mixtures.methods import scores_of

    seen, turned, order = _mixtures()
    with _registered(MIXTURE_METHODS, function, name):
        method: Any = MIXTURE_METHODS["__checked__"]
        (mixture,), (other,) = seen.mixtures, turned.mixtures
        kept = {key: one.clone() for key, one in vars(mixture).items() if isinstance(one, Tensor)}
        weights = [stack.weight.clone() for stack in mixture.bank.stacks.values()]
        scores, again = (scores_of(method, mixture) for _ in range(2))
        _require(torch.equal(scores, again), f"{name}: it differs when repeated")
        _check_untouched(mixture, kept, weights, name)
        close = torch.allclose(scores_of(method, other), scores[order], rtol=1e-6, atol=1e-12)
        _require(close, f"{name}: an expert's number depends on the order of the experts")
        nothing = prune_mixtures(seen, method, sparsity=0.0)
        _require(
            not any(change.changes for change in nothing.changes),
            f"{name}: it prunes where nothing is to go",
        )
        pruned = prune_mixtures(seen, method, sparsity=0.5)
        with pruned.applied():  # what zeros single weights counts them
            left = sum(one.stored / one.stored_before for one in pruned.changes)
        _require(abs(left - 0.5) < 0.02, f"{name}: {left:.0%} of the weights are left, not 50%")
        _check_untouched(mixture, kept, weights, name)


def _mixtures() -> tuple[Any, Any, Tensor]:
    """Return statistics of a random mixture, the same with its experts turned, and their order."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from entangle.mixtures import gather
    from entangle.models.pretrained import quiet

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    made: list[Any] = []
    for places in (torch.arange(6), order):
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: Any = MixtralForCausalLM(config)
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        block, mlp = module.model.layers[0], module.model.layers[0].mlp
        module.model.embed_tokens.weight[:, 0] = 3.0  # of every token, so that expert 4 gets none
        block.post_attention_layernorm.weight.fill_(1.0)
        mlp.gate.weight[:, 0] = 0.0
        mlp.gate.weight[4, 0] = -9.0
        for one in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
            one.copy_(one[places].clone())
        ids = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
        made.append(gather(module, ids, gradients=True))
    return made[0], made[1], order


def _check_untouched(
    mixture: Any, kept: dict[str, Tensor], weights: list[Tensor], name: str
) -> None:
    same = all(torch.equal(getattr(mixture, key), one) for key, one in kept.items())
    stacks = mixture.bank.stacks.values()
    same &= all(torch.equal(stack.weight, one) for stack, one in zip(stacks, weights, strict=True))
    _require(same, f"{name}: it changed what it was given")


@contextmanager
def _registered(door: "Door[Any]", function: Any, name: str) -> Iterator[None]:
    """Have a function in a door for a while; what breaks its contract is an AssertionError."""
    from entangle.errors import EntangleError

    try:
        door.register("__checked__", function)
        yield
    except EntangleError as error:
        raise AssertionError(str(error).replace("'__checked__'", repr(name))) from error
    finally:
        if "__checked__" in door:
            door.remove("__checked__")


def _called(where: str, function: Callable[..., Any], *given: Any) -> Any:
    """Return what a function gives; an AssertionError tells of one that raises, or is a class."""
    _require(callable(function) and not isinstance(function, type), f"{where}: it is no function")
    try:
        return function(*given)
    except Exception as error:
        raise AssertionError(f"{where}: it failed: {type(error).__name__}: {error}") from error


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
