"""What a run will take is told before it: counts are those that happen, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

import entangle
from entangle.cli import anchor, composed, dry, options, report, trials
from entangle.errors import MemoryLimit, Unavailable
from entangle.memory import refuse_beyond
from entangle.models.layers import find_blocks, list_layers
from entangle.models.loading import as_language_model
from entangle.runs.places import check_room
from tests.cli.runs import Run
from tests.tiny_models import OTHERS, TINY, build_other

EVALUATED = ("--eval-seq-len", 32, "--eval-windows", 8)
TEXT = ("--n-seq", 24, "--seq-len", 32)
COMMANDS = {
    "score": (*TEXT, "--method", "sketch"),
    "prune": (*TEXT, *EVALUATED),
    "expand": (*TEXT, "--experts", 3),
    "evaluate": EVALUATED,
    "experts": TEXT,
    "study": (*TEXT, *EVALUATED, "--size", "small", "--claims", "wd-md,pruning,syntax"),
}  # fmt: skip


def test_least_squares_find_what_counts_take() -> None:
    seconds = {"start": 3.0, "tokens": 0.5, "solves": 20.0}
    trials_of = [
        {"start": 1, "tokens": t, "solves": s} for t, s in ((10.0, 1.0), (40.0, 1.0), (10.0, 2.0))
    ]
    found = [3.0 + 0.5 * one["tokens"] + 20 * one["solves"] for one in trials_of]
    job = {"start": 1, "tokens": 5000.0, "solves": 60.0, "never seen": 9.0}
    wanted = seconds["start"] + 0.5 * 5000 + 20 * 60
    assert trials.fitted(trials_of, found, job) == pytest.approx(wanted)
    assert trials.fitted(trials_of, [2 * one for one in found], job) == pytest.approx(2 * wanted)


def test_a_model_that_cannot_be_shortened_is_told_as_such(
    run: Run, tiny_folder: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder("llama")
    asked = ("score", model, "--calibration", text_file, *TEXT, "--dry-run")
    whole = len(find_blocks(entangle.load_model(model).module)[1])
    forward: Any = LlamaModel.forward

    def by_place(self: Any, *given: Any, **more: Any) -> Any:
        if len(self.layers) < whole:
            raise KeyError(whole)
        return forward(self, *given, **more)

    with monkeypatch.context() as other:
        other.setattr(LlamaModel, "forward", by_place)
        ran = run(*asked)
    assert ran.status != 0
    assert f"KeyError: {whole}" in ran.err
    assert "Traceback" not in ran.err

    def fail(*_: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(trials, "spent", fail)
    with pytest.raises(KeyError, match="a fault of ours"):  # not laid to the model
        run(*asked)


def test_nothing_takes_less_than_nothing() -> None:
    counts = [{"tokens": 1.0}, {"tokens": 2.0}]
    assert trials.fitted(counts, [2.0, 1.0], {"tokens": 1e6}) >= 0


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_told_is_what_happens(
    command: str,
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = () if command == "evaluate" else ("--calibration", text_file)
    if EVALUATED[0] in COMMANDS[command]:
        sources = (*sources, "--evaluation", text_file)
    model = tiny_folder("mixtral" if command == "experts" else "llama")
    asked = (command, model, *sources, *COMMANDS[command], "--json", "--quiet")
    ran = run(*asked, "--dry-run")
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert list(tmp_path.iterdir()) == []  # it writes nothing
    if command == "study":
        check_claims(told)
    seen: list[int] = []
    loading = options.load_model

    def watched(arguments: object) -> object:
        model = loading(arguments)  # type: ignore[arg-type]
        first = next(one for one in list_layers(model.module) if one.block == 0)
        first.module.register_forward_hook(
            lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel())
        )
        return model

    monkeypatch.setattr(options, "load_model", watched)
    out = tmp_path / "made"
    assert run(*asked, "--out", out).status == 0
    tokens = told["tokens"] * told["passes"]
    tokens += told["evaluation_tokens"] * told["evaluation_passes"]
    assert tokens / 1.5 <= sum(seen) <= tokens * 1.5
    places = [one for one in tmp_path.glob("made*") if one.is_dir()]
    written = sum(f.stat().st_size for one in places for f in one.rglob("*") if f.is_file())
    assert written / 1.5 <= told["disk_bytes"] <= written * 1.5
    assert min(told["seconds"], told["cpu_seconds"], told["peak_memory_bytes"]) > 0


def check_claims(told: dict[str, Any]) -> None:
    """Every claim has a row: what it takes alone, and what leaving it out saves."""
    rows = {one["claim"]: one for one in told["claims"]}
    assert list(rows) == [one["claim"] for one in told["listed"]]
    assert list(rows) == ["wd-md", "pruning", "syntax"]
    assert rows["syntax"]["tokens"] == rows["syntax"]["seconds"] == 0
    assert "--blimp" in rows["syntax"]["why"]
    alone, more = rows["wd-md"], rows["pruning"]
    assert alone["tokens"] == told["tokens"]
    assert 0 <= alone["saved"] < alone["seconds"]  # its scores are the other's too
    assert 0 < more["saved"] < more["seconds"] < told["seconds"]
    assert more["tokens"] == pytest.approx(
        told["tokens"] * told["passes"] + told["evaluation_tokens"] * told["evaluation_passes"]
    )


class Known:
    """Stands for trials: all work takes the same."""

    once, beside = 0.25, ()

    def told(self, _job: trials.Job, _counts: trials.Counts) -> trials.Spent:
        return trials.Spent(1.0, 2.0, 3, 0, 5)


def test_an_anchor_runs_the_text_as_often_as_is_told(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from entangle.models.loading import load_model
    from entangle.texts.calibration import as_calibration

    model = load_model(tiny_folder("llama"))
    text = as_calibration(torch.randint(4, 60, (24, 32)), model)
    layers = tuple(one for one in list_layers(model.module) if one.name.endswith("0.mlp.up_proj"))
    settings = {"dictionary": None, "atoms": 8, "active": 2, "threshold": 0.3,
                "controls": ["variance"]}  # fmt: skip
    given = {"settings": settings, "memory": None, "batch_size": None, "md": True, "n_boot": 2,
             "method": "exact", "brought": None}  # fmt: skip
    job, seen = trials.Job(model, layers, text, None, given), list[int]()
    layers[0].module.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel())
    )
    anchor.dry_run(job, tmp_path / "made")
    counted = anchor.dry_counts(job)
    told = counted.passes[0] * job.tokens
    assert told <= sum(seen) <= 1.2 * told  # beside them the model is tried on a few tokens
    more = anchor.dry_counts(replace(job, given={**given, "settings": {**settings, "atoms": 16}}))
    assert more.time["grams"] == 4 * counted.time["grams"]
    assert more.time["drawn"] == counted.time["drawn"] == 2 * job.neurons


def test_a_page_runs_the_text_as_often_as_is_told(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs, model = list[trials.Job](), tiny_folder("mixtral")
    text = ("--calibration", text_file, *TEXT, "--quiet")
    asked = ("report", "scores", "--model", model, *text, "--neurons", 2, "--json", "--dry-run")
    scoring = ("score", model, *text, "--layer", "1", "--proj", "experts", "--method", "sketch")
    assert run(*scoring, "--min-tokens", 32, "--no-md", "--out", "scores").status == 0

    def told_of(_subject: object, job: trials.Job, **_given: object) -> tuple[trials.Spent, float]:
        jobs.append(job)
        return trials.Spent(1.0, 2.0, 3, 0, 5), 0.5

    monkeypatch.setattr(dry, "estimate", told_of)
    ran = run(*asked)
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert (told["tokens"], told["passes"]) == (24 * 32, 1)  # experts' pass goes to the end
    assert [one.name for one in tmp_path.iterdir()] == ["scores"]
    assert run(*asked[:2], "--dry-run").status == 2  # without a model nothing takes long
    (job,) = jobs
    assert 0 < job.given["pages"] == 2 * len(job.layers)
    size = dict(report.dry_sizes(job)[0])
    trial = report.dry_ready(replace(job, given={**job.given, **size}), tmp_path / "ready")
    seen = list[int]()
    first = next(one for one in list_layers(job.model.module) if one.block == 0)
    first.module.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel())
    )
    report.dry_run(trial, tmp_path / "made")
    assert (tmp_path / "made.html").stat().st_size > 0
    assert job.tokens <= sum(seen) <= 1.2 * job.tokens


def test_revisions_take_what_the_first_takes(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(composed, "measure", lambda *_, **__: (Known(), 0.5))
    model, place = tiny_folder("gpt2"), tmp_path / "steps"
    for step in (1, 2, 3):
        shutil.copytree(model, place / f"step{step}")
    text = ("--calibration", text_file, *TEXT, "--evaluation", text_file, *EVALUATED)
    asked = ("trace", place, *text, "--seeds", 2, "--out", tmp_path / "made", "--quiet", "--json")
    ran = run(*asked, "--dry-run")
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["steps"]
    seconds = [one["cpu_seconds"] for one in told["models"]]
    assert len(seconds) == 3
    assert 0 < seconds[1] == seconds[2] < seconds[0]
    assert sum(seconds) == pytest.approx(told["cpu_seconds"])
    assert seconds[0] > 1.0 * 3 + 0.25 * 3 + 0.5  # both experiments and the page
    assert told["disk_bytes"] == 5 * (3 * 2 + 1)
    assert told["passes"] == 3 * 2
    assert told["evaluation_passes"] == 3 * (1 + 1 + 2)  # dense, top, two draws
    assert run(*asked[:-3], "--seeds", 0, "--dry-run").status == 2


def test_a_trial_begins_where_the_layers_are(tiny_folder: Callable[[str], Path]) -> None:
    from entangle.models.loading import load_model

    model = load_model(tiny_folder("llama"))
    blocks = find_blocks(model.module)[1]
    short = trials.first_blocks(model, 1, start=len(blocks) - 1)
    own, last = find_blocks(short.module)[1][0].state_dict(), blocks[-1].state_dict()
    assert all(torch.equal(own[name], last[name]) for name in last)


def test_a_trial_ends_after_few_blocks_of_the_model(tiny_folder: Callable[[str], Path]) -> None:
    from entangle.models.loading import load_model

    model = load_model(tiny_folder("llama"))
    short = trials.first_blocks(model, 1)
    assert len(find_blocks(short.module)[1]) == 1
    assert len(find_blocks(model.module)[1]) > 1
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        logits = short.module(ids).logits
    assert logits.shape[-1] == model.vocab_size
    assert np.isfinite(logits.numpy()).all()


@pytest.mark.parametrize("name", ["gemma3", "gemma3n"])
def test_a_trial_runs_and_can_be_written_where_blocks_are_told_apart(
    name: str, tmp_path: Path
) -> None:
    module: Any = build_other(name) if name in OTHERS else TINY[name]()
    whole, short = as_language_model(module), tmp_path / "short"
    for start in (0, 1) if name == "gemma3" else (0,):
        cut: Any = trials.first_blocks(whole, 1, start=start).module
        with torch.no_grad():
            assert cut(torch.arange(4, 12)[None], use_cache=False).logits.isfinite().all()
        cut.save_pretrained(short)
        kinds = module.config.layer_types
        own = cut.config.layer_types
        assert own == (kinds if name == "gemma3n" else kinds[start : start + 1])
    assert len(kinds) == 3  # the model itself keeps its own


def test_what_does_not_fit_is_refused(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry, "free_ram", lambda: -(2**50))
    ran = run("score", tiny_folder("llama"), "--calibration", text_file, *TEXT, "--dry-run")
    assert ran.status == 2
    assert "tokens to calibrate on" in ran.out
    assert "--stream" in ran.err
    assert "--memory" in ran.err


def test_work_that_does_not_fit_does_not_begin(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import entangle.memory

    model, out = tiny_folder("llama"), tmp_path / "made"
    given = ("--calibration", text_file, *TEXT, "--out", out)
    monkeypatch.setattr(entangle.memory, "free_ram", lambda: 2**10)
    for command, remedy in (
        (("score", model, *given, "--method", "sketch"), "--layer"),
        (("expand", model, *given), "--experts"),
        (("score", model, *given, "--no-stream"), "--no-stream"),
    ):
        ran = run(*command, "--memory", "8M")
        assert ran.status == 2
        assert remedy in ran.err
        assert list(tmp_path.iterdir()) == []


def test_what_an_allocation_takes_is_told(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = ("--calibration", text_file, *TEXT, "--quiet")
    assert run("score", tiny_folder("llama"), *text, "--no-md", "--out", "scores").status == 0
    before = sorted(tmp_path.rglob("*"))
    for rule, passes in (("protect", 0), ("loss", 1), ("search", 1 + 3 * 0.25)):
        more = {"protect": ("--quiet",), "search": (*text, "--evaluations", 3)}.get(rule, text)
        asked = ("allocate", "scores", "--sparsity", 0.5, "--rule", rule, *more, "--json")
        ran = run(*asked, "--dry-run")
        assert ran.status == 0, ran.err
        told = json.loads(ran.out)
        assert (told["tokens"], told["passes"]) == (24 * 32 * bool(passes), passes)
        assert min(told["seconds"], told["disk_bytes"], told["peak_memory_bytes"]) > 0
    assert sorted(tmp_path.rglob("*")) == before
    assert run(*asked, "--by", "nothing", "--dry-run").status == 2
    ran = run(*asked, "--out", "a.safetensors")
    assert ran.status == 0, ran.err
    written = Path("a.safetensors").stat().st_size
    assert written / 1.5 <= told["disk_bytes"] <= written * 1.5


def test_a_pruned_model_needs_room_before_any_work(
    run: Run,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from entangle.models.loading import load_model

    model = tiny_folder("llama")
    size = sum(one.numel() * one.element_size() for one in load_model(model).module.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=size - 1))
    out = tmp_path / "made"
    ran = run("prune", model, "--calibration", text_file, *TEXT, "--quiet", "--out", out)
    assert ran.status == 2
    assert "--out" in ran.err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage)
    assert run("prune", model, "--calibration", text_file, *TEXT, "--out", out).status == 0


def test_a_refusal_tells_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import entangle.memory

    monkeypatch.setattr(entangle.memory, "free_ram", lambda: 2**30)
    refuse_beyond(2**30, torch.device("cpu"), what="this", remedy="ask for less")
    with pytest.raises(MemoryLimit, match=r"3\.00.*1\.00.*ask for less"):
        refuse_beyond(3 * 2**30, torch.device("cpu"), what="this", remedy="ask for less")
    check_room(tmp_path / "a" / "b", 1)
    with pytest.raises(Unavailable, match=str(tmp_path)):
        check_room(tmp_path / "a" / "b", 2**60)
