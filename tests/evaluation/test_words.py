"""Words and bytes of predicted tokens, against a count over characters and by hand."""

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from entangle.evaluation.words import TextCounts, count_predicted
from tests.reference import perplexity as reference
from tests.tiny_models import tiny_tokenizer

CHARACTERS = tiny_tokenizer()  # one token a character


def _fast(tokenizer: Tokenizer) -> hf.PreTrainedTokenizerBase:
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def _by_words() -> hf.PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are words; spaces belong to none."""
    vocabulary = {word: i for i, word in enumerate(["?", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def _by_bytes() -> hf.PreTrainedTokenizerBase:
    vocabulary = {token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def _count(
    text: str, tokenizer: hf.PreTrainedTokenizerBase, length: int, skipped: int
) -> TextCounts:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    n = len(ids) // length
    return count_predicted(text, ids[: n * length], tokenizer, n_windows=n, skipped=skipped)


@given(
    text=st.text("ab \n", min_size=4, max_size=40),
    length=st.integers(2, 4),
    skipped=st.integers(0, 1),
)
def test_against_the_reference(text: str, length: int, skipped: int) -> None:
    n = len(text) // length
    spans = [(i * length + skipped, (i + 1) * length) for i in range(n)]
    got = _count(text, CHARACTERS, length, skipped)
    n_bytes = n * (length - skipped)
    assert got == TextCounts(reference.words_begun(text, spans), n_bytes)


def test_whole_text_has_the_words_of_the_harness() -> None:
    text = "Some words, some more.\n\nAnd then the last two"
    assert _count(text, CHARACTERS, len(text), 0) == TextCounts(len(text.split()), len(text))


def test_words_as_tokens_by_hand() -> None:
    text = "one two  three\n\nfour one"
    assert _count(text, _by_words(), 2, 1) == TextCounts(2, len(" two") + len("\n\nfour"))
    assert _count(text, _by_words(), 2, 0) == TextCounts(4, len("one two  three\n\nfour"))


def test_bytes_of_characters_that_are_no_ascii() -> None:
    text = "é ü née"  # 10 bytes, one token each
    assert _count(text, _by_bytes(), 10, 0) == TextCounts(3, 10)


def test_a_tokenizer_without_places_counts_nothing() -> None:
    slow = hf.ByT5Tokenizer()
    assert not slow.is_fast
    assert _count("one two", slow, 2, 1) == TextCounts(None, None)


def test_ids_of_another_text_count_nothing() -> None:
    ids = torch.tensor(CHARACTERS("abcd", add_special_tokens=False)["input_ids"])
    got = count_predicted("abce", ids, CHARACTERS, n_windows=2, skipped=1)
    assert got == TextCounts(None, None)


@pytest.mark.parametrize("text", ["    ", "\n\n\n\n"])
def test_no_words(text: str) -> None:
    assert _count(text, CHARACTERS, 2, 1) == TextCounts(0, 2)
