"""The policy of special tokens, in calibration, evaluation, pairs and what is said about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from tokenizers import Tokenizer, models, processors
from torch import nn

from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import (
    DenseReference,
    EvaluationText,
    MinimalPairs,
    compare_with_dense,
    evaluate_models,
    load_evaluation,
    minimal_pair_scores,
    perplexity,
    perplexity_table,
)
from entangle.evaluation.perplexity import affix_effect
from entangle.models.loading import LanguageModel
from entangle.runs.provenance import around_each, of_saved, shown
from entangle.texts.calibration import load_calibration
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import minimal_pairs as slow
from tests.reference import perplexity as reference
from tests.tiny_models import TINY, tiny_tokenizer

Tiny = Callable[[str], LanguageModel]
TEXT = "The quick brown fox jumps over the lazy dog, twice."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _ids(text: str = TEXT) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _calibration(source: Path, **options: Any) -> CalibrationSet:
    return load_calibration(source, tiny_tokenizer(adds=True), sampling="contiguous", **options)


def _evaluation(source: Path, **options: Any) -> EvaluationText:
    return load_evaluation(source, tiny_tokenizer(adds=True), **options)


@pytest.mark.parametrize("unk", [True, False])
def test_a_vocabulary_without_the_letter_a(unk: bool, tmp_path: Path) -> None:
    vocabulary = {name: i for i, name in enumerate(["<s>", "</s>", "<unk>", *"ACGT"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>" if unk else None))
    ends = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    fast: Any = hf.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    (tmp_path / "dna.txt").write_text("ACGTTGCA" * 20)
    row = [0, 3, 4, 5, 6, 6, 5, 4, 3, 1]
    sizes: dict[str, Any] = {"seq_len": 10}
    calibration = load_calibration(
        tmp_path / "dna.txt", tokenizer, n_seq=1, sampling="contiguous", **sizes
    )
    text = load_evaluation(tmp_path / "dna.txt", tokenizer, n_windows=1, **sizes)
    assert calibration.ids.tolist() == text.windows.tolist() == [row]
    assert (text.n_tokens, text.n_bytes) == (8, 8)


def test_none_and_published_in_calibration(source: Path) -> None:
    ids, n = _ids(), len(_ids())
    none = _calibration(source, n_seq=3, seq_len=8, special_tokens="none")
    assert none.ids.tolist() == [ids[8 * i : 8 * i + 8] for i in range(3)]
    whole = [1, *ids, 2]
    once = _calibration(source, n_seq=3, seq_len=8, special_tokens="published")
    assert once.ids.tolist() == [whole[8 * i : 8 * i + 8] for i in range(3)]
    assert _calibration(
        source, n_seq=1, seq_len=n + 2, special_tokens="published"
    ).ids.tolist() == [whole]
    almost = _calibration(source, n_seq=1, seq_len=n + 1, special_tokens="published")
    assert almost.ids.tolist() == [whole[:-1]]


def test_published_random_windows_are_cut_from_the_enclosed_text(source: Path) -> None:
    whole = [1, *_ids(), 2]
    tokenizer = tiny_tokenizer(adds=True)
    got = load_calibration(source, tokenizer, n_seq=40, seq_len=8, special_tokens="published")
    same = load_calibration(torch.tensor(whole), n_seq=40, seq_len=8)
    assert torch.equal(got.ids, same.ids)
    assert tokenizer(TEXT)["input_ids"] == whole  # what the published code tokenises


@pytest.mark.parametrize("length", [8, 10, len(TEXT) + 1, len(TEXT) + 2])
def test_published_windows(source: Path, length: int) -> None:
    whole = [1, *_ids(), 2]
    got = _evaluation(source, seq_len=length, special_tokens="published")
    n = len(whole) // length
    assert got.windows.tolist() == [whole[length * i : length * (i + 1)] for i in range(n)]
    assert got.n_tokens == n * (length - 1)  # as the published code counts, the end included
    spans = [
        (max(0, length * i), min(len(TEXT), length * (i + 1) - 1)) for i in range(n)
    ]  # a character is a token, and the first one is no character
    assert got.n_words == reference.words_begun(TEXT, spans)
    assert got.n_bytes == sum(b - a for a, b in spans)
    assert got.settings["dropped_tokens"] == len(whole) - n * length


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_ends_are_read_and_not_predicted(name: str, source: Path, tiny: Tiny) -> None:
    model, ids = tiny(name), _ids()
    text = _evaluation(source, seq_len=12)
    assert (text.around, int(text.window_tokens[0])) == ((1, 1), 10)
    rows = [[1, *ids[10 * i : 10 * i + 10]] for i in range(len(ids) // 10)]
    expected = [-slow.log_probability(model.module, row) for row in rows]
    found = perplexity(model, text, progress=False)
    assert found.window_losses == pytest.approx(expected, rel=1e-5)
    assert found.value == pytest.approx(np.exp(sum(expected) / (10 * len(rows))), rel=1e-5)
    with DenseReference(model, text, progress=False) as dense:
        seen = compare_with_dense(model, dense, progress=False)
    assert seen.window_positions.tolist() == [10] * len(rows)
    assert seen.perplexity.window_losses == pytest.approx(expected, rel=1e-5)
    assert seen.top1_agreement == 1.0


def test_the_older_option(source: Path) -> None:
    for older, policy in ((True, "model"), (False, "none")):
        got = _evaluation(source, seq_len=8, add_special_tokens=older)
        assert got.digest == _evaluation(source, seq_len=8, special_tokens=policy).digest
        assert (
            got.digest
            == _evaluation(
                source, seq_len=8, add_special_tokens=older, special_tokens=policy
            ).digest
        )
    for older, policy in ((True, "none"), (False, "model"), (True, "published")):
        with pytest.raises(InvalidInput, match=rf"'{policy}'.*{older}"):
            _calibration(source, add_special_tokens=older, special_tokens=policy)
    with pytest.raises(UnknownName, match="'maybe'"):
        _calibration(source, special_tokens="maybe")


def test_ids_take_no_policy_but_none() -> None:
    ids = torch.arange(12)
    assert load_calibration(ids, n_seq=1, seq_len=4, special_tokens="none").n_tokens == 4
    for load in (load_calibration, load_evaluation):
        with pytest.raises(InvalidInput, match=r"special_tokens.*'model'"):
            load(ids, seq_len=4, special_tokens="model")


def test_a_saved_set_keeps_its_special_tokens(source: Path, tmp_path: Path) -> None:
    _calibration(source, n_seq=4, seq_len=8).save(tmp_path / "set.safetensors")
    again = load_calibration(tmp_path / "set.safetensors")
    assert shown(again.settings) == "<s> … </s>"
    text = load_evaluation(tmp_path / "set.safetensors")
    assert (text.around, text.n_tokens, text.special_tokens) == ((1, 1), 4 * 6, "<s> … </s>")
    cut = load_evaluation(tmp_path / "set.safetensors", seq_len=5)
    assert (cut.around, cut.n_tokens, cut.special_tokens) == ((1, 0), 4 * 4, "<s> …")


@pytest.mark.parametrize("old", [{"before": [1], "after": [2]}, [1], None])
def test_sets_of_earlier_versions_load(old: Any, tmp_path: Path) -> None:
    ids = torch.arange(8).reshape(2, 4)
    settings = {} if old is None else {"special_tokens": old}
    described = CalibrationSet(ids, "x", settings).describe()
    path = tmp_path / "old.safetensors"
    metadata = {"entangle.calibration_set": json.dumps(described)}
    safetensors.torch.save_file({"ids": ids}, path, metadata=metadata)
    assert torch.equal(CalibrationSet.load(path).ids, ids)
    words = "unknown" if old is None else "1 … 2" if isinstance(old, dict) else "1 …"
    assert shown(load_calibration(path).settings) == words
    assert around_each(of_saved(described, whole=True)) == (
        (0, 0) if old is None else (1, 1) if isinstance(old, dict) else (1, 0)
    )


def test_tables_name_them(source: Path, tiny: Tiny) -> None:
    for policy, words in (("model", "<s> … </s>"), ("none", "none")):
        text = _evaluation(source, seq_len=8, special_tokens=policy)
        table = perplexity_table(evaluate_models([("dense", tiny("llama"))], text, progress=False))
        assert table["special_tokens"].tolist() == [words]


class Fond(nn.Module):
    """Gives the next letter of a run of ids 1/2 where <s> is in front, all letters alike else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(112, 2)
        self.passes = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        logits = torch.zeros(*ids.shape, 112)
        logits.scatter_(-1, (ids + 1).clamp(max=111)[..., None], np.log(111.0))
        return logits * (ids[:, :1] == 1)[..., None]


