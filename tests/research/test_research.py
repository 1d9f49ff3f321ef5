"""The programs behind the findings: text, a small model, and changes of one thing at a time."""

import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import entangle
from entangle.seeding import torch_rng
from research import corpus, differ, facts, train
from tests.tiny_models import TINY


@pytest.mark.parametrize(("last", "count"), [(2000, 30), (100, 6), (29, 30), (31, 30), (40, 2)])
def test_steps_of_checkpoints(last: int, count: int) -> None:
    steps = train.checkpoint_steps(last, count)
    assert (steps[0], steps[-1], len(steps)) == (0, last, min(count, last + 1))
    assert steps == sorted(set(steps))
    gaps = np.diff(steps)
    assert (np.diff(gaps) >= -1).all()  # apart for rounding, never nearer to one another


def test_prose_is_kept_and_the_rest_is_not() -> None:
    prose = "A sentence of more than eight words, in plain English, is kept as it is."
    for text in (
        "too short",
        "x = {1: 2, 3: 4}; y[0] += f(x) * 3.14 / (2 - z) % 7 == 0;;",
        "é " * 9,
    ):
        assert not corpus.is_prose(text)
    assert list(corpus.paragraphs(f"{prose}\n\n   code();\n\n{prose[:20]}\n{prose[20:]}")) == [
        prose, f"{prose[:20]} {prose[20:]}",
    ]  # fmt: skip


def test_pages_lose_their_marks(tmp_path: Path) -> None:
    page = "<html><head><title>No</title></head><p>One two.</p><pre>code</pre><li>Three.</html>"
    (tmp_path / "a.html").write_text(page)
    assert corpus.read_page(tmp_path / "a.html").split() == ["One", "two.", "Three."]


def test_every_fiftieth_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {i}" for i in range(60 * 101)))
    rows = list(corpus.file_documents(tmp_path / "t.txt"))
    assert len(rows) == 101
    corpus.write(({"source": "t", "part": "train", "text": one} for one in rows), tmp_path / "o.xz")
    with lzma.open(tmp_path / "o.xz", "rt") as lines:
        assert [json.loads(line)["text"] for line in lines] == rows


