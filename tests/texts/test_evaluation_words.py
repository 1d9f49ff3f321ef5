"""Words and bytes of predicted tokens, against a count over characters and by hand."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from entangle.texts.words import TextCounts, count_predicted
from tests.reference import perplexity as reference
from tests.tiny_models import tiny_tokenizer
from tests.tokenizers import byte_fallback, byte_level, word_piece

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


SCRIPTS = "naïve 敏捷的 😀🎉🚀🌍 – 日本 x 😀\n"


@given(text=st.text("aé敏😀 \n", min_size=1, max_size=30), length=st.integers(2, 7),
       skipped=st.integers(0, 1))  # fmt: skip
def test_each_token_of_a_byte_level_tokenizer_is_one_byte(
    text: str, length: int, skipped: int
) -> None:
    n_tokens = len(text.encode())
    if n_tokens < length:
        return
    got = _count(text, _by_bytes(), length, skipped)
    assert got.n_bytes == n_tokens // length * (length - skipped)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_piece])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_bytes_of_windows_add_up(
    make: Callable[[], hf.PreTrainedTokenizerBase], length: int
) -> None:
    """Single tokens' bytes, and those of any windows, add up to the text's."""
    tokenizer = make()
    ids = tokenizer(SCRIPTS * 3 + "end", add_special_tokens=False)["input_ids"]
    text = SCRIPTS * 3 + "end"
    n = len(ids) // length
    parts = [
        count_predicted(text, torch.tensor(ids[: i * length]), tokenizer, n_windows=1, skipped=0)
        for i in range(1, n + 1)
    ]
    whole = count_predicted(
        text, torch.tensor(ids[: n * length]), tokenizer, n_windows=n, skipped=0
    )
    assert whole.n_bytes == parts[-1].n_bytes
    if len(ids) == n * length:
        assert whole.n_bytes == len(text.encode())
    upto = [part.n_bytes or 0 for part in parts]
    assert upto == sorted(upto)


def test_tokens_of_several_bytes_that_share_a_character() -> None:
    """The names of a byte-level tokenizer have one letter a byte, wherever it merges."""
    tokenizer, text = byte_level(), "naïve 東京は café 東京"
    encoded = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    names = tokenizer.convert_ids_to_tokens(encoded.tolist())
    upto = [sum(map(len, names[:i])) for i in range(1, len(names) + 1)]
    got = [
        count_predicted(text, encoded[:i], tokenizer, n_windows=1, skipped=0).n_bytes
        for i in range(1, len(names) + 1)
    ]
    assert got == upto
    assert any(1 < len(name) < 3 for name in names)


def test_bytes_that_a_name_tells_by_hand() -> None:
    fallback = byte_fallback()
    text = "the 京😀"  # ▁the ▁ 3 bytes 4 bytes
    assert len(fallback(text, add_special_tokens=False)["input_ids"]) == 9
    ids = torch.tensor(fallback(text, add_special_tokens=False)["input_ids"])
    got = [
        count_predicted(text, ids[:i], fallback, n_windows=1, skipped=0).n_bytes
        for i in range(1, 10)
    ]
    assert got == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_text_that_is_written_out_before_it_is_cut_shares_its_bytes() -> None:
    vocabulary = {c: i for i, c in enumerate("?fi1⁄2 x")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.normalizer = normalizers.NFKC()
    fast = _fast(tokenizer)
    text = "xﬁ½x"  # 1 + 3 + 2 + 1 bytes; f i share 3, and 1 ⁄ 2 share 2
    ids = torch.tensor(fast(text, add_special_tokens=False)["input_ids"])
    assert len(ids) == 7
    got = [
        count_predicted(text, ids[:i], fast, n_windows=1, skipped=0).n_bytes for i in range(1, 8)
    ]
    assert (got[0], got[2], got[5], got[6]) == (1, 4, 6, 7)
    assert got == sorted(x for x in got if x is not None)


def test_lower_case_counts_the_bytes_of_the_text_as_given() -> None:
    text = "Straße ÜBER"
    tokenizer = word_piece()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    got = count_predicted(text, ids, tokenizer, n_windows=1, skipped=0)
    assert got.n_bytes == len(text.encode())


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
