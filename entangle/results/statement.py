"""How to make a result again, from its manifest, in two sentences."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entangle.errors import visible
from entangle.runs.provenance import shown as special_tokens
from entangle.runs.sealing import manifest_digest

DIGITS = 16
"""Of a digest that are written."""
_UNKNOWN = "not recorded"


def statement(title: str, manifest: Mapping[str, Any]) -> str:
    """Return two sentences: on what a result was measured with which versions, and its seeds.

    Parameters
    ----------
    title
        Such as ``"Scores of"``, before the model's name.
    manifest
        Of the result, of any version; what it lacks is called not recorded.
    """
    compared = [manifest[side] for side in ("a", "b") if isinstance(manifest.get(side), Mapping)]
    runs = compared or [manifest]
    texts = list(dict.fromkeys(text for one in runs for text in _texts(one)))
    texts = texts or [f"texts {_UNKNOWN}"]
    models = " and ".join(dict.fromkeys(_model(one.get("model")) for one in runs))
    what = f"{title[0].lower()}{title[1:]} {models}"
    first = f"For the {what}, {_versions(manifest)} read {' and '.join(texts)}"
    return visible(f"{first}. {_seeds(manifest)}.")


def _model(model: object) -> str:
    if not isinstance(model, Mapping):
        return f"a model {_UNKNOWN}"
    facts = [f"revision {model['revision']}"] if model.get("revision") else []
    facts += [_digest(model), str(model.get("dtype") or f"dtype {_UNKNOWN}")]
    device = model.get("device")
    facts.append(f"on {device}" if device else f"device {_UNKNOWN}")
    return f"{_name(model.get('name'))} ({', '.join(facts)})"


def _texts(manifest: Mapping[str, Any]) -> Iterator[str]:
    calibration, evaluation = manifest.get("calibration"), manifest.get("evaluation")
    scores = manifest.get("scores")
    if isinstance(calibration, Mapping):
        yield _text(calibration)
    scored = scores.get("calibration") if isinstance(scores, Mapping) else None
    if isinstance(scored, Mapping) and scored != calibration:
        yield f"scores of {_text(scored)}"
    if not isinstance(evaluation, Mapping):
        return
    parts = [evaluation] if "source" in evaluation else [*map(evaluation.get, ("text", "pairs"))]
    for part in parts:
        if isinstance(part, Mapping):
            yield f"to evaluate on {_text(part)}"


def _text(text: Mapping[str, Any]) -> str:
    """Say how much of which text, cut how."""
    if "n_pairs" in text:
        return f"{text['n_pairs']:,} minimal pairs of {_name(text.get('source'))} ({_digest(text)})"
    tokens = text.get("n_tokens")
    amount = f"{tokens:,} tokens" if isinstance(tokens, int) else f"a number of tokens {_UNKNOWN}"
    pieces = [
        f"{text[key]:,} {what} of {text.get('seq_len', '?')}"
        for key, what in (("n_seq", "sequences"), ("n_windows", "windows"))
        if isinstance(text.get(key), int)
    ]
    settings = text.get("settings")
    special = special_tokens(settings if isinstance(settings, Mapping) else {})
    facts = [*pieces, _digest(text), f"special tokens: {special}"]
    return f"{amount} of {_name(text.get('source'))} ({', '.join(facts)})"


def _versions(manifest: Mapping[str, Any]) -> str:
    packages = manifest.get("packages")
    if isinstance(packages, Mapping):
        return f"entangle {_listed(packages)}"
    packages = _inside(manifest, "scores", "packages")
    scored = f"; its scores by {_listed(packages)}" if isinstance(packages, Mapping) else ""
    return f"entangle (versions {_UNKNOWN}{scored})"


def _listed(packages: Mapping[str, Any]) -> str:
    """Return ``"0.1.0 (torch 2.8, transformers 5.23, Python 3.11)"``."""
    others = {name: name for name in ("torch", "transformers")} | {"python": "Python"}
    said = (f"{shown} {packages.get(name) or _UNKNOWN}" for name, shown in others.items())
    return f"{packages.get('entangle') or _UNKNOWN} ({', '.join(said)})"


def _seeds(manifest: Mapping[str, Any]) -> str:
    found = {
        "": manifest.get("settings"),
        " for its scores": _inside(manifest, "scores", "settings"),
        " for the sequences of the text": _inside(manifest, "calibration", "settings"),
    }
    seeds = [
        f"{one['seed']}{what}"
        for what, one in found.items()
        if isinstance(one, Mapping) and isinstance(one.get("seed"), int)
    ]
    settings = found[""]
    draws = settings.get("seeds") if isinstance(settings, Mapping) else None
    if isinstance(draws, int):
        seeds.append(f"{draws} draws of each random selection")
    said = f"The seed is {', '.join(seeds) or _UNKNOWN}"
    said += f", the manifest's SHA-256 {manifest_digest(manifest)[:DIGITS]}"
    command = manifest.get("command")
    return f"{said}, the command `{_command(command)}`" if isinstance(command, str) else said


def _command(command: str) -> str:
    """Return a command without the folders that its paths lie in."""
    try:
        return shlex.join(map(_name, shlex.split(command)))
    except ValueError:
        return command


def _inside(manifest: Mapping[str, Any], *path: str) -> object:
    found: object = manifest
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _digest(part: Mapping[str, Any]) -> str:
    digest = part.get("digest")
    return f"SHA-256 {digest[:DIGITS]}" if isinstance(digest, str) else f"digest {_UNKNOWN}"


def _name(name: object) -> str:
    """Return a name; of an absolute path the last part, which others know it by too."""
    if not isinstance(name, str) or not name:
        return f"a name {_UNKNOWN}"
    return Path(name).name if Path(name).is_absolute() else name
