import argparse
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from entangle.cli.main import build_parser
from entangle.cli.options import (
    add_calibration_options,
    add_layer_options,
    load_calibration,
    names,
    numbers,
    parse_bytes,
    spell_out,
)
from entangle.errors import InvalidInput
from entangle.texts import calibration

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20), ("512M", 2**29), ("2G", 2**31), ("2g", 2**31), ("1.5GiB", 3 * 2**29),
        (" 4 kb ", 4096), ("1T", 2**40), ("0", 0), ("3B", 3),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "2X", "1e9", "2 GG", "1,5G", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidInput, match=rf"512M.*2G.*'{text}'"):
        parse_bytes(text)


def test_defaults_are_told_and_filled_in_later() -> None:
    parser = argparse.ArgumentParser()
    add_calibration_options(parser)
    add_layer_options(parser)
    arguments = parser.parse_args(["--layer", "1", "--layer", "*.up_proj"])
    assert (arguments.n_seq, arguments.seq_len) == (None, None)
    assert (arguments.layer, arguments.proj) == (["1", "*.up_proj"], None)
    text = " ".join(parser.format_help().split())
    assert "number of sequences (default: 32, or all of a table of token ids)" in text
    assert "tokens in a sequence (default: 1024, or" in text


def test_layers_and_projections_are_joined_or_repeated() -> None:
    parser = argparse.ArgumentParser()
    add_layer_options(parser)
    words = [
        "--layer",
        "0, 2",
        "--layer",
        "h.[0,2].*,lm_head",
        "--proj",
        "mlp,attn",
        "--proj",
        "up",
    ]
    arguments = parser.parse_args(words)
    assert arguments.layer == ["0", "2", "h.[0,2].*", "lm_head"]
    assert arguments.proj == ["mlp", "attn", "up"]


def test_blanks_around_the_parts_of_a_list_do_not_matter() -> None:
    assert names(" a,b ,\tc d") == ["a", "b", "c d"]
    assert numbers("0.5, 0.7 ,0.5", float) == [0.5, 0.7]
    assert numbers(" 1, 16", int) == [1, 16]
    with pytest.raises(InvalidInput, match=r"\b1,16.*'1, , 2'"):
        numbers("1, , 2", int)


@pytest.mark.parametrize(
    ("command", "split"),
    [
        ("score", None),
        ("decompose --layer 1 --proj up_proj", None),
        ("expand --out x", "train"),
        ("compare --evaluation wikitext2", "train"),
        ("ablate", "train"),
        ("allocate scores --sparsity 0.7 --out x", "train"),
        ("expand --out x --split test", "test"),
        ("expand --out x --calibration wikitext2", None),
    ],
)
def test_what_fits_weights_leaves_the_demo_s_test_articles_out(
    monkeypatch: pytest.MonkeyPatch, command: str, split: str | None
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        calibration, "load_calibration", lambda *_names, **settings: asked.append(settings["split"])
    )
    model = SimpleNamespace(context_length=None, tokenizer=None, vocab_size=None)
    load_calibration(build_parser().parse_args(command.split()), cast("LanguageModel", model))
    assert asked == [split]


@pytest.mark.parametrize(
    ("command", "today"),
    [
        ("ablate --data x --data-split=test", "ablate --evaluation x --evaluation-split=test"),
        ("expand --evaluate x --out y", "expand --evaluation x --out y"),
        (
            "evaluate --data x --seq-len 8 --n-windows=2",
            "evaluate --evaluation x --eval-seq-len 8 --eval-windows=2",
        ),
        ("decompose --pairs 5", "decompose --token-pairs 5"),
        ("ablate --pairs blimp --strength 0.5", "ablate --pairs blimp --strength 0.5"),
        ("allocate --strength 0.5", "allocate --spread 0.5"),
    ],
)
def test_old_names_of_options_are_read_with_a_note(
    capsys: pytest.CaptureFixture[str], command: str, today: str
) -> None:
    assert spell_out(command.split()) == today.split()
    changed = [a for a, b in zip(command.split(), today.split(), strict=True) if a != b]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(changed)
    assert all(f"note: {a.split('=')[0]} is now" in b for a, b in zip(changed, said, strict=True))
