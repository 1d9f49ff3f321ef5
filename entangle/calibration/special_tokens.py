"""What a tokenizer is, and which special tokens it puts around a text."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from entangle.errors import InvalidInput


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special token ids that the tokenizer puts before and after one text.

    Raises
    ------
    InvalidInput
        If the tokenizer puts them anywhere else.
    """
    bare: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full: list[int] = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InvalidInput(
        "`add_special_tokens` needs a tokenizer that puts them only before and after a text; "
        f"got {type(tokenizer).__name__}."
    )


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return class, name, size and SHA-256 of the vocabulary (token and id pairs, sorted)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "name": str(tokenizer.name_or_path),
        "n_tokens": len(tokenizer),
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
