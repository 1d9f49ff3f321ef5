"""The folder of a build: blocks appear as they are made, the final name when all is there."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from entangle.errors import InvalidInput
from entangle.expansion.build import ExpandedLayer
from entangle.expansion.checkpoint import block_file, read_block, write_block
from entangle.models.layers import Layer
from entangle.paths import inside
from entangle.provenance import expanded, output_folder, read_manifest, write_json
from entangle.sealing import file_digest, manifest_digest
from entangle.unfinished import Unfinished, is_made

_RUN, _DIGEST, _ENDING = "run.json", "sha256", "building"


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
        kind = str(manifest["kind"])
        self._finished = resume and is_made(final, kind, manifest, ending=_ENDING)
        if self._finished:  # killed after the last block, for example while it was evaluated
            self.final = self.path = Path(os.path.realpath(expanded(final)))
            made = read_manifest(final, kind)
            self._files = made.get("files")
            silent = made.get("layers_without_tokens")
            self._silent = set(silent) if isinstance(silent, list) else set()
            return
        self._force = force
        self._unfinished = Unfinished(
            final, manifest, what="build", ending=_ENDING, resume=resume, force=force
        )
        self.final, self.path = self._unfinished.final, self._unfinished.path

    def write(
        self, index: int, expanded: Sequence[ExpandedLayer], rows: Sequence[Mapping[str, object]]
    ) -> None:
        """Write one block, unless an earlier run has written it; the first makes the folder."""
        if self._finished:
            return
        self._unfinished.keep(
            block_file(index), partial(write_block, expanded=expanded, report=rows)
        )

    def read(
        self, index: int, layers: Sequence[Layer]
    ) -> tuple[list[ExpandedLayer], list[dict[str, object]]] | None:
        """Read a block that an earlier run has written, or None.

        Raises
        ------
        InvalidInput
            If its file was truncated or altered, or is missing from a finished build.
        """
        name = block_file(index)
        if self._finished and {layer.name for layer in layers} <= self._silent:
            return [], []
        path = self._made(name) if self._finished else self._unfinished.find(name)
        return None if path is None else read_block(path, {one.name: one for one in layers})

    def _made(self, name: str) -> Path:
        """Return the file of a block of a finished build."""
        path = inside(self.path, name, what=f"the finished build {str(self.path)!r}")
        known = self._files if isinstance(self._files, dict) else {}
        if not path.exists() or known.get(name) != file_digest(path):
            raise InvalidInput(
                f"{str(path)!r} is missing, truncated or altered; build it anew with --force "
                "(force=True) without --resume."
            )
        return path

    def finish(
        self,
        table: pd.DataFrame,
        manifest: Mapping[str, object],
        run: Mapping[str, object],
        *,
        extra: Callable[[Path], object] | None = None,
    ) -> Mapping[str, object]:
        """Write the table and the manifest with every file's digest, and take the final name.

        Seconds and memory of the run go to ``run.json``, so that all other files are the same for
        every build of the same settings. Returned are those of the build, which was another run
        where a finished one is read. Before the folder takes its name, ``extra`` is called with it.
        """
        if self._finished:
            return self._recorded() or run
        digests = dict(sorted(self._unfinished.digests().items()))
        with output_folder(self.final, force=self._force) as folder:
            for name in digests:
                _place(self.path / name, folder / name)
            table.to_parquet(folder / "layers.parquet", index=False)
            write_json(folder / "manifest.json", {**manifest, "files": digests})
            write_json(folder / _RUN, {**run, _DIGEST: manifest_digest(run)})
            if extra is not None:
                extra(folder)
        self._unfinished.remove()
        return run

    def _recorded(self) -> Mapping[str, object]:
        """Return what ``run.json`` of a finished build says; nothing where it was removed."""
        try:
            found = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or not found.keys() >= {"seconds", "peak_memory_bytes"}:
            return {}
        digest = found.pop(_DIGEST, None)
        return found if digest in (None, manifest_digest(found)) else {}


def _place(piece: Path, file: Path) -> None:
    """Give a piece a second name; where the file system knows no links, copy it."""
    try:
        os.link(piece, file)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(piece, file)
