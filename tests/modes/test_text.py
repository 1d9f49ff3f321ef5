import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from entangle.texts.words import TokenText, decoded
from tests.tiny_models import tiny_tokenizer
from tests.tokenizers import byte_fallback, byte_level, word_piece

HARD = "the 東京 naïve\n\tfox\x00 \u202emirrored\u202c привет 👨‍👩‍👧 \ufeffend"


def ids_of(tokenizer: hf.PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def bytes_tokenizer() -> hf.PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def fallback_tokenizer() -> hf.PreTrainedTokenizerFast:
    return byte_fallback()


def test_byte_level_runs_are_the_text(bytes_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text = TokenText(bytes_tokenizer)
    plain = "the naïve 東京 fox, здравствуй 👨‍👩‍👧"
    assert text.run(ids_of(bytes_tokenizer, plain)) == plain
    shown = text.run(ids_of(bytes_tokenizer, HARD))
    assert shown == ("the 東京 naïve\\n\\tfox\\x00 \\u202emirrored\\u202c привет 👨‍👩‍👧 \\ufeffend")


def test_every_letter_is_its_byte(bytes_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text = TokenText(bytes_tokenizer)
    table: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    vocabulary = bytes_tokenizer.get_vocab()
    for byte, letter in table.items():
        assert text.run([vocabulary[letter]]) == decoded(bytes([byte]))


def test_a_cut_character_shows_its_bytes(bytes_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    """道 is no piece of the tokenizer: E9 81 93."""
    text, ids = TokenText(bytes_tokenizer), ids_of(bytes_tokenizer, "a道b")
    assert [text.token(one) for one in ids] == ["a", "<0xE9>", "<0x81>", "<0x93>", "b"]
    assert text.run(ids) == "a道b"
    assert text.run(ids[:3]) == "a<0xE9><0x81>"
    assert text.context(ids, 2, 2) == ("a<0xE9>", "<0x81>", "<0x93>b")


def test_byte_fallback(fallback_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text, ids = TokenText(fallback_tokenizer), ids_of(fallback_tokenizer, "the é東京\n")
    assert [text.token(one) for one in ids] == [
        " the", "␣", "é", "東", "<0xE4>", "<0xBA>", "<0xAC>", "\\n"
    ]  # fmt: skip
    assert text.run(ids) == " the é東京\\n"
    assert text.token(1) == "<s>"


def test_word_piece() -> None:
    tokenizer = word_piece()
    text, ids = TokenText(tokenizer), ids_of(tokenizer, "The quick foxes")
    assert text.run(ids) == " the quick foxes"
    assert text.token(ids[0]) == " the"
    assert text.token(ids[-1]) == "s"
    assert text.token(1) == "[CLS]"


def test_plain_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    text = TokenText(tokenizer)
    assert text.run(ids_of(tokenizer, "a \nb")) == "a \\nb"
    assert text.token(ids_of(tokenizer, " ")[0]) == "␣"
    assert text.token(ids_of(tokenizer, "\n")[0]) == "\\n"
    assert text.token(1) == "<s>"


def test_an_id_that_the_tokenizer_lacks() -> None:
    assert TokenText(tiny_tokenizer()).token(5000) == "<5000>"


def test_without_a_tokenizer() -> None:
    text = TokenText(None)
    assert text.token(17) == "17"
    assert text.context([3, 5, 17, 9, 2], 2, 2) == ("3 5 ", "17", " 9 2")
    assert "".join(text.context([3, 5, 17, 9, 2], 2, 1)) == "5 17 9"
    assert text.context([17], 0, 3) == ("", "17", "")


def test_context_stays_inside_the_sequence(bytes_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text, ids = TokenText(bytes_tokenizer), ids_of(bytes_tokenizer, "zxy")
    assert text.context(ids, 0, 12) == ("", "z", "xy")
    assert text.context(ids, 2, 12) == ("zx", "y", "")
    assert text.context(ids, 1, 0) == ("", "x", "")


@settings(deadline=None)
@given(st.lists(st.integers(0, 299), max_size=12))
def test_any_ids_give_clean_text(ids: list[int]) -> None:
    tokenizer = _kept()
    text = TokenText(tokenizer)
    shown = text.run(ids)
    assert "\ufffd" not in shown
    assert all(c.isprintable() or c in "\u200c\u200d\u00a0" or c.isspace() for c in shown)
    shown.encode()


_KEPT: list[hf.PreTrainedTokenizerFast] = []


def _kept() -> hf.PreTrainedTokenizerFast:
    if not _KEPT:
        _KEPT.append(byte_level())
    return _KEPT[0]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"", ""),
        (b"plain", "plain"),
        ("\ufffd is a character".encode(), "\ufffd is a character"),
        (b"\xe6\x9d", "<0xE6><0x9D>"),
        (b"a\xffb\xfe", "a<0xFF>b<0xFE>"),
        ("\x80".encode(), "\\x80"),
        ("\U000e0001".encode(), "\\U000e0001"),
        ("\u0301".encode(), "\u0301"),
        (b"\xed\xa0\x80", "<0xED><0xA0><0x80>"),
    ],
)
def test_decoded_by_hand(raw: bytes, shown: str) -> None:
    assert decoded(raw) == shown
