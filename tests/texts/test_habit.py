"""Which special tokens a model's tokenizer puts around a text, over many kinds of tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from entangle.errors import InvalidInput
from entangle.texts.special_tokens import added_by_itself, model_habit

NAMES = ["<s>", "</s>", "[CLS]", "[SEP]", "<sop>"]
IDS = {name: i for i, name in enumerate(NAMES)}
BOS, EOS, CLS, SEP, SOP = range(5)
HAND: Any = processors


def _template(single: str) -> Any:
    used = [(name, i) for name, i in IDS.items() if name in single.split()]
    return processors.TemplateProcessing(single, None, used)


def _tokenizer(processor: Any, letters: str = "abc", **options: Any) -> Any:
    """Return a tokenizer of single letters with a post-processor."""
    vocabulary = IDS | {letter: len(IDS) + i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    if processor is not None:
        backend.post_processor = processor
    fast: Any = hf.PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, **options)


def _saved(folder: Path, tokenizer: Any, **flags: bool | None) -> Any:
    """Return a tokenizer loaded from a folder whose settings say ``flags``."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | flags))
    return hf.AutoTokenizer.from_pretrained(folder)


ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("processor", "options", "before", "after"),
    [
        (None, {}, [], []),
        (None, ENDS, [], []),  # SmolLM2, Qwen: a token that has a name is not one that is put
        (processors.ByteLevel(trim_offsets=False), ENDS, [], []),  # GPT-2
        (_template("$A"), ENDS, [], []),
        (_template("<s> $A"), ENDS, [BOS], []),  # Llama 2, Gemma, Mistral
        (HAND.Sequence([processors.ByteLevel(), _template("<s> $A")]), ENDS, [BOS], []),  # Llama 3
        (_template("<s> $A </s>"), ENDS, [BOS], [EOS]),
        (processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS)), {}, [CLS], [SEP]),
        (_template("[CLS] $A [SEP]"), {"cls_token": "[CLS]"}, [CLS], [SEP]),
        (processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)), ENDS, [BOS], [EOS]),
        (_template("$A </s>"), ENDS, [], [EOS]),  # T5
        (_template("$A [SEP] [CLS]"), ENDS, [], [SEP, CLS]),  # XLNet
        (_template("[CLS] <sop> $A"), ENDS, [CLS, SOP], []),  # GLM
    ],
)
@pytest.mark.parametrize("letters", ["abc", "ACGT"])
def test_what_the_post_processor_adds(
    processor: Any, options: dict[str, str], before: list[int], after: list[int], letters: str
) -> None:
    tokenizer = _tokenizer(processor, letters, **options)
    habit = model_habit(tokenizer)
    assert (list(habit.before), list(habit.after)) == (before, after)
    assert habit.evidence == ("post-processor" if before or after else "none")
    bare = tokenizer(letters, add_special_tokens=False)["input_ids"]
    assert tokenizer(letters)["input_ids"] == [*before, *bare, *after]


@given(front=st.lists(st.sampled_from(NAMES), max_size=3), back=st.lists(st.sampled_from(NAMES)))
def test_any_template(front: list[str], back: list[str]) -> None:
    tokenizer = _tokenizer(_template(" ".join([*front, "$A", *back])))
    ends = [[IDS[name] for name in side] for side in (front, back)]
    assert list(added_by_itself(tokenizer)) == ends


def test_a_text_that_is_put_in_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"PreTrainedTokenizerFast|TokenizersBackend"):
        model_habit(_tokenizer(_template("<s> $A </s> $A")))


@pytest.mark.parametrize("flag", [True, False])
def test_tokenizers_in_python(flag: bool) -> None:
    slow = hf.ByT5Tokenizer()
    assert model_habit(slow).after == (slow.eos_token_id,) == (1,)
    slow.init_kwargs["add_eos_token"] = flag
    assert model_habit(slow).after == ((1,) if flag else ())


