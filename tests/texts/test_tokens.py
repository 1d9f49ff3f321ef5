"""Tokenising in overlapping chunks must give what tokenising the whole text gives."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from entangle.texts import calibration
from entangle.texts.calibration import JoinedText
from entangle.texts.special_tokens import describe_tokenizer
from tests.tiny_models import tiny_tokenizer

SYLLABLES = ("ab", "abab", " a", "ba", "aa", " ba", "nn", "é", " é", "éa", "\n\n", "aaaa")
MERGES = [("a", "b"), ("ab", "ab"), (" ", "a"), ("b", "a"), ("a", "a"), (" ", "ba"), ("n", "n")]
MERGES += [(" ", "é"), ("é", "a"), ("\n", "\n"), ("aa", "aa")]


def _bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    normalizer: normalizers.Normalizer | None = None,
) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens depend on their neighbours, so that a cut shows."""
    pieces = ["<unk>", *"ab né\n_", *SYLLABLES]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, unk_token="<unk>"))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    fast: Any = hf.PreTrainedTokenizerFast
    wrapped: hf.PreTrainedTokenizerFast = fast(tokenizer_object=backend, unk_token="<unk>")
    return wrapped


TOKENIZERS: dict[str, Callable[[], hf.PreTrainedTokenizerFast]] = {
    "one token a character": tiny_tokenizer,
    "merges over the whole text": _bpe,
    "words": lambda: _bpe(pre_tokenizers.WhitespaceSplit()),
    "marked first word": lambda: _bpe(normalizer=normalizers.Prepend("_")),
}


class SlowTokenizer(hf.PythonBackend):
    """Pieces of ``size`` letters from the left of every word; no offsets."""

    size = 2

    def __init__(self) -> None:
        super().__init__(unk_token="<unk>")  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return 1000

    def get_vocab(self) -> dict[str, int]:
        return {"<unk>": 0}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return [
            word[i : i + self.size] for word in text.split() for i in range(0, len(word), self.size)
        ]

    def _convert_token_to_id(self, token: str) -> int:
        return sum(map(ord, token)) % 1000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", 61)  # no multiple of a token of a run
    monkeypatch.setattr(calibration, "OVERLAP", 30)


def _text(length: int, seed: int = 0) -> str:
    letters = random.Random(seed).choices("ab né", weights=[6, 4, 2, 1, 1], k=length)
    return "".join(letters)


def _expected(tokenizer: hf.PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [0, 1, 60, 61, 62, 91, 92, 122, 1000, 5000])
def test_chunks_equal_the_whole(name: str, length: int) -> None:
    tokenizer, text = TOKENIZERS[name](), _text(length)
    got = calibration.pool_tokens(JoinedText([[text]], ""), tokenizer, 10**6)
    assert got.ids.tolist() == _expected(tokenizer, text)
    assert (got.n_characters, got.whole_text) == (length, True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("n", [1, 20, 300])
def test_first_tokens_are_those_of_the_whole(name: str, n: int) -> None:
    tokenizer, text = TOKENIZERS[name](), _text(4000)
    got = calibration.first_tokens(JoinedText([[text]], ""), tokenizer, n)
    assert got.ids.tolist() == _expected(tokenizer, text)[:n]
    assert not got.whole_text


@pytest.mark.usefixtures("small_chunks")
@given(st.lists(st.text("ab né\n", max_size=90), max_size=12), st.sampled_from(["", " ", "\n\n"]))
def test_documents_are_joined_then_tokenised(documents: list[str], join: str) -> None:
    tokenizer = _bpe()
    text = JoinedText([[document[:7], document[7:]] for document in documents], join)
    got = calibration.pool_tokens(text, tokenizer, 10**6)
    assert got.ids.tolist() == _expected(tokenizer, join.join(documents))
    assert text.n_documents == len(documents)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("text", ["a" * 1001, "ab" * 700, " " * 400, "é" * 333])
def test_runs_without_a_safe_place_to_cut(text: str) -> None:
    tokenizer = _bpe(pre_tokenizers.WhitespaceSplit())
    got = calibration.pool_tokens(JoinedText([[text]], ""), tokenizer, 10**6)
    assert got.ids.tolist() == _expected(tokenizer, text)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shift", range(0, 60, 3))
def test_token_longer_than_the_place_where_chunks_meet(shift: int) -> None:
    word = "b" * 40
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, word: 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = hf.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, unk_token="<unk>")
    text = " a" * shift + f" {word}" + " a" * 100
    got = calibration.pool_tokens(JoinedText([[text]], ""), tokenizer, 10**6)
    assert got.ids.tolist() == [1] * shift + [2] + [1] * 100


