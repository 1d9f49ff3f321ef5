"""Cutting tokens into windows that lie end to end, for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from entangle.calibration.padding import first_columns, real_rows
from entangle.checks import check_seq_len, whole
from entangle.errors import InvalidInput

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How long the windows are, and how many of them are taken."""

    seq_len: int | None
    """Tokens in a window; None for `DEFAULT_SEQ_LEN` or the context, or a table's columns."""
    n_windows: int | None
    """Windows taken, from the first on; None for all."""
    context_length: int | None
    """Longest sequence that the model accepts."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("n_windows", 1)):
            value = getattr(self, name)
            counted = None if value is None else whole(name, value, least=least)
            object.__setattr__(self, name, counted)
        self._check_context(self.seq_len or 2)

    @property
    def window(self) -> int:
        """Tokens in a window of a text, special ones included."""
        return self.seq_len or min(DEFAULT_SEQ_LEN, self.context_length or DEFAULT_SEQ_LEN)

    def running_text(
        self,
        tokens: Int64[Tensor, " tokens"],
        *,
        where: str,
        around: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Int64[Tensor, "n_windows seq_len"]:
        """Return a text's windows, each between the ids ``around`` it; the rest is dropped.

        Raises
        ------
        InvalidInput
            If the text is too short; the message has the largest size that fits.
        """
        head, foot = (torch.tensor(ids, dtype=torch.int64) for ids in around)
        n_special = len(head) + len(foot)
        length = self.window - n_special
        if length < 1:
            raise InvalidInput(
                f"`seq_len` must leave room for text beside {n_special} special tokens; "
                f"got {self.window}."
            )
        available = len(tokens) // length
        if available == 0:
            longest = len(tokens) + n_special
            remedy = f"lower `seq_len` to at most {longest} or " if longest > 1 else ""
            raise InvalidInput(
                f"{where} has {len(tokens)} tokens, but one window of `seq_len` {self.window} "
                f"needs {length}; {remedy}give a longer text."
            )
        taken = self._taken(available, where)
        text = tokens[: taken * length].view(taken, length)
        return torch.cat([head.expand(taken, -1), text, foot.expand(taken, -1)], dim=1)

    def rows(
        self,
        table: Int64[Tensor, "rows columns"],
        *,
        where: str,
        mask: Bool[Tensor, "rows columns"] | None = None,
    ) -> tuple[Int64[Tensor, "n_windows seq_len"], Bool[Tensor, "n_windows seq_len"] | None, int]:
        """Return the first rows and columns of a table of ids, all of them if not asked.

        Rows with fewer than 2 tokens beside their pads are left out, as nothing is predicted in
        them; their number comes last. A row that is cut keeps its first tokens.

        Raises
        ------
        InvalidInput
            If the table has fewer, or its rows are longer than the model's context.
        """
        table, mask, left_out = real_rows(table, mask, least=2)
        rows, columns = table.shape
        length = self.seq_len or columns
        whole("seq_len", length, least=2)
        self._check_context(length if mask is None else min(length, int(mask.sum(1).max())))
        if length > columns:
            raise InvalidInput(
                f"`seq_len` must be at most {columns}, the columns of {where}; got {length}."
            )
        taken = self._taken(rows, where)
        ids, mask = first_columns(table[:taken], None if mask is None else mask[:taken], length)
        return ids.clone(), mask, left_out

    def _taken(self, available: int, where: str) -> int:
        taken = self.n_windows or available
        if taken > available:
            raise InvalidInput(
                f"`n_windows` must be at most {available}, as many as {where} has; got {taken}."
            )
        return taken

    def _check_context(self, seq_len: int) -> None:
        check_seq_len(seq_len, self.context_length)
