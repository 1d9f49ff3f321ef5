"""How sparse activations are by themselves, and how steadily tokens go to the same experts.

Lazy neurons (arXiv 2210.06313), token- and chunk-level sparsity (BlockFFN, arXiv 2507.08771),
CETT and PPL-p % (Sparsing Law, arXiv 2411.02335), and consistency of routing in the manner of
arXiv 2505.16056, whose formulas are not public: ours are written at `routing_consistency`.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.activation.methods import ActivationMethod, Levels, level_of
from entangle.activation.neurons import FeedForward, NeuronRule
from entangle.activation.rules import Scores, Window
from entangle.activation.sparsity import ActivationSparsity
from entangle.activation.subject import Subject
from entangle.checks import finite, share, whole
from entangle.errors import InvalidInput
from entangle.evaluation.perplexity import measure_perplexity
from entangle.models.blocks import evaluating
from entangle.models.layers import Layer
from entangle.models.loading import AnyModel, as_language_model
from entangle.recording.recorder import Recorded
from entangle.texts.calibration import as_calibration
from entangle.texts.evaluation import as_evaluation
from entangle.texts.given import Source

_HALVINGS = 12  # of the share that is left out, for an error
CHUNK = 8
"""Consecutive tokens of a chunk."""


def lazy_neurons(model: AnyModel, text: Source, *, eps: float = 0.0) -> pd.DataFrame:
    """Return how often every neuron of the feed-forward parts is active in the dense model.

    A neuron is active on a token where the size of what it gives to `down` passes ``eps``.

    Parameters
    ----------
    model, text
        As in `entangle.activation.fit`.
    eps
        0 suits ReLU, whose zeros are exact; SiLU and GELU give none, so that all are active.

    Returns
    -------
    pandas.DataFrame
        One row a neuron: layer (the `down` that reads it), neuron, active (share of tokens). The
        mean over neurons is one minus the token-level sparsity.
    """
    eps = finite("eps", eps, least=0)
    known = as_language_model(model)
    with evaluating(known.module):
        subject = Subject(known, as_calibration(text, known), "mlp", Window())
        counts: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}

        def take(seen: Recorded) -> None:
            name, active = seen.layer.name, (seen.inputs.abs() > eps).sum(0)
            counts[name] = counts[name] + active if name in counts else active
            tokens[name] = tokens.get(name, 0) + len(seen.inputs)

        subject.watch(_downs(subject), take)
    return pd.concat(
        [
            pd.DataFrame(
                {"layer": name, "neuron": range(len(n)), "active": n.cpu().numpy() / tokens[name]}
            )
            for name, n in counts.items()
        ],
        ignore_index=True,
    )


def chunk_sparsity(
    keep: "NDArray[np.bool_] | Tensor", *, chunk: int = CHUNK
) -> tuple[float, float]:
    """Return token- and chunk-level sparsity of a mask (sequences, tokens, neurons).

    The first is the share of neurons that are off on a token, the second of those that are off on
    all of ``chunk`` consecutive ones (a rest of a sequence is left out).
    """
    chunk = whole("chunk", chunk, least=1)
    mask = torch.as_tensor(keep)
    if mask.ndim != 3 or mask.shape[1] < chunk:
        raise InvalidInput(
            f"`keep` must be (sequences, tokens, neurons) of at least {chunk} tokens; got shape "
            f"{tuple(mask.shape)}."
        )
    whole_chunks = mask[:, : mask.shape[1] // chunk * chunk].unflatten(1, (-1, chunk))
    return 1 - float(mask.double().mean()), 1 - float(whole_chunks.any(2).double().mean())


@dataclass(frozen=True)
class Consistency:
    """How steadily tokens go to the same experts."""

    fixed: float
    """Share of tokens whose expert is among the best fixed ones of their segment (SRP)."""
    cached: float
    """Share of tokens whose expert is in the best cache of that size (SCH)."""
    chance: float
    """What `fixed` would be if tokens were shuffled among all segments, measured once."""


def routing_consistency(
    clusters: Int64[Tensor, "sequences tokens"], *, segment: int = 64, size: int = 2, seed: int = 0
) -> Consistency:
    """Return how well ``size`` experts serve a segment of tokens.

    Definitions of our own. ``fixed``: of every segment of consecutive tokens of a sequence, the
    share that its ``size`` most frequent experts serve, averaged. ``cached``: hits of a cache of
    ``size`` experts that always drops the one needed again last (Belady), empty at the beginning of
    a segment, over its tokens.

    Parameters
    ----------
    clusters
        Expert of every token.
    segment
        Tokens of a segment; a rest of a sequence is left out.
    size
        Experts that are held.
    seed
        Of the shuffle.
    """
    segment, size = whole("segment", segment, least=1), whole("size", size, least=1)
    found = torch.as_tensor(clusters)
    if found.ndim != 2 or found.shape[1] < segment or not found.numel():
        raise InvalidInput(
            f"`clusters` must be (sequences, tokens) of at least {segment} tokens; got shape "
            f"{tuple(found.shape)}."
        )
    if found.is_floating_point() or int(found.min()) < 0:
        raise InvalidInput("`clusters` must be whole numbers from 0 on; they are not.")
    parts = found[:, : found.shape[1] // segment * segment].reshape(-1, segment)
    order = torch.randperm(parts.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = parts.flatten()[order].view_as(parts)
    hits = [_belady(row, size) for row in parts.tolist()]
    return Consistency(_fixed(parts, size), float(np.mean(hits)), _fixed(shuffled, size))


def _fixed(parts: Tensor, size: int) -> float:
    k = int(parts.max()) + 1
    counts = torch.nn.functional.one_hot(parts.long(), k).sum(1)
    return float(counts.topk(min(size, k)).values.sum(1).double().mean()) / parts.shape[1]


def _belady(row: list[int], size: int) -> float:
    held: set[int] = set()
    hits = 0
    for at, expert in enumerate(row):
        if expert in held:
            hits += 1
            continue
        if len(held) == size:
            ahead = row[at + 1 :]
            held.remove(max(held, key=lambda e: ahead.index(e) if e in ahead else len(row)))
        held.add(expert)
    return hits / len(row)


def _downs(subject: Subject) -> list[Layer]:
    if not subject.parts:
        raise InvalidInput("the model must have feed-forward parts of linears; there are none.")
    return [part.down for part in subject.parts]


class _OutputRule(NeuronRule):
    """Keep the neurons whose outputs, times the norm of their column of `down`, are large."""

    def activation(self, x: Float[Tensor, "... neurons"]) -> Float[Tensor, "... neurons"]:
        return x.float().abs()


class Cett(ActivationMethod):
    """Neurons whose share in the output is small go, the same relative error in every layer.

    The level is the error: CETT, the mean over tokens of the norm of what is left out over the norm
    of the output.
    """

    name, source = "cett", "arXiv 2411.02335; github.com/thunlp/SparsingLaw"
    tokens = 2048
    """Of the calibration text, the first ones, that errors are measured on."""

    def fit(self) -> None:
        """Keep some tokens' neurons."""
        kept: dict[str, list[Tensor]] = {}

        def take(seen: Recorded) -> None:
            held = kept.setdefault(seen.layer.name, [])
            left = self.tokens - sum(len(x) for x in held)
            if left > 0:
                held.append(seen.inputs[:left].float().clone())

        self.subject.watch(_downs(self.subject), take)
        self._states = {name: torch.cat(parts) for name, parts in kept.items()}
        self._counted: dict[str, Scores] = {}
        self._norms: dict[str, Tensor] = {}
        self._errors: dict[tuple[str, float], float] = {}

    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at an error."""
        errors = [level_of(level, part.down) for part in self.subject.parts]
        rules = [self._rule(p, e) for p, e in zip(self.subject.parts, errors, strict=True)]
        mean = sum(errors) / len(errors)
        return ActivationSparsity(self.name, mean, self.subject, {}, rules)

    def _error(self, part: FeedForward, share: float) -> float:
        """Return the error of leaving out a share of the scores; each is measured once."""
        name = part.down.name
        if (name, share) not in self._errors:
            states, weight = self._states[name], part.down.weight.float()
            small = states.abs() * weight.norm(dim=0) <= self._counted[name].quantile(share)
            left = (states * small) @ weight.T
            kept = (left.norm(dim=1) / self._norms[name]).double().mean()
            self._errors[name, share] = float(kept)
        return self._errors[name, share]

    def _rule(self, part: FeedForward, error: float) -> NeuronRule:
        name, norms = part.down.name, part.down.weight.float().norm(dim=0)
        if name not in self._counted:
            states = self._states[name]
            self._counted[name] = counted = Scores()
            counted.update(states.abs() * norms)
            whole_norm = (states @ part.down.weight.float().T).norm(dim=1)
            self._norms[name] = whole_norm.clamp_min(1e-30)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS if error > 0 else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if self._error(part, middle) <= error else (low, middle)
        rule = _OutputRule(low, self.subject.window, "threshold", scale=norms, part=part,
                           spares_up=False)  # fmt: skip
        rule.scores = self._counted[name]
        rule.settle()
        return rule


@dataclass(frozen=True)
class PerplexitySparsity:
    """How few neurons a model needs for a perplexity that is a little higher."""

    increase: float
    """Of the perplexity, as asked."""
    reached: float
    """As found, at most that."""
    cett: float
    """Error of every feed-forward part."""
    active: float
    """Mean share of neurons that are active: 1 − PPL-p % sparsity."""


def perplexity_sparsity(
    model: AnyModel, calibration: Source, text: Source, *, increase: float = 0.01, steps: int = 10
) -> PerplexitySparsity:
    """Return the share of neurons that are active at a perplexity ``increase`` higher (PPL-p %).

    The error that all feed-forward parts have in common is bisected.

    Parameters
    ----------
    model, calibration
        As in `entangle.activation.fit`.
    text
        To measure perplexity on.
    increase
        0.01 for PPL-1 %.
    steps
        Of the bisection, each a pass over the text.
    """
    increase = share("increase", increase)
    known = as_language_model(model)
    with evaluating(known.module):
        subject = Subject(known, as_calibration(calibration, known), "mlp", Window())
        method, evaluation = Cett(subject), as_evaluation(text, known)
        dense = measure_perplexity(known, evaluation, progress=False).value
        low, high, best = 0.0, 1.0, PerplexitySparsity(increase, 0.0, 0.0, 1.0)
        for _ in range(steps):
            middle = (low + high) / 2
            made = method.at(middle)
            with made.applied():
                value = measure_perplexity(known, evaluation, progress=False).value
                shares = [rule.share_kept() for rule in made.rules]  # None where nothing goes
            active = float(np.mean([1.0 if s is None else float(s.mean()) for s in shares]))
            if value <= dense * (1 + increase):
                low = middle
                best = replace(best, reached=value / dense - 1, cett=middle, active=active)
            else:
                high = middle
    return best
