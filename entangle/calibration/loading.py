"""From what a user names to a `CalibrationSet`."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.affixes import of_saved
from entangle.calibration.calibration_set import CalibrationSet, check_ids
from entangle.calibration.joined_text import JoinedText
from entangle.calibration.special_tokens import (
    DEFAULT_POLICY,
    affixes,
    check_policy,
    describe_tokenizer,
    no_policy,
)
from entangle.calibration.texts import as_path, existing, open_texts, refuse
from entangle.calibration.token_files import TokenFile, integer_ids, read_token_file
from entangle.calibration.tokens import first_tokens, pool_tokens
from entangle.calibration.windows import Draw, cut_windows, take_rows
from entangle.errors import InvalidInput

Source = str | Path | Tensor | NDArray[np.generic]
Cut = tuple[Int64[Tensor, "n_seq seq_len"], dict[str, object]]
Mask = Bool[Tensor, "n_seq seq_len"] | None


def load_calibration(
    source: Source = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n_seq: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: str = "random",
    join: str = "\n\n",
    split: str | None = None,
    config: str | None = None,
    column: str | None = None,
    special_tokens: str = DEFAULT_POLICY,
    add_special_tokens: bool | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
) -> CalibrationSet:
    """Build a calibration set from a text, a data set or token ids.

    Documents are joined by ``join`` and tokenised as one text, so that anyone can recompute the
    tokens: ``tokenizer(join.join(documents), add_special_tokens=False)``, with the special tokens
    of ``special_tokens`` around.

    Parameters
    ----------
    source
        A text source of `load_texts`; a ``.safetensors`` file with an integer tensor ``ids`` or
        ``input_ids``, such as `CalibrationSet.save` writes; or an integer array. Ids of shape
        (tokens,) are cut like a text. Of ids of shape (rows, columns) the first ``n_seq`` rows and
        ``seq_len`` columns are taken, whatever ``sampling`` says.
    tokenizer
        Needed for a text, not used for token ids.
    n_seq
        Number of sequences; 128 if not given, or all rows of a table of ids.
    seq_len
        Tokens in a sequence, special ones included. If not given 2048 or ``context_length``,
        whichever is less, or all columns of a table of ids.
    seed, sampling
        ``"contiguous"``: the first tokens of the text; no more of it is read than needed.
        ``"random"``: windows drawn with ``seed`` from the text's first 2²⁴ characters, or 16 for
        every token drawn if that is more (see `entangle.calibration.windows`);
        ``settings["whole_text"]`` tells if that was all. Windows may overlap.
    join
        Put between documents, taken as it is (see `interpret_escapes`).
    split, config, column
        As in `load_texts`.
    special_tokens
        ``"model"``: around every sequence, within ``seq_len``, those that the model's tokenizer
        puts around a text (see `entangle.calibration.habit`); ``"none"``; or ``"published"``, the
        protocol of the SparseGPT code: once around the whole text, from which sequences are cut.
    add_special_tokens
        The older option: True means ``"model"``, False ``"none"``.
    context_length, vocab_size
        The model's: longer sequences and ids outside [0, vocab_size) are refused.

    Returns
    -------
    CalibrationSet
        ``settings`` has every option above and how much was read.

    Raises
    ------
    InvalidInput
        If a size is out of range, the text is too short, or the tokenizer is missing or does not
        fit the model.
    Unavailable, UnknownName
        As in `load_texts`.
    """
    draw = Draw(
        n_seq=n_seq, seq_len=seq_len, sampling=sampling, seed=seed, context_length=context_length
    )
    names = {"split": split, "config": config, "column": column}
    policy = check_policy(special_tokens, add_special_tokens)
    label = _label(source)
    found = _find(source, label)
    mask: Mask = None
    if isinstance(found, TokenFile):
        refuse(label, **names, **no_policy(special_tokens, add_special_tokens))
        ids, mask, settings = _from_ids(found, draw, label)
    else:
        ids, settings = _from_text(found, tokenizer, draw, join, policy, names)
    sizes = {"n_seq": ids.shape[0], "seq_len": ids.shape[1]}
    return CalibrationSet(check_ids(ids, vocab_size), label, {**sizes, **settings}, mask)


def _label(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return f"{type(source).__name__} of shape {tuple(source.shape)}"


def _find(source: Source, label: str) -> TokenFile | str | Path:
    """Return the token ids if that is what the source holds, else the source of text."""
    if not isinstance(source, str | Path):
        return TokenFile(integer_ids(source, name=label), None)
    path = as_path(source)
    if path is None or path.suffix.lower() != ".safetensors":
        return source
    return read_token_file(existing(path))


def _from_ids(
    stored: TokenFile, draw: Draw, label: str
) -> tuple[Int64[Tensor, "n_seq seq_len"], Mask, dict[str, object]]:
    settings: dict[str, object] = {} if stored.origin is None else {"origin": stored.origin}
    if stored.ids.ndim == 2:
        ids = take_rows(stored.ids, draw, where=label)
        mask = None if stored.mask is None else stored.mask[: len(ids), : ids.shape[1]]
        settings |= of_saved(stored.origin, whole=ids.shape[1] == stored.ids.shape[1])
        return ids, mask, {**settings, "sampling": "rows"}
    ids = cut_windows(stored.ids, draw, where=label)
    return ids, None, {**settings, **draw.settings(), "n_text_tokens": len(stored.ids)}


def _from_text(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    draw: Draw,
    join: str,
    policy: str,
    names: dict[str, str | None],
) -> Cut:
    where = repr(str(source))
    if tokenizer is None:
        raise InvalidInput(
            f"{where} is text, so it needs a tokenizer; pass the model's, or give token ids."
        )
    opened = open_texts(source, **names)
    specials = affixes(tokenizer, policy)
    text = JoinedText(opened.documents, join)
    complete = True
    if draw.sampling == "contiguous":
        wanted = draw.sequences * max(draw.window - sum(map(len, specials.around)), 1)
        tokens = first_tokens(text, tokenizer, wanted)
        complete = len(tokens.ids) < wanted
    else:
        tokens = pool_tokens(text, tokenizer, draw.pool_characters)
    running = specials.enclose(tokens.ids, complete=complete and tokens.whole_text)
    settings = {
        **opened.settings,
        **draw.settings(),
        "join": join,
        "special_tokens": dict(specials.settings),
        "tokenizer": describe_tokenizer(tokenizer),
        "n_documents": text.n_documents,
        "n_characters": tokens.n_characters,
        "n_text_tokens": len(tokens.ids),
        "whole_text": tokens.whole_text,
    }
    return cut_windows(running, draw, where=where, specials=specials.around), settings
