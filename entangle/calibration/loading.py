"""From what a user gives to a `CalibrationSet`."""

from pathlib import Path

from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.affixes import of_saved
from entangle.calibration.calibration_set import CalibrationSet, check_ids
from entangle.calibration.given import Source, Wanted, find, label_of
from entangle.calibration.joined_text import JoinedText
from entangle.calibration.padding import note_unmasked_pads
from entangle.calibration.special_tokens import (
    DEFAULT_POLICY,
    affixes,
    check_policy,
    describe_tokenizer,
    no_policy,
)
from entangle.calibration.texts import TextSource, open_texts, refuse
from entangle.calibration.token_files import TokenFile
from entangle.calibration.tokens import first_tokens, pool_tokens
from entangle.calibration.windows import Draw, cut_windows, is_running, take_rows
from entangle.checks import check_seq_len
from entangle.errors import InvalidInput
from entangle.models.loading import LanguageModel
from entangle.progress import tell

Cut = tuple[Int64[Tensor, "n_seq seq_len"], dict[str, object]]
Mask = Bool[Tensor, "n_seq seq_len"] | None

DEFAULT_SPLIT = "train"


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
        Text: a source of `load_texts`; a list of strings, a pandas column of them, or a table with
        a column of text (a DataFrame, a list of dictionaries, a `datasets` Dataset, IterableDataset
        or DatasetDict, or a folder that ``save_to_disk`` wrote): a document each.

        Or token ids: a ``.safetensors`` file with an integer tensor ``ids`` or ``input_ids``, such
        as `CalibrationSet.save` writes; an integer array or list; a tokenizer's output or another
        dictionary with ``input_ids``; a table with a column ``input_ids`` and none of text; a list
        of rows, or of the (input, target) pairs that the loaders of SparseGPT and Wanda give. An
        ``attention_mask`` beside the ids is honoured, and rows of different lengths are padded
        (`CalibrationSet.mask`); rows of pads alone are left out, which is said. Ids of shape
        (tokens,) are cut like a text, and so is one row that is longer than ``seq_len`` or the
        context. Of ids of shape (rows, columns) the first ``n_seq`` rows, and the first ``seq_len``
        tokens of each, are taken, whatever ``sampling`` says.
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
        As in `load_texts`; also of `datasets` objects and tables.
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
    label = label_of(source)
    found = find(source, Wanted(split, config, column, (DEFAULT_SPLIT,), draw.n_seq))
    mask: Mask = None
    if isinstance(found, TokenFile):
        refuse(label, **no_policy(special_tokens, add_special_tokens))
        pad = getattr(tokenizer, "pad_token_id", None)
        note_unmasked_pads(found.ids, pad, found.mask, label)
        ids, mask, settings = _from_ids(found, draw, label)
    else:
        ids, settings = _from_text(found, label, tokenizer, draw, join, policy, names)
    sizes = {"n_seq": ids.shape[0], "seq_len": ids.shape[1]}
    made = CalibrationSet(ids, label, {**sizes, **settings}, mask)
    check_ids(made.ids, vocab_size)
    return made


def as_calibration(source: Source, model: LanguageModel) -> CalibrationSet:
    """Return a calibration set that fits a model.

    Parameters
    ----------
    source
        A set, which is returned as it is, or whatever else `load_calibration` takes, with its
        default settings.
    model
        Its tokenizer makes the tokens of a text.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a sequence is longer than the model's context or an id no token of it; and as
        `load_calibration`.
    """
    limit = model.context_length
    if not isinstance(source, CalibrationSet):
        return load_calibration(
            source, model.tokenizer, context_length=limit, vocab_size=model.vocab_size
        )
    check_seq_len(source.longest, limit)
    check_ids(source.ids, model.vocab_size)
    return source


def _from_ids(
    stored: TokenFile, draw: Draw, label: str
) -> tuple[Int64[Tensor, "n_seq seq_len"], Mask, dict[str, object]]:
    settings: dict[str, object] = {} if stored.origin is None else {"origin": stored.origin}
    if not is_running(stored.ids, draw.seq_len or draw.context_length):
        ids, mask, left_out = take_rows(stored.ids, draw, where=label, mask=stored.mask)
        settings |= of_saved(stored.origin, whole=ids.shape[1] == stored.ids.shape[1])
        return ids, mask, {**settings, "sampling": "rows", **empty_rows(left_out, label)}
    running = stored.ids if stored.mask is None else stored.ids[stored.mask]
    running = running.flatten()
    ids = cut_windows(running, draw, where=label)
    return ids, None, {**settings, **draw.settings(), "n_text_tokens": len(running)}


def empty_rows(count: int, label: str, *, least: int = 1) -> dict[str, object]:
    """Say, and return for the settings, how many rows were left out for want of tokens."""
    if not count:
        return {}
    tell(f"{count} row(s) of {label} with fewer than {least} token(s) beside pads are left out")
    return {"rows_left_out": count}


def _from_text(
    source: str | Path | TextSource,
    label: str,
    tokenizer: PreTrainedTokenizerBase | None,
    draw: Draw,
    join: str,
    policy: str,
    names: dict[str, str | None],
) -> Cut:
    where = repr(label)
    if tokenizer is None:
        raise InvalidInput(
            f"{where} is text, so it needs a tokenizer; pass the model's, or give token ids."
        )
    opened = (
        source
        if isinstance(source, TextSource)
        else open_texts(
            source, split=names["split"], config=names["config"], column=names["column"]
        )
    )
    specials = affixes(tokenizer, policy)
    text = JoinedText(opened.documents, join)
    complete = True
    if draw.sampling == "contiguous":
        wanted = draw.sequences * max(draw.window - sum(map(len, specials.around)), 1)
        tokens = first_tokens(text, tokenizer, wanted)
        complete = len(tokens.ids) < wanted
    else:
        tokens = pool_tokens(text, tokenizer, draw.pool_characters)
    if not text.holds_text:
        raise InvalidInput(f"{where} holds no text: every document in it is empty.")
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
