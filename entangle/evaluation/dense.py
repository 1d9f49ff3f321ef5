"""The dense model on a text, kept so that changed models can be compared with it."""

from types import TracebackType

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.calibration import Source
from entangle.evaluation.forward import as_causal_model
from entangle.evaluation.perplexity import Perplexity, window_memory, windows_in_a_pass
from entangle.evaluation.text import as_evaluation
from entangle.memory import memory_for
from entangle.models.blocks import BlockRunner
from entangle.models.evaluating import evaluating
from entangle.models.loading import AnyModel
from entangle.progress import ProgressBar
from entangle.recording.stream import ByteBudget, TokenStore


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
                losses.append(text.losses(self._runner.leave(hidden, ids), ids))
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

    def logits(self, start: int, end: int) -> Float[Tensor, "windows tokens vocabulary"]:
        """Return the dense model's logits of the windows from ``start`` up to ``end``.

        These must have one length, as in `EvaluationText.rows`.
        They are those of the dense model's own forward pass bit for bit, if these windows ran
        together then.
        """
        (_, ids), ends = next(self.text.rows.batches(end - start, start)), self.text.rows.ends
        rows = self._store.span(ends[start], ends[end]).to(self._model.device)
        with evaluating(self._model.module):
            return self._runner.leave(rows.unflatten(0, tuple(ids.shape)), ids)

    def _last_hidden(self, ids: Int64[Tensor, "windows tokens"]) -> Tensor:
        hidden, inputs = self._runner.enter(ids)
        for index in range(self._runner.n_blocks):
            hidden = self._runner.run(index, hidden, inputs)
        return hidden
