"""Work that takes long and is kept piece by piece, under a hidden name until it is complete."""

import json
import os
import shutil
from collections.abc import Mapping

from entangle.errors import InvalidInput
from entangle.provenance import check_output, disk_errors, expanded, read_manifest, write_json

PLAN = "plan.json"
_SAME = ("model", "calibration", "evaluation", "settings")


def is_made(final: str | os.PathLike[str], kind: str, manifest: Mapping[str, object]) -> bool:
    """Tell whether ``final`` is the finished result of the same model, texts and settings."""
    if not (expanded(final) / "manifest.json").is_file():
        return False
    found = read_manifest(final, kind)
    wanted = json.loads(json.dumps({key: manifest[key] for key in _SAME}))
    return all(found.get(key) == wanted[key] for key in _SAME)


class Unfinished:
    """A hidden folder beside a result that is being made; it appears with the first piece.

    Parameters
    ----------
    final
        Name of the finished result.
    manifest
        What is made; work is resumed only for the same model, texts and settings.
    what
        Noun for messages, such as ``build``.
    ending
        Ending of the hidden name, such as ``building``.
    resume
        Go on with unfinished work, if there is some.
    force
        Replace a finished result, and unfinished work unless it is resumed.

    Raises
    ------
    InvalidInput
        If the result exists, or unfinished work that is not to be resumed or differs.
    """

    def __init__(
        self,
        final: str | os.PathLike[str],
        manifest: Mapping[str, object],
        *,
        what: str,
        ending: str,
        resume: bool,
        force: bool,
    ) -> None:
        self.final = check_output(final, force=force)
        """Where the result will be."""
        self.path = self.final.with_name(f".{self.final.name}.{ending}")
        """Where its pieces are kept."""
        self._what, self._plan = what, {key: manifest[key] for key in _SAME}
        with disk_errors(self.path):
            found = self.path.exists()
            if found and not resume and not force:
                raise InvalidInput(
                    f"an unfinished {what} of {str(final)!r} lies beside it; go on with --resume "
                    "(resume=True) or start anew with --force (force=True)."
                )
            if found and not resume:
                shutil.rmtree(self.path)
        self._begun = found and resume
        if self._begun:
            self._check_same()

    def begin(self) -> None:
        """Make the folder with its plan, unless it is there."""
        if self._begun:
            return
        with disk_errors(self.path):
            fresh = self.path.with_name(f"{self.path.name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            try:
                write_json(fresh / PLAN, self._plan)
                os.replace(fresh, self.path)  # noqa: PTH105  (from here on it can be resumed)
            except BaseException:
                shutil.rmtree(fresh)
                raise
        self._begun = True

    def _check_same(self) -> None:
        try:
            found = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"the unfinished {self._what} of {str(self.final)!r} has no readable {PLAN} "
                f"({error}); start anew with --force (force=True) without --resume."
            ) from error
        wanted = json.loads(json.dumps(self._plan))
        differing = [key for key in _SAME if found.get(key) != wanted[key]]
        if differing:
            raise InvalidInput(
                f"the unfinished {self._what} of {str(self.final)!r} has another {differing[0]}; "
                "start anew with --force (force=True) without --resume."
            )
