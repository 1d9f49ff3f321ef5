"""What the settings of a text say of the special tokens around it; nothing heavy is imported here.

The setting ``special_tokens`` is made by `entangle.texts.special_tokens.affixes`.
"""

from collections.abc import Mapping
from typing import Any

POLICIES = ("model", "none", "published")
"""Special tokens around every sequence as the model expects them, none, or once around the text."""


def recorded(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the settings of a text say of special tokens, None where they say nothing.

    Settings of earlier versions are read too.
    """
    found = settings.get("special_tokens")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        found = {"before": found}
    before, after = list(found.get("before", [])), list(found.get("after", []))
    policy = "model" if before or after else "none"
    return {"policy": policy, **found, "before": before, "after": after}


def of_saved(origin: Mapping[str, Any] | None, *, whole: bool) -> dict[str, object]:
    """Return the setting ``special_tokens`` of a saved set's rows, nothing where it is unknown.

    Parameters
    ----------
    origin
        `CalibrationSet.describe` of the set.
    whole
        Whether the rows are taken to their end; else they have lost what stood there.
    """
    known = None if origin is None else recorded(origin.get("settings", {}))
    if known is None:
        return {}
    return {"special_tokens": known if whole else {**known, "after": [], "after_tokens": []}}


def around_each(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many special tokens stand before and after every sequence of a text."""
    known = recorded(settings)
    if known is None or known["policy"] == "published":
        return 0, 0
    return len(known["before"]), len(known["after"])


def special_tokens_of(manifest: Mapping[str, Any], *path: str) -> str:
    """Name the special tokens of the text that a manifest describes under some keys, as `shown`."""
    described: Any = manifest
    for key in (*path, "settings"):
        described = described.get(key) if isinstance(described, Mapping) else None
    return shown(described if isinstance(described, Mapping) else {})


def shown(settings: Mapping[str, Any]) -> str:
    """Name the special tokens of a text in a few words: ``<s> …``, ``none``, ``unknown``."""
    known = recorded(settings)
    if known is None:
        return "unknown"
    before, after = (
        [str(token) for token in known.get(f"{side}_tokens", known[side])]
        for side in ("before", "after")
    )
    if not before and not after:
        return "none"
    once = " once" if known["policy"] == "published" else ""
    return " ".join([*before, "…", *after]) + once
