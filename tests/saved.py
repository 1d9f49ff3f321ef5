"""What tests do to the folders of results."""

import json
from pathlib import Path

from entangle.runs.provenance import write_json
from entangle.runs.sealing import sealed


def without_digests(folder: Path) -> Path:
    """Make a result folder one that an earlier version wrote: no manifest has digests."""
    for path in folder.rglob("manifest.json"):
        manifest = json.loads(path.read_text("utf-8"))
        del manifest["digests"]
        path.write_text(json.dumps(manifest), "utf-8")
    return folder


def resealed(folder: Path) -> Path:
    """Make what was changed in a result folder what it was written with."""
    path = folder / "manifest.json"
    write_json(path, sealed(folder, json.loads(path.read_text("utf-8"))))
    return folder
