"""Every kind of file that a user gives to a command, small, for `benchmarks.damage`."""

import bz2
import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets
import pandas as pd
import torch
import transformers as hf
from safetensors.torch import save_file

from benchmarks.damage import PLACE, Kind
from entangle.cli.main import main
from entangle.models import demo
from tests.tiny_models import GROUPED, TINY, WORDS, save_tiny, tiny_tokenizer, write_gguf

TEXT = " ".join(f"{i * i % 97} word{i % 13}" for i in range(200))
DOCUMENTS = [f"{TEXT} {i}" for i in range(6)]
CUT = ("--n-seq", "3", "--seq-len", "16")
QUICK = ("--quiet", "--json")


def score(model: str, text: str, *more: str, cut: Sequence[str] = CUT) -> tuple[str, ...]:
    """Score a layer, or whatever there is, of a model on a text."""
    return (
        "score",
        f"{PLACE}/{model}",
        "--calibration",
        f"{PLACE}/{text}",
        "--no-md",
        *cut,
        *QUICK,
        *more,
    )


def evaluate(model: str, text: str, *more: str) -> tuple[str, ...]:
    """Measure perplexity on three windows of a text."""
    return ("evaluate", f"{PLACE}/{model}", "--evaluation", f"{PLACE}/{text}", "--seq-len", "16",
            "--n-windows", "3", *QUICK, *more)  # fmt: skip


def ablate(*more: str) -> tuple[str, ...]:
    """Zero some neurons."""
    return ("ablate", f"{PLACE}/model", "--calibration", f"{PLACE}/text.txt", "--intervention",
            "zero", "--layer", "1", "--proj", "up_proj", *CUT, *QUICK, *more)  # fmt: skip


def _text(place: Path) -> None:
    (place / "text.txt").write_text(TEXT)


def _model(place: Path, name: str = "llama") -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        save_tiny(name, place / "model")
    _text(place)


