"""Small tokenizers of the kinds that models come with, trained here on a few lines."""

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café über straße, 東京 は 日本 の 首都 です。",
    "привет мир — здравствуй",
]


def byte_level() -> hf.PreTrainedTokenizerFast:
    """As GPT-2 and Llama 3: every byte has a letter, and characters may be cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    return _wrapped(tokenizer, eos_token="<|end|>")


def byte_fallback() -> hf.PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: ▁ for a space, ``<0x..>`` for the bytes of unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(0x61, 0x7B)), "th", "the", "▁the", "é", "東"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> hf.PreTrainedTokenizerFast:
    """As BERT: ## for what continues a word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(LINES, trainer)
    return _wrapped(tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def _wrapped(tokenizer: Tokenizer, **special: str) -> hf.PreTrainedTokenizerFast:
    fast: Any = hf.PreTrainedTokenizerFast
    wrapped: hf.PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, **special)
    return wrapped