@pytest.mark.parametrize(
    ("template", "flags", "before", "after"),
    [
        ("$A", {"add_bos_token": True}, [BOS], []),  # a converted file that lost its template
        ("$A", {"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
        ("<s> $A", {"add_bos_token": False}, [], []),  # Phi-3
        ("<s> $A </s>", {"add_eos_token": False}, [BOS], []),
        ("<s> $A", {"add_bos_token": True, "add_eos_token": False}, [BOS], []),  # Gemma, Llama 2
        ("[CLS] $A [SEP]", {"add_bos_token": False, "add_eos_token": False}, [CLS], [SEP]),
        ("$A", {"add_bos_token": False}, [], []),  # Qwen
        ("<s> $A", {"add_bos_token": None}, [BOS], []),
    ],
)
def test_what_the_settings_say_is_right(
    template: str,
    flags: dict[str, bool | None],
    before: list[int],
    after: list[int],
    tmp_path: Path,
) -> None:
    tokenizer = _saved(tmp_path, _tokenizer(_template(template), **ENDS), **flags)
    assert not {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs)  # dropped on loading
    habit = model_habit(tokenizer)
    assert (list(habit.before), list(habit.after)) == (before, after)
    patched = _tokenizer(_template(template), **ENDS)
    patched.init_kwargs.update(flags)  # as from the metadata of a GGUF file
    assert model_habit(patched).before == habit.before
    assert model_habit(patched).after == habit.after


def test_a_setting_without_its_token_changes_nothing(tmp_path: Path) -> None:
    tokenizer = _saved(tmp_path, _tokenizer(_template("[CLS] $A")), add_bos_token=True)
    assert model_habit(tokenizer).before == (CLS,)


def test_evidence_is_named(tmp_path: Path) -> None:
    lost = _saved(tmp_path / "a", _tokenizer(_template("$A"), **ENDS), add_bos_token=True)
    assert model_habit(lost).evidence == "add_bos_token = True"
    both = _saved(tmp_path / "b", _tokenizer(_template("<s> $A"), **ENDS), add_bos_token=True)
    assert model_habit(both).evidence == "add_bos_token = True, post-processor"


@pytest.mark.parametrize("stored", [True, False])
def test_the_users_own_word_is_the_last(stored: bool, tmp_path: Path) -> None:
    template = "<s> $A" if stored else "$A"
    tokenizer = _saved(tmp_path, _tokenizer(_template(template), **ENDS), add_bos_token=stored)
    assert model_habit(tokenizer).before == ((BOS,) if stored else ())
    tokenizer.add_bos_token = not stored
    assert model_habit(tokenizer).before == (() if stored else (BOS,))
    given = hf.AutoTokenizer.from_pretrained(tmp_path, add_bos_token=not stored)
    assert model_habit(given).before == (() if stored else (BOS,))


def test_a_folder_called_like_nothing_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    monkeypatch.chdir(tmp_path)
    tokenizer = _tokenizer(_template("$A"), **ENDS)
    assert tokenizer.name_or_path == ""
    assert model_habit(tokenizer).before == ()


@pytest.mark.parametrize("content", ["", "[]", '{"add_bos_token": "yes"}', "\xff"])
def test_settings_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    tokenizer = _saved(tmp_path, _tokenizer(_template("<s> $A"), **ENDS))
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    assert model_habit(tokenizer).before == (BOS,)


def _byte_level(**options: Any) -> Any:
    vocabulary = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    return hf.GPT2Tokenizer(vocab=vocabulary | {"</s>": 300}, merges=[], **options)


def test_opt_puts_the_end_token_in_front() -> None:
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    assert model_habit(_byte_level(**names)).before == ()
    opt = _byte_level(add_bos_token=True, **names)
    assert model_habit(opt).before == (opt.bos_token_id,)
    assert model_habit(opt).after == ()


def test_a_default_of_the_class_is_nobodys_word(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer: Any = hf.CodeLlamaTokenizer(vocab=vocabulary, merges=[])
    assert tokenizer.init_kwargs["add_bos_token"] is True
    assert model_habit(tokenizer).before == (1,)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    assert model_habit(hf.AutoTokenizer.from_pretrained(tmp_path)).before == ()


@pytest.mark.parametrize(
    "kind", ["BertTokenizer", "RobertaTokenizer", "T5Tokenizer", "XLNetTokenizer"]
)
def test_classes_of_the_library(kind: str) -> None:
    tokenizer = getattr(hf, kind)()
    before, after = added_by_itself(tokenizer)
    whole, bare = (tokenizer("x y", add_special_tokens=add)["input_ids"] for add in (True, False))
    assert [*before, *bare, *after] == whole
    assert model_habit(tokenizer).after == tuple(after) != ()