def test_a_small_model_is_trained_and_saved(tmp_path: Path) -> None:
    text = ["the cat sat on the mat and the dog on the log " * 40] * 12
    plan = train.Plan(
        steps=12, batch=2, window=32, checkpoints=4, vocabulary=280, width=64, mlp=64, blocks=1
    )
    tokenizer = train.train_tokenizer(text, plan.vocabulary, plan.window)
    ids = train.token_ids(tokenizer, text)
    assert str(tokenizer.decode(ids[: len(ids) // 12])).removesuffix(train.END) == text[0]
    losses = train.train(plan, tokenizer, {"train": ids, "valid": ids}, tmp_path, faster=False)
    assert losses[-1]["valid_loss"] < losses[0]["valid_loss"] - 0.1
    folders = sorted(one.name for one in tmp_path.iterdir())
    assert folders == ["step-000000", "step-000001", "step-000003", "step-000012"]
    stored = load_file(tmp_path / folders[-1] / "model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16}
    loaded = entangle.load_model(tmp_path / folders[-1], dtype="float32")
    loss = train.validate(loaded.module, ids, plan)
    assert loss == pytest.approx(losses[-1]["valid_loss"], abs=0.05)


def test_windows_of_an_epoch_are_different_and_one_token_apart() -> None:
    ids = torch.arange(2000)
    plan = train.Plan(batch=3, window=9)
    stream = train.batches(ids, plan)
    first = torch.cat([next(stream) for _ in range(60)])
    assert (first.diff(dim=1) == 1).all()
    assert first[:, 0].unique().numel() == len(first)
    with pytest.raises(SystemExit, match="too few"):
        next(train.batches(ids[:20], plan))


def test_rounded_weights() -> None:
    weight = torch.randn(5, 70, generator=torch_rng(0, "w"))
    for bits in differ.BITS:
        found = differ.rounded(weight, bits)
        assert found.shape == weight.shape
        torch.testing.assert_close(differ.rounded(found, bits), found)
        for row in range(5):
            for start in (0, 32, 64):
                own, coarse = (one[row, start : start + 32] for one in (weight, found))
                step = (own.max() - own.min()) / (2**bits - 1)
                assert (own - coarse).abs().max() <= step / 2 + 1e-6
                assert coarse.unique().numel() <= 2**bits
    assert torch.equal(differ.rounded(torch.ones(2, 3), 4), torch.ones(2, 3))


def test_changes_are_set_against_the_unchanged() -> None:
    wd = np.arange(1.0, 101.0)
    rows = pd.concat(
        pd.DataFrame({"layer": "a", "neuron": range(100), "change": name, "wd": values})
        for name, values in (("none", wd), ("double", 2 * wd), ("reversed", wd[::-1]))
    )
    table: Any = differ.compared(rows).set_index("change")
    names = ["median_ratio", "top_ratio", "top_kept", "spearman"]
    assert table.loc["double", names].to_list() == pytest.approx([2, 2, 1, 1])
    assert table.loc["reversed", names].to_list() == pytest.approx([1, 1, 0, -1])


@pytest.mark.parametrize(
    ("name", "mlp", "layers"),
    [("llama", "model.layers.0.mlp", 3), ("gpt2", "transformer.h.0.mlp", 2), ("opt", "", 2)],
)
def test_mlps_with_a_gate_and_without(name: str, mlp: str, layers: int) -> None:
    model: Any = entangle.load_model(TINY[name]())
    ids = torch.randint(4, 100, (4, 16), generator=torch_rng(0, "ids"))
    text = entangle.CalibrationSet(ids, "random", {})
    rows, _ = differ.measured(model, text, [0])
    assert rows["layer"].nunique() == layers
    told: Any = differ.facts_of(name, model, text, rows, 0.0)
    assert (told["width"], told["mlp"], told["blocks"]) == (32, 48, 3)
    kinds = rows.groupby("layer", sort=False)["change"].nunique().tolist()
    without = [len(differ.CHANGES)] * layers  # all but the other activation, and the unchanged
    assert kinds == (without if name == "opt" else [*without[1:], len(differ.CHANGES) + 1])
    if name == "opt":  # of ReLU there is no other
        return
    part, last = model.module.get_submodule(mlp), differ.mlp_layers(model, [0])[-1]
    kind = "act" if name == "gpt2" else "act_fn"
    setattr(part, kind, torch.nn.SiLU() if name == "gpt2" else torch.nn.GELU("tanh"))
    seen: list[torch.Tensor] = []
    hook = last.module.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    with torch.no_grad():
        model.module(ids)
    hook.remove()
    expected = differ.wd_of(last.weight, seen[0].flatten(0, 1))
    other = rows[(rows["layer"] == last.name) & (rows["change"] == "other activation")]["wd"]
    np.testing.assert_allclose(other, expected, rtol=1e-3)


def test_mixtures_are_refused() -> None:
    with pytest.raises(SystemExit, match="expert"):
        differ.mlp_layers(entangle.load_model(TINY["mixtral"]()))


def test_damage_is_told_in_log_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [("dense", 10.0), ("top", 40.0), ("random", 12.0), ("random", 15.0)]
    rows = [(one, "perplexity", value) for one, value in arms]
    rows += [(one, "perplexity_ratio", value / 10) for one, value in arms[1:]]
    frame = pd.DataFrame(rows, columns=["selection", "measure", "value"])
    text = entangle.CalibrationSet(torch.zeros(1, 8, dtype=torch.int64), "none", {})
    monkeypatch.setattr(entangle, "load_evaluation", lambda *_, **__: None)
    monkeypatch.setattr(entangle, "ablate", lambda *_, **__: SimpleNamespace(frame=frame))
    model: Any = SimpleNamespace(tokenizer=None)
    found = differ.damage(model, text, "some", [])
    random = np.log(1.2 * 1.5) / 2
    assert found["top_rise"] == pytest.approx(np.log(4.0))
    assert found["ratio"] == pytest.approx(np.log(4.0) / random)
    frame.loc[frame["selection"] == "random", "value"] = 9.0  # random rows cost nothing
    assert np.isnan(differ.damage(model, text, "some", [])["ratio"])


def test_of_a_pair_one_is_true_and_they_differ_at_the_end() -> None:
    pairs = facts.pairs()
    true = {one["sentence_good"] for one in pairs}
    assert len(pairs) == 2 * len(true) == 190
    assert not true & {one["sentence_bad"] for one in pairs}
    for one in pairs[: 2 * len(facts.CAPITALS)]:
        assert one["UID"] == "fact_capital"
        assert one["sentence_bad"].split(" is ")[0] == one["sentence_good"].split(" is ")[0]
