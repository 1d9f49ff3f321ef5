"""What the manifests of two runs differ in, and what may make their results differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from entangle.runs.provenance import without_run

ABSENT = "–"
"""Stands for what one of two manifests does not say."""
_LONGEST = 80

_COUNTS = ("n_documents", "n_characters", "n_text_tokens", "whole_text")
_CAUSES: Mapping[str, str] = {
    "model": "model",
    "model.dtype": "dtype",
    "model.device": "device",
    "calibration": "text",
    "calibration.n_seq": "tokens",
    "calibration.seq_len": "tokens",
    "calibration.n_tokens": "tokens",
    "calibration.settings.n_seq": "tokens",
    "calibration.settings.seq_len": "tokens",
    "calibration.settings.special_tokens": "special tokens",
    "calibration.settings.seed": "seed",
    "calibration.settings.tokenizer": "tokenizer",
    **{f"calibration.settings.{name}": "counts" for name in _COUNTS},
    "settings": "method",
    "settings.seed": "seed",
    "settings.layers": "layers",
    "settings.layers_without_tokens": "layers",
    "packages": "versions",
}
"""What an entry is a matter of, by the start of its path; the longest start counts."""
_CIRCUMSTANCES = {"layers", "versions", "device", "counts", "name"}
_FOLLOWING = ("digests", "kind", "schema_version", "settings.special_tokens_effect",
              "settings.batch_size", "calibration.settings.tokenizer.name")  # fmt: skip
"""What is a result, or changes none."""


@dataclass(frozen=True)
class Differing:
    """One entry that two manifests differ in."""

    cause: str
    """What it is a matter of: model, dtype, text, tokens, special tokens, tokenizer, seed, method;
    or a circumstance: layers, device, versions, counts (of the text), name (of what is the same
    by its digest)."""
    entry: str
    """Its path in the manifest, such as ``model.digest``."""
    a: str
    """Its value in the first, as a text; `ABSENT` where there is none."""
    b: str
    """Likewise, in the second."""


def what_differs(a: Mapping[str, object], b: Mapping[str, object]) -> list[Differing]:
    """List what two manifests differ in, apart from time, memory and command of the runs.

    A digest follows from what it is of: where other entries tell why it differs, it is a matter of
    theirs. So the digest of a model in another dtype is a matter of the dtype, and that of windows
    drawn with another seed one of the seed. Names of what has one digest are circumstances.

    Parameters
    ----------
    a, b
        Manifests, of JSON's types.
    """
    ours, theirs = (dict(_leaves(without_run(one))) for one in (a, b))
    missing = object()
    found = [
        Differing(
            _cause(entry), entry, _told(ours.get(entry, ABSENT)), _told(theirs.get(entry, ABSENT))
        )
        for entry in dict.fromkeys([*ours, *theirs])
        if ours.get(entry, missing) != theirs.get(entry, missing)
        and not any(_starts(entry, one) for one in _FOLLOWING)
    ]
    for part in ("model", "calibration"):
        entry = f"{part}.digest"
        same = entry in ours and ours[entry] == theirs.get(entry)
        found = _renamed(found, part) if same else _explained(found, part)
    return found


def causes(found: Sequence[Differing]) -> list[str]:
    """Return what a difference of the results may come from, each once, circumstances left out."""
    return list(dict.fromkeys(one.cause for one in found if one.cause not in _CIRCUMSTANCES))


def _leaves(content: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the entries of a manifest that hold no others."""
    if isinstance(content, Mapping) and content:
        for key, one in content.items():
            yield from _leaves(one, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, content


def _told(value: object) -> str:
    if not isinstance(value, list | tuple):
        return str(value)
    text = ", ".join(map(str, value)) or "none"
    return text if len(text) <= _LONGEST else f"{len(value):,}: {text[: _LONGEST - 10]}…"


def _starts(entry: str, start: str) -> bool:
    return entry == start or entry.startswith(f"{start}.")


def _cause(entry: str) -> str:
    known = [start for start in _CAUSES if _starts(entry, start)]
    return _CAUSES[max(known, key=len)] if known else "other"


def _renamed(found: list[Differing], part: str) -> list[Differing]:
    """Count what is said of a part that is the same by its digest as its name."""
    return [
        replace(one, cause="name") if _starts(one.entry, part) and one.cause != "device" else one
        for one in found
    ]


def _explained(found: list[Differing], part: str) -> list[Differing]:
    """Give the digest of a part the cause that the other entries of that part tell."""
    others = [one for one in found if _starts(one.entry, part) and one.entry != f"{part}.digest"]
    told = causes(others)
    return [
        replace(one, cause=told[0]) if told and one.entry == f"{part}.digest" else one
        for one in found
    ]
