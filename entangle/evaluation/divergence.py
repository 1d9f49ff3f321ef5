"""How far a changed model's next-token distributions are from the dense model's.

The dense model on a text, kept so that changed models can be compared with it.
"""

from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.evaluation.logits import Parts, as_causal_model, check_fits, logits_in_parts
from entangle.evaluation.perplexity import Perplexity, window_memory, windows_in_a_pass
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner, evaluating
from entangle.models.loading import AnyModel
from entangle.precision import accumulator_dtype
from entangle.recording.stream import ByteBudget, TokenStore
from entangle.runs.progress import ProgressBar
from entangle.stats.intervals import Interval, window_mean_interval
from entangle.texts.evaluation import as_evaluation
from entangle.texts.given import Source


class DenseReference:
    """What a dense model makes of a text, to compare changed models with.

    The model runs over the text once, block by block. Its hidden states after the last block are
    kept, which are smaller than its logits by the ratio of hidden size to vocabulary; the logits
    of a window are computed from them again, by the model's own final norm and head.

    Parameters
    ----------
    model
        The dense model, as in `perplexity`. Later edits of its weights must lie inside its blocks:
        the reference uses its embeddings, final norm and head whenever it is asked for logits, and
        does not check that they are as they were. Blocks must carry no hooks of their own that
        change outputs.
    text
        From `load_evaluation`, or what that takes.
    memory
        Bytes of hidden states in memory, half of what is free by default; what is beyond spills
        (`entangle.recording.stream.TokenStore`).
    batch_size
        Windows in one forward pass; by default as `entangle.evaluation.perplexity.perplexity`.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput
        If the model does not predict next tokens, cannot be run block by block (`BlockRunner`), or
        the text does not fit it.
    MemoryLimit
        If memory runs out.
    """

    def __init__(
        self,
        model: AnyModel,
        text: Source,
        *,
        memory: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self._model = as_causal_model(model)
        self.text = text = as_evaluation(text, self._model)
        """The text."""
        self.batch_size = windows_in_a_pass(batch_size, self._model, text)
        """Windows that ran in one forward pass."""
        self._store = TokenStore(ByteBudget(memory_for(memory, self._model.module)))
        with evaluating(self._model.module):
            self._runner = BlockRunner(self._model.module)
            self.perplexity = self._measured(progress)
            """Of the dense model."""

    def _measured(self, progress: bool | None) -> Perplexity:
        text, losses = self.text, []
        with ProgressBar("dense model", enabled=progress) as bar, window_memory(self.batch_size):
            bar.start(text.n_windows, "windows")
            for _, ids in text.rows.batches(self.batch_size):
                hidden = self._last_hidden(ids)
                self._store.append(hidden.flatten(0, -2))
                losses.append(text.losses_in_parts(self._runner.leave_in_parts(hidden, ids), ids))
                bar.advance(len(ids))
        return Perplexity.of(torch.cat(losses), text)

    def __enter__(self) -> "DenseReference":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the hidden states; again does nothing."""
        self._store.close()

    def logits(
        self, start: int, end: int, part: slice = slice(None)
    ) -> Float[Tensor, "windows tokens vocabulary"]:
        """Return the dense model's logits of the windows from ``start`` up to ``end``.

        Of ``part`` of their tokens alone, where that is asked for.

        These must have one length, as in `EvaluationText.rows`.
        They are those of the dense model's own forward pass bit for bit, if these windows ran
        together then.
        """
        (_, ids), ends = next(self.text.rows.batches(end - start, start)), self.text.rows.ends
        rows = self._store.span(ends[start], ends[end]).to(self._model.device)
        with evaluating(self._model.module):
            return self._runner.leave(rows.unflatten(0, tuple(ids.shape))[:, part], ids[:, part])

    def _last_hidden(self, ids: Int64[Tensor, "windows tokens"]) -> Tensor:
        hidden, inputs = self._runner.enter(ids)
        for index in range(self._runner.n_blocks):
            hidden = self._runner.run(index, hidden, inputs)
        return hidden


LOGITS_AT_ONCE = 2**18
"""Logits of each model compared at a time: few, as work within the processor's cache is faster."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """How a model's next-token distributions on a text differ from the dense model's."""

    perplexity: Perplexity
    """Of the changed model, as `perplexity` measures it."""
    dense: Perplexity
    """Of the dense model."""
    window_kl: NDArray[np.float64]
    """Summed KL(dense ‖ changed) of each window's predicted positions in nats, shape
    (n_windows,)."""
    window_agreements: NDArray[np.int64]
    """Predicted positions of each window at which both models have the same most probable token,
    shape (n_windows,)."""
    window_positions: NDArray[np.int64]
    """Predicted positions of each window, shape (n_windows,)."""

    def __post_init__(self) -> None:
        for values in (self.window_kl, self.window_agreements, self.window_positions):
            values.setflags(write=False)

    @property
    def n_positions(self) -> int:
        """Predicted positions in all windows."""
        return int(self.window_positions.sum())

    @property
    def kl(self) -> float:
        """Mean KL(dense ‖ changed) in nats a token. NaN where a logit is."""
        return float(self.window_kl.sum() / self.n_positions)

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both models have the same most probable token."""
        return float(self.window_agreements.sum() / self.n_positions)

    def interval(
        self, name: str, *, n_boot: int = 1000, seed: int = 0, level: float = 0.95
    ) -> Interval:
        """Return a measure with a percentile bootstrap interval over windows.

        Parameters
        ----------
        name
            ``kl``, ``top1_agreement`` or ``loss`` (mean loss of the changed model in nats a token).
        n_boot, seed, level
            As in `entangle.stats.intervals.window_mean_interval`.

        Raises
        ------
        UnknownName
            If there is no such measure.
        """
        sums = {
            "kl": self.window_kl,
            "top1_agreement": self.window_agreements.astype(np.float64),
            "loss": self.perplexity.window_losses,
        }
        name = choice("name", name, sums, kind="measure")
        return window_mean_interval(
            sums[name], self.window_positions, n_boot=n_boot, seed=seed, level=level
        )


def compare_with_dense(
    model: AnyModel,
    reference: DenseReference,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Divergence:
    """Compare a changed model's next-token distributions with the dense model's, in one pass.

    Parameters
    ----------
    model
        The changed model, as in `perplexity`, which may be the reference's own with edits inside
        its blocks.
    reference
        The dense model on a text.
    batch_size
        Windows in one forward pass, which only rounding depends on; by default those of the
        reference, with which an unchanged model gives its logits bit for bit. Logits of both
        models are held for so many windows.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Returns
    -------
    Divergence
        NaN logits give NaN for the window's KL and count as disagreements.

    Raises
    ------
    InvalidInput
        If the model does not predict next tokens, has another vocabulary, or the text does not
        fit it.
    MemoryLimit
        If memory runs out.
    """
    language_model, text = as_causal_model(model), reference.text
    check_fits(language_model, text)
    asked = reference.batch_size if batch_size is None else batch_size
    per_pass = windows_in_a_pass(asked, language_model, text)
    losses, divergences, agreements = [], [], []
    held = evaluating(language_model.module)
    with held, ProgressBar("divergence", enabled=progress) as bar, window_memory(per_pass):
        bar.start(text.n_windows, "windows")
        for start, ids in text.rows.batches(per_pass):
            found = _Windows(reference, start, len(ids))
            losses.append(
                text.losses_in_parts(found.seen(logits_in_parts(language_model, ids)), ids)
            )
            divergences.append(found.kl)
            agreements.append(found.agreed)
            bar.advance(len(ids))
    return Divergence(
        perplexity=Perplexity.of(torch.cat(losses), text),
        dense=reference.perplexity,
        window_kl=torch.cat(divergences).numpy(),
        window_agreements=torch.cat(agreements).numpy(),
        window_positions=text.window_tokens,
    )


class _Windows:
    """KL and agreements of some windows, summed while a model's logits come in parts."""

    def __init__(self, reference: DenseReference, start: int, count: int) -> None:
        self._reference, self._start = reference, start
        self.kl = torch.zeros(count, dtype=torch.float64)
        self.agreed = torch.zeros(count, dtype=torch.int64)

    def seen(self, parts: Parts) -> Parts:
        """Yield the parts as they are, each compared with the dense model's."""
        text, start, end = self._reference.text, self._start, self._start + len(self.kl)
        last = text.rows.lengths[start] - 1 - text.around[1]
        for place, changed in parts:
            part = slice(place, place + changed.shape[1])
            dense = self._reference.logits(start, end, part).to(changed.device)
            _check_vocabulary(changed, dense)
            first = max(0, text.first_predicted - 1 - place)
            counted = slice(first, max(first, last - place))
            kl, agreed = _compare(dense[:, counted], changed[:, counted])
            self.kl += kl
            self.agreed += agreed
            del dense
            yield place, changed


def _check_vocabulary(changed: Tensor, dense: Tensor) -> None:
    if changed.shape != dense.shape:
        raise InvalidInput(
            f"a model must have as many logits as the dense one, {dense.shape[-1]}, to be "
            f"compared; got {changed.shape[-1]}."
        )


def _compare(
    dense: Float[Tensor, "windows positions vocabulary"],
    changed: Float[Tensor, "windows positions vocabulary"],
) -> tuple[Float[Tensor, " windows"], Int64[Tensor, " windows"]]:
    """Return each window's summed KL and number of agreements, a bounded part at a time."""
    rows = max(1, LOGITS_AT_ONCE // dense.shape[-1])
    sums = torch.zeros(len(dense), dtype=torch.float64)
    agreed = torch.zeros(len(dense), dtype=torch.int64)
    for window in range(len(dense)):
        parts = zip(dense[window].split(rows), changed[window].split(rows), strict=True)
        for dense_part, changed_part in parts:
            sums[window] += _kl(dense_part, changed_part).sum().item()
            agreed[window] += _agree(dense_part, changed_part).sum().item()
    return sums, agreed


def _kl(
    dense: Float[Tensor, "positions vocabulary"], changed: Float[Tensor, "positions vocabulary"]
) -> Float[Tensor, " positions"]:
    """Return KL(dense ‖ changed) at every position in nats, from logits.

    In float64, as the rounding of a float32 normaliser alone is some 1e-6 nats at a position.
    """
    dtype = accumulator_dtype(dense.device)
    p, q = (logits.to(dtype).log_softmax(-1) for logits in (dense, changed))
    weight = p.exp()
    gap = (p - q).masked_fill_(weight == 0, 0.0)  # 0 · log 0 is 0
    return (weight * gap).sum(-1).clamp_(min=0.0).cpu().double()


def _agree(
    dense: Float[Tensor, "positions vocabulary"], changed: Float[Tensor, "positions vocabulary"]
) -> Tensor:
    (top, place), (other_top, other_place) = dense.max(-1), changed.max(-1)
    return (place == other_place) & ~top.isnan() & ~other_top.isnan()