def test_the_effect_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.txt").write_text("abcdefgh" * 2)
    model = LanguageModel(Fond(), None, "fond", "memory", None)
    with_bos, without = np.log(2.0), np.log(112.0)
    text = _evaluation(tmp_path / "run.txt", seq_len=10)
    found = perplexity(model, text, progress=None).special_tokens_effect
    assert found is not None
    assert (found.used, found.other, found.n_tokens) == ("<s>", "none", 7)
    assert found.loss == pytest.approx(with_bos)
    assert found.other_loss == pytest.approx(without)
    assert found.difference == pytest.approx(without / with_bos - 1)
    told = capsys.readouterr().err
    assert "0.693" in told
    assert "4.718" in told
    none = _evaluation(tmp_path / "run.txt", seq_len=8, special_tokens="none")
    found = perplexity(model, none, progress=False).special_tokens_effect
    assert found is not None
    assert (found.used, found.other) == ("none", "<s>")
    assert found.difference == pytest.approx(with_bos / without - 1)
    assert capsys.readouterr().err == ""  # nothing is written with progress=False


def test_the_effect_is_cheap_and_measured_once(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abcdefgh" * 500)
    module = Fond()
    text = _evaluation(tmp_path / "long.txt", seq_len=1000, n_windows=3)
    effect = affix_effect(
        LanguageModel(module, None, "fond", "memory", None), text.windows[0], text.settings
    )
    assert effect is not None
    assert (module.passes, effect.n_tokens) == (2, 510)
    module.passes = 0
    evaluate_models([("a", module), ("b", module)], text, batch_size=3, progress=False)
    assert module.passes == 2 + 1 + 1


def test_where_there_is_nothing_to_compare(source: Path, tiny: Tiny) -> None:
    ids = load_evaluation(torch.arange(64), seq_len=8)
    assert affix_effect(tiny("llama"), ids.windows[0], ids.settings) is None
    nameless = tiny_tokenizer()
    nameless.bos_token = None
    text = load_evaluation(source, nameless, seq_len=8)
    assert text.settings["special_tokens"]["alternative"] is None  # type: ignore[index]
    assert affix_effect(tiny("llama"), text.windows[0], text.settings) is None
    text = _evaluation(source, seq_len=8)
    assert affix_effect(tiny("bert"), text.windows[0], text.settings) is None
    short = _evaluation(source, seq_len=3)
    assert affix_effect(tiny("llama"), short.windows[0], short.settings) is None


def test_pairs(tiny: Tiny) -> None:
    pairs = MinimalPairs(("ab c",), ("ba",), ("p",), "here", {})
    module, adds = TINY["llama"](), tiny_tokenizer(adds=True)
    ids = _ids(" ab c")
    for policy, row in (("model", [1, *ids]), ("published", [1, *ids]), ("none", ids)):
        got = minimal_pair_scores(module, pairs, adds, special_tokens=policy)
        assert got.good[0] == pytest.approx(slow.log_probability(module, row), rel=1e-5)
        kept = MinimalPairs(("ab c",), ("ba",), ("p",), "here", {"special_tokens": policy})
        assert minimal_pair_scores(module, kept, adds).good[0] == got.good[0]
    backend: Any = adds.backend_tokenizer
    ends = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing("</s> <s> $A", None, ends)
    got = minimal_pair_scores(module, pairs, adds)
    two = slow.log_probability(module, [2, 1, *ids]) - slow.log_probability(module, [2, 1])
    assert got.good[0] == pytest.approx(two, rel=1e-5)
    assert got.settings["before_tokens"] == ["</s>", "<s>"]