def test_by_hand() -> None:
    tokenizer = tiny_tokenizer()
    got = calibration.pool_tokens(JoinedText([["a"], ["b"]], "c"), tokenizer, 2)
    assert tokenizer.decode(got.ids.tolist()) == "ac"
    assert (got.n_characters, got.whole_text) == (2, False)


@pytest.mark.usefixtures("small_chunks")
def test_pool_is_the_tokens_of_the_first_characters() -> None:
    tokenizer, text = _bpe(), _text(1000)
    for length in (1, 64, 500, 999, 1000):
        got = calibration.pool_tokens(JoinedText([[text]], ""), tokenizer, length)
        assert got.ids.tolist() == _expected(tokenizer, text[:length])
        assert (got.n_characters, got.whole_text) == (length, length == 1000)


@pytest.mark.usefixtures("small_chunks")
def test_reads_no_more_than_needed() -> None:
    read: list[int] = []

    def documents() -> Iterator[list[str]]:
        for number in range(10**6):
            read.append(number)
            yield [_text(50, seed=number)]

    calibration.first_tokens(JoinedText(documents(), "\n\n"), _bpe(), 100)
    assert len(read) < 20


@pytest.mark.usefixtures("small_chunks")
def test_holds_only_a_part_of_the_text() -> None:
    class Watched(JoinedText):
        longest = 0

        def span(self, begin: int, end: int) -> str:
            self.longest = max(self.longest, len(self._held))
            return super().span(begin, end)

    text = Watched([[_text(20)] for _ in range(1000)], " ")
    calibration.pool_tokens(text, _bpe(), 10**6)
    assert 0 < text.longest <= 2 * (61 + 30)


def test_forgotten_text_is_refused() -> None:
    text = JoinedText([["abcdef"]], "")
    assert (text.span(0, 4), text.span(2, 9)) == ("abcd", "cdef")
    text.forget(3)
    assert text.span(3, 5) == "de"
    with pytest.raises(ValueError, match=r"`begin`.*\b2\b"):
        text.span(2, 4)


@pytest.mark.parametrize("n", [1, 100, 900, 10**5])
def test_tokenizer_without_offsets(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "OVERLAP", 8)
    tokenizer, text = SlowTokenizer(), _text(3001)
    got = calibration.first_tokens(JoinedText([[text]], ""), tokenizer, n)
    assert got.ids.tolist() == _expected(tokenizer, text)[:n]
    pool = calibration.pool_tokens(JoinedText([[text]], ""), tokenizer, 1001)
    assert pool.ids.tolist() == _expected(tokenizer, text[:1001])


def test_cut_through_a_word_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "OVERLAP", 30)
    tokenizer, rng = SlowTokenizer(), random.Random(0)
    tokenizer.size = 100
    text = " ".join("abcdefgh"[: rng.randint(1, 7)] for _ in range(400))
    expected = _expected(tokenizer, text)
    for n in range(1, 200):
        got = calibration.first_tokens(JoinedText([[text]], ""), tokenizer, n)
        assert got.ids.tolist() == expected[:n]


def test_long_text_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    got = calibration.pool_tokens(JoinedText([["a" * 100]], ""), tokenizer, 100)
    assert len(got.ids) == 100
    assert not caplog.records
    assert not tokenizer.deprecation_warnings


def test_truncation_set_in_the_tokenizer_has_no_effect() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=5)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    got = calibration.pool_tokens(JoinedText([["a" * 100]], ""), tokenizer, 100)
    assert len(got.ids) == 100


def test_tokenizers_with_other_words_are_told_apart() -> None:
    tiny, other = tiny_tokenizer(), _bpe()
    assert describe_tokenizer(tiny) == describe_tokenizer(tiny_tokenizer())
    key = "vocabulary_sha256"
    assert describe_tokenizer(tiny)[key] != describe_tokenizer(other)[key]
