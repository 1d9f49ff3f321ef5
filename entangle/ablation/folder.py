"""Where a sweep keeps its finished arms, so that a killed sweep goes on where it was."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from entangle.errors import InvalidInput
from entangle.provenance import check_output, disk_errors

_PLAN = "plan.json"
_REMEDY = "name another folder; --resume goes on with what is written"


class ArmFolder:
    """Files of finished arms under a hidden name beside the final folder, made with the first.

    Parameters
    ----------
    final
        Name of the finished result.
    plan
        What is measured; a sweep is resumed only by one of the same plan.
    resume
        Go on with an unfinished sweep, if there is one.
    force
        Replace a finished result, and an unfinished sweep unless it is resumed.

    Raises
    ------
    InvalidInput
        If the result exists, or an unfinished sweep that is not to be resumed or differs.
    """

    def __init__(
        self,
        final: str | os.PathLike[str],
        plan: Mapping[str, object],
        *,
        resume: bool,
        force: bool,
    ) -> None:
        self.final = check_output(final, force=force)
        self.path = self.final.with_name(f".{self.final.name}.ablating")
        if self.path.exists() and not resume:
            if not force:
                raise InvalidInput(
                    f"an unfinished ablation of {str(final)!r} lies beside it; go on with --resume "
                    "(resume=True) or start anew with --force (force=True)."
                )
            shutil.rmtree(self.path)
        self._plan = plan
        if (self.path / _PLAN).exists():
            self._check_same(plan)

    def read(self, key: str) -> dict[str, NDArray[np.float64]] | None:
        """Return the raw numbers of a finished arm, or None."""
        path = self._file(key)
        if not path.exists():
            return None
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError, ValueError) as error:
            raise InvalidInput(
                f"{str(path)!r} is damaged ({error}); remove it and go on with --resume."
            ) from error

    def write(self, key: str, found: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep the raw numbers of an arm; the file appears when it is complete."""
        with disk_errors(self.final, remedy=_REMEDY):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / _PLAN).exists():
                self._replace(self.path / _PLAN, (json.dumps(self._plan, indent=2) + "\n").encode())
            self._replace(self._file(key), to_safetensors(dict(found)))

    def remove(self) -> None:
        """Remove the arms' files, once the result is saved."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.path / f"arm-{key}.safetensors"

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        temporary = path.with_suffix(".writing")
        temporary.write_bytes(content)
        os.replace(temporary, path)  # noqa: PTH105  (the atomic one)

    def _check_same(self, plan: Mapping[str, object]) -> None:
        try:
            found = json.loads((self.path / _PLAN).read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        wanted = json.loads(json.dumps(plan))
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            raise InvalidInput(
                f"the unfinished ablation of {str(self.final)!r} has another {differing[0]}; "
                "start anew with --force (force=True) without --resume."
            )
