"""Work that takes long and is kept piece by piece, under a hidden name until it is complete."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from entangle.errors import InvalidInput
from entangle.runs.claims import beside, check_claimed
from entangle.runs.provenance import (
    check_output,
    discard,
    disk_errors,
    expand_user,
    read_manifest,
    scratch,
    without_run,
    write_json,
)
from entangle.runs.reading import inside
from entangle.runs.sealing import file_digest

PLAN = "plan.json"
DIGESTS = "digests.json"
PLANNED = ("model", "calibration", "evaluation", "settings")
"""Parts of a manifest that make a result what it is."""
_REMEDY = "name another folder; --resume goes on with what is written"


def is_made(
    final: str | os.PathLike[str], kind: str, manifest: Mapping[str, object], *, ending: str
) -> bool:
    """Tell whether ``final`` is the finished result of the same model, texts and settings.

    If so, pieces of it that a killed process has left beside it are removed; ``ending`` is that of
    their folder.
    """
    if not (expand_user(final) / "manifest.json").is_file():
        return False
    found = read_manifest(final, kind)
    plan = _plan(manifest)
    if _plan({key: found.get(key) for key in PLANNED}) != plan:
        return False
    target = Path(os.path.realpath(expand_user(final)))
    pieces = beside(target, ending)
    with suppress(OSError, ValueError):
        if json.loads((pieces / PLAN).read_text(encoding="utf-8")) == plan:
            discard(pieces, target)
    return True


def _plan(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return what makes a result what it is, as JSON gives it back."""
    plan = without_run({key: manifest[key] for key in PLANNED})
    return dict(json.loads(json.dumps(plan)))


def _plan_digest(plan: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


class Unfinished:
    """A hidden folder beside a result that is being made; it appears with the first piece.

    The digest of every piece is kept with that of the plan that it belongs to. Who makes a result
    has claimed it (`entangle.runs.provenance.claimed`): nothing is written once the claim is lost.

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
        self.path = beside(self.final, ending)
        """Where its pieces are kept."""
        self._what, self._plan = what, _plan(manifest)
        self._digest = _plan_digest(self._plan)
        with disk_errors(self.path):
            if self.path.is_symlink():
                raise InvalidInput(
                    f"{str(self.path)!r} is a link to {str(self.path.readlink())!r}, where pieces "
                    f"of the {what} would be read and written; remove it."
                )
            found = self.path.exists()
            if found and not resume and not force:
                raise InvalidInput(
                    f"an unfinished {what} of {str(final)!r} lies beside it; go on with --resume "
                    "(resume=True) or start anew with --force (force=True)."
                )
            if found and not resume:
                discard(self.path, self.final)
        self._begun = found and resume
        if self._begun:
            self._check_same()

    def begin(self) -> None:
        """Make the folder with its plan, unless it is there."""
        if self._begun:
            return
        with disk_errors(self.path):
            fresh = scratch(self.final)
            fresh.mkdir(parents=True)
            try:
                write_json(fresh / PLAN, self._plan)
                os.replace(fresh, self.path)  # noqa: PTH105  (from here on it can be resumed)
            finally:
                discard(fresh, self.final)
        self._begun = True

    def keep(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep a piece, unless it is there; the file appears when it is complete.

        Its digest, and that of the plan, are written first, so that no piece is without them.

        Parameters
        ----------
        name
            Of the file.
        write
            Called with the path to write it to.

        Raises
        ------
        InvalidInput, Unavailable
            If a piece of another plan is there, or another process writes the result.
        """
        check_claimed(self.final)
        self.begin()
        path = self._inside(name)
        if path.exists():
            self._check_planned(path)
            return
        with disk_errors(path, remedy=_REMEDY):
            partial = path.with_suffix(".writing")
            partial.unlink(missing_ok=True)  # of a killed run, or a link to another file
            write(partial)
            check_claimed(self.final)  # what is written may take long
            digests = self.path / DIGESTS
            changed = digests.with_suffix(".writing")
            changed.unlink(missing_ok=True)
            entry = {"sha256": file_digest(partial), "plan": self._digest}
            write_json(changed, self._entries() | {name: entry})
            os.replace(changed, digests)  # noqa: PTH105  (the atomic one)
            os.replace(partial, path)  # noqa: PTH105

    def find(self, name: str) -> Path | None:
        """Return the file of a piece that was kept, None if there is none.

        Raises
        ------
        InvalidInput
            If it is not what was written, or belongs to another plan.
        """
        path = self._inside(name)
        if not path.exists():
            return None
        if self.digests().get(name) != file_digest(path):
            raise InvalidInput(
                f"{str(path)!r} was truncated or altered; remove it and go on with --resume "
                "(resume=True), which makes it anew."
            )
        self._check_planned(path)
        return path

    def _inside(self, name: str) -> Path:
        return inside(self.path, name, what=f"the unfinished {self._what} {str(self.path)!r}")

    def _check_planned(self, path: Path) -> None:
        plan = self._entries().get(path.name, {}).get("plan", self._digest)
        if plan != self._digest:
            raise InvalidInput(
                f"{str(path)!r} was made with other settings (plan {plan[:12]}…) than this "
                f"{self._what} (plan {self._digest[:12]}…); remove it and go on with --resume "
                "(resume=True), which makes it anew."
            )

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every piece as it was written, by name."""
        return {name: entry.get("sha256", "") for name, entry in self._entries().items()}

    def _entries(self) -> dict[str, dict[str, str]]:
        """Return the digests of every piece, and of its plan where it was noted."""
        if not (self.path / DIGESTS).exists():
            return {}
        read = self._read(DIGESTS)
        for name in read:  # they come into the manifest of the result
            inside(self.path, name, what=f"the list {str(self.path / DIGESTS)!r}")
        return {
            name: {key: str(one) for key, one in entry.items()}
            if isinstance(entry, dict)
            else {"sha256": str(entry)}  # as of a folder that an earlier version began
            for name, entry in read.items()
        }

    def remove(self) -> None:
        """Remove all pieces, once the result is saved."""
        discard(self.path, self.final)

    def _read(self, name: str) -> dict[str, object]:
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InvalidInput(
                f"the unfinished {self._what} of {str(self.final)!r} has no readable {name} "
                f"({error}); start anew with --force (force=True) without --resume."
            ) from error

    def _check_same(self) -> None:
        read = self._read(PLAN)
        found = _plan({key: read.get(key) for key in PLANNED})
        differing = [key for key in PLANNED if found[key] != self._plan[key]]
        if differing:
            raise InvalidInput(
                f"the unfinished {self._what} of {str(self.final)!r} has another {differing[0]}; "
                "start anew with --force (force=True) without --resume."
            )
