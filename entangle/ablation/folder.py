"""Where a sweep keeps its finished arms, so that a killed sweep goes on where it was."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from entangle.errors import InvalidInput
from entangle.provenance import expanded
from entangle.reading import READ_ERRORS
from entangle.unfinished import Unfinished, is_made

_ENDING = "ablating"


def is_finished(
    final: str | os.PathLike[str], kind: str, manifest: Mapping[str, object], *, force: bool
) -> bool:
    """Tell whether a sweep to be resumed is finished: its result is there, of these settings.

    With ``force`` it never is, since results are replaced then.

    Raises
    ------
    InvalidInput
        If a result is there that is of another model, texts or settings, or no ablation.
    """
    if force or not (expanded(final) / "manifest.json").is_file():
        return False
    if not is_made(final, kind, manifest, ending=_ENDING):
        raise InvalidInput(
            f"{str(final)!r} holds a finished ablation of another model, text or settings, which "
            "cannot be resumed; name another folder or use --force (force=True) to replace it."
        )
    return True


class ArmFolder:
    """Files of finished arms under a hidden name beside the final folder, made with the first.

    Parameters
    ----------
    final
        Name of the finished result.
    manifest
        What is measured; a sweep is resumed only by one of the same model, texts and settings.
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
        manifest: Mapping[str, object],
        *,
        resume: bool,
        force: bool,
    ) -> None:
        self._unfinished = Unfinished(
            final, manifest, what="ablation", ending=_ENDING, resume=resume, force=force
        )

    def read(
        self, key: str, like: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]] | None:
        """Return the raw numbers of a finished arm, or None.

        Raises
        ------
        InvalidInput
            If its file is damaged, or its numbers are no others' of the names and shapes of
            ``like``, those of the dense model.
        """
        path = self._unfinished.find(_file(key))
        if path is None:
            return None
        try:
            found = dict(load_file(path))
        except READ_ERRORS as error:
            raise _damaged(path, str(error)) from error
        kinds = {name: (one.dtype, one.shape) for name, one in found.items()}
        wanted = {name: (np.dtype(np.float64), one.shape) for name, one in like.items()}
        if kinds != wanted:
            raise _damaged(path, f"it holds {sorted(found)}, not what was measured")
        return found

    def write(self, key: str, found: Mapping[str, NDArray[np.float64]]) -> None:
        """Keep the raw numbers of an arm; the file appears when it is complete."""
        content = to_safetensors(dict(found))

        def write(path: Path) -> None:
            path.write_bytes(content)

        self._unfinished.keep(_file(key), write)

    def remove(self) -> None:
        """Remove the arms' files, once the result is saved."""
        self._unfinished.remove()


def _damaged(path: Path, why: str) -> InvalidInput:
    return InvalidInput(
        f"{str(path)!r} is damaged ({why}); remove it and go on with --resume (resume=True)."
    )


def _file(key: str) -> str:
    return f"arm-{key}.safetensors"
