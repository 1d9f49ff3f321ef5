"""The immutable value that a calibration run works on."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from entangle.calibration.padding import Rows, check_filled, checked_mask
from entangle.calibration.token_files import METADATA_KEY, read_token_file
from entangle.checks import whole
from entangle.errors import InvalidInput
from entangle.provenance import output_file

_TOKENS_IN_A_PASS = 4096


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Sequences of token ids with their origin."""

    ids: Int64[Tensor, "n_seq seq_len"]
    """Token ids, shape (n_seq, seq_len), int64, on the CPU; 0 where there is a pad."""
    source: str
    """What the user gave: a name, a data set's id, a path, or the kind of an array."""
    settings: Mapping[str, object]
    """Everything that decided the ids (sizes, seed, join, tokenizer, …); JSON-serialisable."""
    mask: Bool[Tensor, "n_seq seq_len"] | None = None
    """True where an id is a token of the text, False where it is a pad; None where all are tokens.
    A row's tokens are one run. Pads never enter a model."""

    def __post_init__(self) -> None:
        if self.ids.numel() == 0 or self.ids.device.type != "cpu":
            raise InvalidInput(
                "`ids` must hold at least one token and lie on the CPU; "
                f"got shape {tuple(self.ids.shape)} on {self.ids.device}."
            )
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise InvalidInput(
                "`ids` must be int64 of shape (n_seq, seq_len); "
                f"got {self.ids.dtype} of shape {tuple(self.ids.shape)}."
            )
        mask = checked_mask(self.mask, self.ids)
        if mask is not None:
            check_filled(mask)
            object.__setattr__(self, "ids", self.ids.masked_fill(~mask, 0))
        object.__setattr__(self, "mask", mask)
        copied = json.loads(json.dumps(dict(self.settings)))
        object.__setattr__(self, "settings", MappingProxyType(copied))

    @property
    def n_seq(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence, pads included."""
        return self.ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences, pads left out."""
        return self.rows.ends[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, pads left out."""
        return max(self.rows.lengths)

    @cached_property
    def rows(self) -> Rows:
        """The sequences without their pads."""
        return Rows(self.ids, self.mask)

    def place(self, position: int) -> tuple[int, int]:
        """Return the sequence and the place in it of a token, counted over all sequences."""
        sequence = bisect_right(self.rows.ends, position) - 1
        return sequence, position - self.rows.ends[sequence]

    @property
    def per_pass(self) -> int:
        """Sequences in one forward pass by default: as many as make 4,096 tokens."""
        return max(1, _TOKENS_IN_A_PASS // self.seq_len)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of n_seq, seq_len and then the ids, as little-endian int64.

        Where there are pads, a byte for every id follows: 1 for a token of the text, 0 for a pad.
        """
        found = hashlib.sha256(np.array(self.ids.shape, dtype="<i8").tobytes())
        found.update(np.ascontiguousarray(self.ids.numpy(), dtype="<i8").data)
        if self.mask is not None:
            found.update(np.ascontiguousarray(self.mask.numpy()).data)
        return found.hexdigest()

    def describe(self) -> dict[str, object]:
        """Return source, sizes, digest and settings, JSON-serialisable, for a run's manifest."""
        return {
            "source": self.source,
            "n_seq": self.n_seq,
            "seq_len": self.seq_len,
            "n_tokens": self.n_tokens,
            "digest": self.digest,
            "settings": dict(self.settings),
        }

    def batches(self, n: int | None = None) -> Iterator[tuple[int, Int64[Tensor, "batch tokens"]]]:
        """Yield the index of the first sequence and the ids of ``n`` sequences at a time, unpadded.

        A batch holds neighbours of one length, and may hold fewer; without ``n`` up to `per_pass`.
        The ids are views, not copies.
        """
        return self.rows.batches(self.per_pass if n is None else whole("n", n, least=1))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the ids and their origin to a ``.safetensors`` file.

        The file is written under a temporary name in the same folder, then renamed. It is itself a
        calibration source: ``load_calibration(path)`` gives the same ids.

        Parameters
        ----------
        path
            File to write; its name must end in ``.safetensors``.
        force
            Replace a file that exists.

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        InvalidInput
            If the name has another ending, or the file exists and ``force`` is false.
        Unavailable
            If the file cannot be written.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise InvalidInput(
                f"a calibration set's file must end in .safetensors; got '{target}'."
            )
        if target.exists() and not force:
            raise InvalidInput(f"'{target}' exists; choose another name or pass `force=True`.")
        metadata = {METADATA_KEY: json.dumps(self.describe())}
        tensors = {"ids": self.ids.contiguous()}
        if self.mask is not None:
            tensors["attention_mask"] = self.mask.to(torch.int64)
        content = safetensors.torch.save(tensors, metadata=metadata)
        with output_file(target, remedy="choose another folder") as temporary:
            temporary.write_bytes(content)
        return target

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Read a set that `save` wrote, with its own source and settings.

        Raises
        ------
        Unavailable
            If the file is missing or unreadable.
        InvalidInput
            If it is corrupt, was not written by `save`, or its ids do not match its digest.
        """
        file = read_token_file(Path(path))
        if file.origin is None or file.ids.ndim != 2:
            raise InvalidInput(
                f"'{path}' was not written by `CalibrationSet.save`; "
                "read a file of bare token ids with `load_calibration`."
            )
        loaded = cls(file.ids, file.origin["source"], file.origin["settings"], file.mask)
        if loaded.digest != file.origin["digest"]:
            raise InvalidInput(f"the ids in '{path}' do not match its digest; make the set again.")
        return loaded


def check_ids(
    ids: Int64[Tensor, "n_seq seq_len"], vocab_size: int | None
) -> Int64[Tensor, "n_seq seq_len"]:
    """Return ``ids`` if every one lies in [0, vocab_size), raise `InvalidInput` otherwise."""
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0:
        raise InvalidInput(
            f"token ids must be at least 0; got {low}: give the inputs, not targets (where -100 "
            f"marks what is not predicted), and pads beside an attention_mask."
        )
    if vocab_size is not None and high >= vocab_size:
        raise InvalidInput(
            f"the tokenizer does not fit the model: token id {high} is outside the model's "
            f"[0, {vocab_size}); use the tokenizer that belongs to the model."
        )
    return ids
