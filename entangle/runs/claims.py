"""Who writes a result: a file beside it names the process, and no other begins.

The file appears under its name with its content, by one link, which file systems of networks do
in one step too. A process that died without removing it is found by its number and start; the file
of a process that cannot be looked at from here, on another machine or in another container, is
respected.
"""

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from threading import get_ident

from entangle.errors import Unavailable

with suppress(ImportError):  # Windows has none
    import fcntl

_LONGEST = 200  # bytes of a name that others are made from
_PATIENCE = 1.0  # seconds that a file without content, or one that was moved aside, may take
_TRIES = 100
_ENDED = "ended"


@dataclass(frozen=True)
class Writer:
    """A process that writes a result."""

    pid: int
    """Its number."""
    started: str
    """When it began, as its machine counts."""
    host: str
    """Name of its machine."""
    place: str
    """The running system and the table of processes in which its number means it."""
    since: str
    """When it claimed the result, local time."""
    token: str
    """Unlike that of every other claim."""

    @classmethod
    def this(cls) -> "Writer":
        """Describe this process, with a new token."""
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(pid, _started(pid), platform.node(), _place(), since, uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> "Writer | None":
        """Read who has claimed; None if the file holds nothing that can be read.

        Raises
        ------
        OSError
            If there is no file, or it may not be read.
        """
        text = path.read_text(encoding="utf-8", errors="replace")
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(text)
            return cls(int(found.pop("pid")), **{name: str(one) for name, one in found.items()})
        return None

    @property
    def is_known_dead(self) -> bool:
        """Whether it is certain that the process has ended."""
        if self.host != platform.node():
            return False
        system, _, table = self.place.partition(" ")
        own_system, _, own_table = _place().partition(" ")
        if _is_earlier_start(system, own_system):
            return True
        here = (system, table) == (own_system, own_table)
        return here and _has_ended(self.pid, self.started)


@dataclass
class _Held:
    """A claim of this process."""

    writer: Writer
    thread: int
    depth: int = 1


_HELD: dict[Path, _Held] = {}


@contextmanager
def claim(target: Path) -> Iterator[bool]:
    """Claim a result for this process while the block runs; again in the block does nothing.

    Yields True where the claim is new, so that whatever other processes have left beside the result
    belongs to nobody.

    Parameters
    ----------
    target
        Absolute path of the result, which need not exist; folders above it are made.

    Raises
    ------
    Unavailable
        If another process, or another thread of this one, has claimed it; the message names it.
    OSError
        If the folder cannot be written.
    """
    held = _HELD.get(target)
    if held is not None and held.writer.pid != os.getpid():  # of the process this one was forked of
        held = None
    if held is not None and held.thread != get_ident():
        raise _refusal(target, held.writer, "another thread of this process, ")
    if held is not None:
        held.depth += 1
        try:
            yield False
        finally:
            held.depth -= 1
        return
    made = _make_folders(target.parent)
    try:
        _HELD[target] = _Held(_claim(target), get_ident())
        try:
            _remove_asides(target)
            yield True
        finally:
            insist(partial(_release, target, _HELD.pop(target).writer))
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def insist(clean: Callable[[], object]) -> None:
    """Call a function that cleans up, again where a signal stops it, and then let that go on."""
    try:
        clean()
    except KeyboardInterrupt:
        clean()
        raise


def check_claimed(target: Path) -> None:
    """Check that a claim that this process holds is still its own, before something is written.

    Raises
    ------
    Unavailable
        If the file was removed or is another process's. Without a claim nothing is checked.
    """
    held = _HELD.get(target)
    if held is None or held.writer.pid != os.getpid():
        return
    found, end = None, time.monotonic() + _PATIENCE
    while found is None and time.monotonic() < end:
        with suppress(OSError):
            found = Writer.read(claim_file(target))
        if found is None:
            time.sleep(0.02)
    if found is None or found.token != held.writer.token:
        by = "was removed" if found is None else f"is now that of {_named(found)}"
        raise Unavailable(
            f"the claim {str(claim_file(target))!r} on {str(target)!r} {by}, so this process stops "
            "before it mixes its work with another's; let one process at a time write there."
        )


def claim_file(target: Path) -> Path:
    """Return the file that tells who writes ``target``."""
    return beside(target, "lock")


def beside(target: Path, ending: str) -> Path:
    """Return the hidden path beside ``target`` that is named after it and ends so."""
    if target.name in ("", ".."):  # ".", "..", "/": none of them ends in a name
        target = Path(os.path.abspath(target))  # noqa: PTH100  (links are not followed)
    name = target.name or "root"
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.parent / f".{name}.{ending}"


def _claim(target: Path) -> Writer:
    """Put a file with this process's name beside the result, if no other is there."""
    path, writer = claim_file(target), Writer.this()
    for _ in range(_TRIES):
        try:
            if _link(path, writer):
                return writer
        except KeyboardInterrupt:
            _release(target, writer)
            raise
        except FileNotFoundError:  # the folder was new, and its maker has removed it
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            other = _read_patiently(path)
        except FileNotFoundError:  # released meanwhile
            continue
        if other is not None and not other.is_known_dead:
            raise _refusal(target, other)
        try:
            if _follow(path, other, writer):
                return writer
        except KeyboardInterrupt:
            _release(target, writer)
            raise
    raise Unavailable(
        f"{str(path)!r} comes and goes: several processes want to write {str(target)!r}; let one "
        "process at a time write there."
    )


def _link(path: Path, writer: Writer) -> bool:
    """Make the file with its content in one step; False if one is there."""
    own = path.with_name(f"{path.name}.{writer.token}")
    _make(own, writer)
    try:
        os.link(own, path)
    except FileExistsError:
        return own.stat().st_nlink == 2  # of a network: done, though its answer was lost
    except OSError:  # a file system without links
        try:
            _make(path, writer)
        except FileExistsError:
            return False
    finally:
        insist(partial(own.unlink, missing_ok=True))
    return True


def _make(path: Path, writer: Writer) -> None:
    """Make a file that was not there; nothing is left of it where the disk is full."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(writer), file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read_patiently(path: Path) -> Writer | None:
    """Read who has claimed, and wait for the content where it comes after the file."""
    end = time.monotonic() + _PATIENCE
    while (found := Writer.read(path)) is None and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _follow(path: Path, dead: Writer | None, writer: Writer) -> bool:
    """Put the file of this process in the place of a dead one's, in one step.

    Those who follow take turns by a lock on the dead one's file, and look again when it is theirs.
    False where it is another's by now, or where there are no locks and it was only removed.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a network it may never come
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
            found = Writer.read(path)
            if found is not None and (dead is None or found.token != dead.token):
                return False
            own = path.with_name(f"{path.name}.{writer.token}")
            _make(own, writer)
            try:
                own.replace(path)
            finally:
                insist(partial(own.unlink, missing_ok=True))
            return True
    except FileNotFoundError:  # released meanwhile
        return False
    except BlockingIOError:  # another's turn
        time.sleep(0.02)
        return False
    except (NameError, OSError):  # a system, or a file system, without locks
        _set_aside(path, dead)
        return False


def _set_aside(path: Path, dead: Writer | None) -> None:
    """Remove the file of a dead process, and no other's that took its place meanwhile."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    found = Writer.read(aside)
    if found is not None and (dead is None or found.token != dead.token):
        with suppress(OSError):  # if a third came, its owner finds out: `check_claimed`
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _remove_asides(target: Path) -> None:
    """Remove the files of processes that died while they claimed, or while they followed one."""
    start = f"{claim_file(target).name}."
    for path in target.parent.iterdir():
        if path.name.startswith(start):
            with suppress(OSError):
                found = Writer.read(path)
                if found is None or found.is_known_dead:  # who lives makes it again
                    path.unlink()


def _release(target: Path, writer: Writer) -> None:
    path = claim_file(target)
    with suppress(OSError):
        found = Writer.read(path)
        if found is not None and found.token == writer.token:
            path.unlink()


def _refusal(target: Path, writer: Writer, who: str = "") -> Unavailable:
    return Unavailable(
        f"{str(target)!r} is being written by {who}{_named(writer)}; wait for it, name another "
        f"folder, or remove {str(claim_file(target))!r} if that process has ended."
    )


def _named(writer: Writer) -> str:
    return f"process {writer.pid} on {writer.host!r} since {writer.since}"


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _has_ended(pid: int, started: str) -> bool:
    """Tell whether it is certain that a process of this table has ended."""
    if os.name == "posix":
        try:
            os.kill(pid, 0)  # the signal 0 only asks
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):  # another user's; its entry may be hidden
            pass
    now = _started(pid)
    return now == _ENDED or ("" not in (now, started) and now != started)


def _started(pid: int) -> str:
    """Return when a process began, "" where that cannot be seen."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = after.rpartition(")")[2].split()
        return _ENDED if fields[0] in ("Z", "X", "x") else fields[19]
    except (OSError, IndexError):
        return "" if Path("/proc/self/stat").exists() else _started_elsewhere(pid)


def _started_elsewhere(pid: int) -> str:
    """As `_started`, without /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return _ENDED
        return str(round(process.create_time()))
    except psutil.NoSuchProcess:
        return _ENDED
    except psutil.Error:
        return ""


@cache
def _place() -> str:
    """Return what makes the number of a process that process: machine, its start, and table."""
    machine = _read("/etc/machine-id")
    boot = _read("/proc/sys/kernel/random/boot_id") or "-"
    try:
        table = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        table = "-"
    return f"{machine}/{boot} {table}"


def _is_earlier_start(system: str, own: str) -> bool:
    """Tell whether a system is this machine, before it was started anew."""
    machine, _, boot = system.partition("/")
    own_machine, _, own_boot = own.partition("/")
    return machine == own_machine != "" and boot != own_boot


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""