def _shards(place: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        TINY["llama"]().save_pretrained(place / "model", max_shard_size="40KB")  # type: ignore[operator]
        tiny_tokenizer(adds=True).save_pretrained(place / "model")
    _text(place)


def _gguf(place: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": len(WORDS)}))
    write_gguf(place / "tiny.gguf", model, add_bos_token=True)
    _ids(place)


def _ids(place: Path) -> None:
    ids = torch.arange(96).reshape(6, 16) % 12 + 3
    save_file({"ids": ids, "attention_mask": torch.ones_like(ids)}, place / "ids.safetensors")


def _texts(place: Path) -> None:
    _model(place)
    _ids(place)
    lines = [
        json.dumps({"text": one, "id": i, "more": {"a": [i]}}) for i, one in enumerate(DOCUMENTS)
    ]
    (place / "text.jsonl").write_text("\n".join(lines))
    (place / "folder").mkdir()
    for split in ("train", "test"):
        (place / "folder" / f"{split}.jsonl").write_text("\n".join(lines))
    (place / "folder" / "dataset_info.json").write_text('{"description": "x"}')
    (place / "folder" / "README.md").write_text("---\nlicense: mit\n---\n")
    table = pd.DataFrame({"text": DOCUMENTS, "id": range(len(DOCUMENTS))})
    table.to_parquet(place / "text.parquet")


def _saved(place: Path) -> None:
    _model(place)
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(place / "saved"))


def _pairs(place: Path) -> None:
    _model(place)
    rows = [
        {"sentence_good": f"the cat {i} sleeps", "sentence_bad": f"the cat {i} sleep", "UID": "a"}
        for i in range(8)
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _lists(place: Path) -> None:
    _model(place)
    argv = score(
        "model", "text.txt", "--layer", "1", "--proj", "up_proj", "--out", f"{PLACE}/scores"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        status = main([part.replace(PLACE, str(place)) for part in argv])
    assert status == 0
    rows = pd.DataFrame({"layer": ["model.layers.1.mlp.up_proj"] * 5, "neuron": [1, 3, 5, 7, 9]})
    rows.to_csv(place / "rows.csv", index=False)
    rows.to_parquet(place / "rows.parquet")


ASSET = replace(demo.TEXT, wheel="demo-*.whl", member="pkg/pages.bz2")


def _pages() -> bytes:
    page = f"<page><title>A</title><ns>0</ns><revision><text>{TEXT}</text></revision></page>" * 6
    return bz2.compress(f'<mediawiki xmlns="http://x">{page}</mediawiki>'.encode())


def _wheel(place: Path) -> None:
    _model(place)
    (place / "offline").mkdir()
    wheel = place / "offline" / "demo-1.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/__init__.py", "")
        archive.writestr(ASSET.member, _pages())


@contextlib.contextmanager
def _offline(place: Path) -> Iterator[None]:
    own = replace(ASSET, sha256=hashlib.sha256(_pages()).hexdigest())
    with patch.object(demo, "TEXT", own), _cache(place):
        os.environ["ENTANGLE_DEMO_DIR"] = str(place / "offline")
        yield


@contextlib.contextmanager
def _cache(place: Path) -> Iterator[None]:
    os.environ["ENTANGLE_CACHE"] = str(place / "cache")  # of the child process alone
    yield


ONE = ("--layer", "1", "--proj", "up_proj")
MODEL_FILES = (
    "model/config.json", "model/config.json", "model/config.json", "model/generation_config.json",
    "model/tokenizer.json", "model/tokenizer.json", "model/tokenizer_config.json",
    "model/*.safetensors",
)  # fmt: skip
_READ_MODEL = (
    score("model", "text.txt", *ONE),
    score("model", "text.txt", *ONE),
    evaluate("model", "text.txt"),
    ("layers", f"{PLACE}/model", "--json"),
)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("model", _model, _READ_MODEL, MODEL_FILES),
        Kind(
            "gpt2", lambda place: _model(place, "gpt2"),
            (score("model", "text.txt", "--layer", "1", "--proj", "mlp"), _READ_MODEL[2]),
            MODEL_FILES,
        ),
        Kind(
            "bert", lambda place: _model(place, "bert"),
            (score("model", "text.txt", "--layer", "1", "--proj", "mlp"), _READ_MODEL[3]),
            MODEL_FILES,
        ),
        Kind(
            "shards", _shards, (_READ_MODEL[0], _READ_MODEL[2]),
            ("model/*.index.json", "model/model-*.safetensors", "model/tokenizer*.json"),
        ),
        Kind(
            "gguf", _gguf, (score("tiny.gguf", "ids.safetensors", *ONE),), ("tiny.gguf",),
            around=_cache,
        ),
        *(
            Kind(name, _texts, (score("model", text, *ONE), evaluate("model", text)), targets)
            for name, text, targets in (
                ("plain", "text.txt", ("text.txt",)),
                ("lines", "text.jsonl", ("text.jsonl",)),
                ("parquet", "text.parquet", ("text.parquet",)),
                ("folder", "folder", ("folder/*",)),
            )
        ),
        Kind(
            "ids", _texts,
            (
                score("model", "ids.safetensors", *ONE, cut=()),
                ("evaluate", f"{PLACE}/model", "--evaluation", f"{PLACE}/ids.safetensors", *QUICK),
            ),
            ("ids.safetensors",),
        ),
        Kind(
            "saved", _saved, (score("model", "saved", *ONE), evaluate("model", "saved")),
            ("saved/dataset_dict.json", "saved/*/*.json", "saved/*/*.json", "saved/*/*.arrow"),
        ),
        Kind(
            "pairs", _pairs,
            (ablate("--measure", "blimp", "--pairs", f"{PLACE}/pairs.jsonl", "--select", "all"),),
            ("pairs.jsonl",),
        ),
        Kind(
            "lists", _lists,
            tuple(
                ablate("--scores", f"{PLACE}/scores", "--select", f"{PLACE}/{name}", "--evaluation",
                       f"{PLACE}/text.txt", "--eval-seq-len", "16", "--eval-windows", "3")
                for name in ("rows.csv", "rows.parquet")
            ),
            ("rows.*",),
        ),
        Kind(
            "wheel", _wheel,
            (("score", f"{PLACE}/model", "--calibration", "demo", "--no-md", *ONE, *CUT, *QUICK),),
            ("offline/*",), around=_offline,
        ),
    )
}  # fmt: skip
"""By name; each with commands that read the damaged files, whichever of them."""
