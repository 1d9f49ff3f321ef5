"""The folder of a build: blocks appear as they are made, the final name when all is there."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from entangle.expansion.build import ExpandedLayer
from entangle.expansion.checkpoint import block_file, file_digest, read_block, write_block
from entangle.models.layers import Layer
from entangle.provenance import disk_errors, expanded, write_json
from entangle.unfinished import PLAN, Unfinished, is_made


class BuildFolder:
    """Where a build writes its blocks, under a hidden name beside the final one.

    Parameters
    ----------
    final
        Name of the finished checkpoint.
    manifest
        What is built; a build is resumed only by one of the same model, text and settings.
    resume
        Go on with an unfinished build, if there is one; a finished one of the same model, texts
        and settings is read, and stays as it is.
    force
        Replace a finished checkpoint, and an unfinished build unless it is resumed.

    Raises
    ------
    InvalidInput
        If the checkpoint exists, or an unfinished build that is not to be resumed or differs.
    """

    def __init__(
        self, final: Path, manifest: Mapping[str, object], *, resume: bool, force: bool
    ) -> None:
        self._finished = resume and is_made(final, str(manifest["kind"]), manifest)
        if self._finished:  # killed after the last block, for example while it was evaluated
            self.final = self.path = Path(os.path.realpath(expanded(final)))
            (self.path / PLAN).unlink(missing_ok=True)
            return
        self._unfinished = Unfinished(
            final, manifest, what="build", ending="building", resume=resume, force=force
        )
        self.final, self.path = self._unfinished.final, self._unfinished.path

    def write(
        self, index: int, expanded: Sequence[ExpandedLayer], rows: Sequence[Mapping[str, object]]
    ) -> None:
        """Write one block, unless an earlier run has written it; the first makes the folder."""
        if self._finished:
            return
        self._unfinished.begin()
        if not block_file(self.path, index).exists():
            write_block(self.path, index, expanded, rows)

    def read(
        self, index: int, layers: Sequence[Layer]
    ) -> tuple[list[ExpandedLayer], list[dict[str, object]]] | None:
        """Read a block that an earlier run has written, or None."""
        path = block_file(self.path, index)
        if not path.exists():
            return None
        return read_block(path, {layer.name: layer for layer in layers})

    def finish(
        self, table: pd.DataFrame, manifest: Mapping[str, object], run: Mapping[str, object]
    ) -> None:
        """Write the table and the manifest with every file's digest, and take the final name.

        Seconds and memory of the run go to ``run.json``, so that all other files are the same for
        every build of the same settings.
        """
        if self._finished:
            return
        with disk_errors(self.path):
            table.to_parquet(self.path / "layers.parquet", index=False)
            files = {p.name: file_digest(p) for p in sorted(self.path.glob("block-*.safetensors"))}
            write_json(self.path / "manifest.json", {**manifest, "files": files})
            write_json(self.path / "run.json", run)
            retired = self.path.with_name(f"{self.path.name}.old")
            shutil.rmtree(retired, ignore_errors=True)
            if self.final.exists():
                self.final.rename(retired)
            self.path.rename(self.final)
            (self.final / PLAN).unlink()
            shutil.rmtree(retired, ignore_errors=True)
