"""The ``entangle`` command.

What is wrong with a command's arguments, as far as it can be told before torch is imported.

Loading torch and transformers takes seconds; a mistyped path or number is told without them. The
sentences are those of the functions that take the settings, which check them again.
"""

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from entangle import __version__
from entangle.checks import choice, share, shares, shown, whole, wholes
from entangle.cli import (
    ablate,
    allocate,
    anchor,
    asked,
    columns,
    compare,
    completion,
    config,
    convert,
    decompose,
    demo,
    diff,
    evaluate,
    expand,
    experts,
    figures,
    layers,
    options,
    probe,
    prune,
    report,
    run,
    score,
    show,
    study,
    trace,
)
from entangle.cli import list as listing
from entangle.cli.meaning import MASKS, MIXTURES, check_meaning, given_options
from entangle.cli.options import names, numbers, parse_memory
from entangle.cli.tables import abandon, no_output
from entangle.doors import with_installed
from entangle.errors import EntangleError, InvalidInput, MemoryLimit, Unavailable, visible
from entangle.memory import check_memory, ran_out
from entangle.ranks import Place, Ranks, current, place_of, started
from entangle.runs.progress import tell
from entangle.runs.provenance import (
    check_output,
    claimed,
    expand_user,
    is_expansion,
    read_manifest,
    runs_as,
)
from entangle.seeding import check_seed

CLOSED_PIPE = 128 + 13
"""As a shell reports a program that the signal SIGPIPE (13) has ended."""

COMMANDS = (
    ablate, allocate, anchor, compare, completion, convert, decompose, demo, diff, evaluate, expand,
    experts, figures, layers, listing, probe, prune, report, run, score, show,
    study, trace,
)  # fmt: skip

SHARED = ("score", "expand", "prune", "compare", "ablate", "evaluate")
"""Commands that several ranks share out among themselves (`entangle.ranks`)."""

_AGAIN = 0.1  # seconds until a signal that was lost is sent again
STOPPING = ("SIGTERM", "SIGHUP")
"""Signals that end a command as Ctrl-C does: what it was writing is removed, pieces are kept."""


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end; no code that handles errors keeps it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)
        """The signal."""


class _Parser(argparse.ArgumentParser):
    """Ends with one line where an argument is wrong; subcommands inherit it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{visible(f'{self.prog}: error: {message}; see {self.prog} --help')}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and that of every command by its name."""
    parser = _Parser(
        prog="entangle",
        description="Neuron-entanglement analysis for language models.",
        epilog="Documentation and source of the method: arXiv 2405.15756.",
    )
    parser.add_argument("--version", action="version", version=f"entangle {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    for one in subparsers.choices.values():
        options.add_config_option(one)
    return parser, subparsers.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 2 for a user's mistake, 1 for a failure of the program or of standard output
        (no room, for example), 130 if interrupted, 141 if the reader of a pipe, such as head, had
        seen enough, 128 + n if the signal n (SIGTERM, SIGHUP) has ended it. Standard output and
        error that are closed before the start count as /dev/null.
    """
    _prepare_streams()
    try:
        try:
            with _stoppable(), _warnings_told():
                return _run(argv)
        except Stopped as stopped:
            with suppress(OSError):  # the terminal may be gone
                tell(f"ended by {stopped.signal.name}")
            return 128 + stopped.signal
        finally:
            print(end="", flush=True)  # what is buffered meets a closed pipe or full disk
    except BrokenPipeError:
        return _leave_pipe()
    except SystemExit as error:  # rich ends so where it meets a closed pipe
        if isinstance(error.__context__, BrokenPipeError):
            return _leave_pipe()
        raise
    except OSError as error:
        tell(f"error: {no_output(error)}")
        return EntangleError.exit_code


def _prepare_streams() -> None:
    """Let closed streams lead nowhere; those of other encodings get a "?" for what they lack."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # or the file that is opened next would take its place
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Say what the package logs as all else is said (`entangle.runs.progress.tell`)."""
    logger, handler = logging.getLogger("entangle"), _Told(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _run(argv: Sequence[str] | None) -> int:
    try:
        written = _written(sys.argv[1:] if argv is None else argv)
        parser, commands = _parsers()
        arguments = parser.parse_args(written)
        arguments.given = given_options(commands[arguments.command], written[1:], arguments)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        place = place_of(os.environ)
        _check_shared(arguments, place)
        with started(place) as here, _heard_of(here, written):
            check_arguments(arguments)
            _keep_to_memory(getattr(arguments, "memory", options.AUTO))
            with runs_as(written), _end_of_memory_told():
                _work(arguments)
    except EntangleError as error:
        tell(f"error: {error}")
        return error.exit_code
    except (BrokenPipeError, Stopped):
        raise
    except OSError as error:  # of a file whose name is too long, or that vanished, for example
        tell(f"error: {_said(error)}")
        return Unavailable.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    return 0


@contextmanager
def _end_of_memory_told() -> Iterator[None]:
    """Turn the end of memory, wherever it comes, into one line with what to ask for instead."""
    try:
        yield
    except EntangleError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        left = ""
        if "torch" in sys.modules and (gpu := sys.modules["torch"].cuda).is_initialized():
            left = (
                f" ({gpu.mem_get_info()[0] / 2**30:.2f} GiB are free on the GPU now, whose memory "
            )
            left += "other processes may fill meanwhile)"
        raise MemoryLimit(
            f"memory ran out{left}; lower --memory, --batch-size, --n-seq or --seq-len, take fewer "
            "layers at a time (--layer), or bring the weights block by block (--stream); finished "
            "work is gone on with by --resume where the command has it."
        ) from error


def _written(argv: Sequence[str]) -> list[str]:
    """Return a command line by today's names, with the options of its ``--config`` file."""
    written = options.spell_out(argv)
    if not any(one.startswith("--c") for one in written):
        return written
    commands = _parsers()[1]
    known = bool(written) and written[0] in commands
    return config.with_file(commands[written[0]], written) if known else written


def _work(arguments: argparse.Namespace) -> None:
    """Run a command, or print what it made before (`entangle.cli.asked`)."""
    asked.name_output(arguments)
    if getattr(arguments, "dry_run", False):
        from entangle.cli import composed, dry

        (composed if arguments.command in composed.COMMANDS else dry).run(arguments)
        return
    if _is_found(arguments):
        asked.show_found(arguments)
        return
    shared = arguments.command == "figures"  # files that any number of commands may add to
    with claimed(None if shared else getattr(arguments, "out", None)):  # before all else
        if _is_found(arguments):  # another process has made it meanwhile
            asked.show_found(arguments)
        else:
            asked.tell_place(arguments)
            arguments.run(arguments)


def _is_found(arguments: argparse.Namespace) -> bool:
    """Tell whether a command has been done, as the first rank sees it."""
    return bool(current().exchange(asked.is_found(arguments))[0])


def _check_shared(arguments: argparse.Namespace, place: Place | None) -> None:
    """Refuse to start a command several times that is not shared out."""
    if place is not None and getattr(arguments, "dry_run", False):
        if place.rank:
            raise SystemExit(InvalidInput.exit_code)
        raise InvalidInput("--dry-run tells of one process; start it without torchrun or srun.")
    if place is not None and arguments.command not in SHARED:
        if place.rank:
            raise SystemExit(InvalidInput.exit_code)  # the first says why
        raise InvalidInput(
            f"{arguments.command} runs in one process; this is rank {place.rank} of {place.size}: "
            f"start it without torchrun or srun (shared out are {', '.join(SHARED)})."
        )


@contextmanager
def _heard_of(here: Ranks, written: Sequence[str]) -> Iterator[None]:
    """Check that all ranks got one command; only the first prints."""
    here.agree({"command": list(written)})
    with ExitStack() as stack:
        if not here.leads:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        yield


def _said(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the operating system refuses: {reason}."
    return f"{shown(error.filename)} cannot be used: {reason}; check the path."


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let signals that end a program raise `Stopped` in the block, unless they are ignored.

    Where Python cannot let one through, as while it frees an object, it is sent again.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
        ours = [one for one in numbers if signal.getsignal(one) is signal.SIG_DFL]
    for one in ours:
        signal.signal(one, _stop)
    usual = sys.unraisablehook

    def send_again(lost: "sys.UnraisableHookArgs") -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        value = lost.exc_value
        number = value.signal if isinstance(value, Stopped) else signal.SIGINT
        threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _keep_to_memory(asked: str) -> None:
    """Let the process keep no more than it uses, if a size of memory was asked for."""
    from entangle.memory import keep_little

    memory = options.parse_memory(asked)
    if memory is not None:
        keep_little(memory)


def _leave_pipe() -> int:
    """Send what is still to be written to nowhere; return the status of such an end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            abandon(stream)
    return CLOSED_PIPE


LEAST: Mapping[str, int] = {
    "batch_size": 1, "count": 1, "eval_seq_len": 2, "eval_windows": 1, "limit": 1,
    "max_new_tokens": 1, "n_seq": 1,
    "pairs_per_paradigm": 1, "seeds": 1, "seq_len": 1, "evaluations": 2, "top": 1,
}  # fmt: skip
"""Options that are whole numbers, and the least of each."""
PRUNERS = ("random", "magnitude", "wanda", "sparsegpt")
COMPARED = (
    *PRUNERS, "magnitude-global", "expansion", "expansion-random",
    *(f"dsnot:{name}" for name in PRUNERS), *MASKS, *MIXTURES,
    *(f"teal:{name}" for name in (*PRUNERS, "expansion", "expansion-random")),
)  # fmt: skip
"""What `compare` knows, without what installed packages add (`ADDED`)."""
ADDED: Mapping[str, Sequence[str]] = {
    "methods": ("methods", "mixtures", "pruners"), "rule": ("rules",), "router": ("routers",),
    "measure": ("measures",),
}  # fmt: skip
"""Doors whose names an option takes too."""
NAMES: Mapping[str, tuple[str, Sequence[str]]] = {
    "intervention": ("intervention", (
        "prune", "prune-wanda", "prune-magnitude", "prune-random",
        "zero", "mean", "clamp-negative", "clamp-positive", "flip-negative",
    )),
    "methods": ("method", COMPARED),
    "router": ("router", ("kmeans", "random")),
    "rule": ("allocation rule", (
        "uniform", "layer", "protect", "linear", "rank", "owl", "alphapruning", "trim", "neuroal",
        "neuroal-blocks", "erk", "magnitude-global", "loss", "depth", "sensitivity", "search",
    )),
    "measure": ("measure", ("perplexity", "divergence", "blimp")),
}  # fmt: skip
"""Options that are lists of names: what one is called in a message, and those that exist."""
SELECTIONS = ("top", "bottom", "random", "random-norm", "random-variance", "all")


def _joined(method: str, known: Sequence[str]) -> bool:
    """Tell whether a name is of methods one on top of the other: ``teal:expansion:mine``."""
    first, *rest = method.split(":")
    if first == "expansion" and len(rest) == 1:
        return rest[0] in with_installed("routers", ("kmeans", "random"))
    if first == "dsnot" and len(rest) == 1:
        return rest[0] in with_installed("pruners", PRUNERS)
    if not rest or first not in known or first in ("expansion", "expansion-random"):
        return False
    return rest[0] in known if len(rest) == 1 else _joined(":".join(rest), known)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check model, texts, numbers and names of any command's arguments; import nothing heavy.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        As the functions do that take them.
    """
    given = vars(arguments)
    _check_numbers(given)
    for name, (kind, ours) in NAMES.items():
        known = tuple(ours)
        for door in ADDED.get(name, ()):
            known = with_installed(door, known)
        for one in names(given[name]) if isinstance(given.get(name), str) else ():
            if not (name == "methods" and _joined(one, known)):
                choice(name, one, known, kind=kind)
    _check_selections(given)
    if given.get("table") is not None:
        choice("table", given["table"], given["tables"])
    check_meaning(arguments)
    _check_files(given)
    _check_models(given)
    _check_texts(given)
    if given.get("scores") is not None:
        read_manifest(given["scores"], "scores")
    for side in ("a", "b") if given["command"] == "diff" else ():
        read_manifest(given[side], "scores")
    columns.check_columns(given)
    for one in given.get("runs") or ():
        if not expand_user(one).exists():
            read_manifest(one, "result")


def _check_numbers(given: Mapping[str, object]) -> None:
    for name, least in LEAST.items():
        if given.get(name) is not None:
            whole(name, given[name], least=least)
    if "seed" in given:
        check_seed(given["seed"])  # type: ignore[arg-type]
    fraction = given.get("fraction")
    if fraction is not None:
        share("fraction", fraction, zero=False)
    experts = given.get("experts")
    if experts is not None:
        wholes("experts", numbers(experts, int) if isinstance(experts, str) else experts, least=1)
    for option in ("sparsity", "strength", "edit_strength"):
        several = given.get(option)
        if isinstance(several, str):
            shares(option, numbers(several, float))
    sparsity = given.get("sparsity")
    if isinstance(sparsity, float):
        share("sparsity", sparsity)
    if isinstance(given.get("join"), str):
        from entangle.texts.documents import interpret_escapes

        interpret_escapes(str(given["join"]))
    memory = given.get("memory")
    if isinstance(memory, str):
        check_memory(parse_memory(memory))


def _check_selections(given: Mapping[str, object]) -> None:
    """Check what `ablate` chooses by; columns and files of neurons come later."""
    select = given.get("select")
    for one in names(select) if isinstance(select, str) else ():
        if not one.lower().endswith((".csv", ".parquet")):
            choice("select", one, SELECTIONS, kind="selection")


def _check_files(given: Mapping[str, object]) -> None:
    """Check that allocations exist, and that the result's folder does not."""
    allocation, out = given.get("allocation"), given.get("out")
    for one in names(allocation) if isinstance(allocation, str) else ():
        path = expand_user(one.partition("=")[2].strip() if "=" in one else one)
        if not path.exists():
            raise InvalidInput(f"{str(path)!r} is no file; name one that allocate wrote.")
    folder = given.get("command") in (
        "ablate", "anchor", "expand", "experts", "compare", "convert", "score", "decompose", "diff",
        "prune",
    )  # fmt: skip
    if folder and isinstance(out, str) and not given.get("resume"):
        check_output(out, force=bool(given.get("force")))


def _check_models(given: Mapping[str, object]) -> None:
    for option in ("model", "base", "dense"):
        name = given.get(option)
        if not isinstance(name, str) or _is_result(name):
            continue
        from entangle.models import hub
        from entangle.models.hub import check_settings, model_source

        source = model_source(name)
        loading = {key: given.get(key) for key in ("revision", "dtype", "device", "device_map")}
        if given.get("base") is None or option != "model":
            check_settings(source, name, **loading)  # type: ignore[arg-type]
        if source == "hub":
            hub.check_model(name)


def _is_result(name: str) -> bool:
    """Tell whether a folder is a Sparse Expansion, which stands for a model in some commands."""
    path = expand_user(name)
    try:
        return is_expansion(path)
    except OSError:  # no name that the file system could hold: told with what a model may be
        return False


def _check_texts(given: Mapping[str, object]) -> None:
    for option in ("calibration", "evaluation"):
        source = given.get(option)
        if not isinstance(source, str | os.PathLike):
            continue
        from entangle.texts.documents import as_path, existing

        path = as_path(source if isinstance(source, str) else Path(source))
        if path is not None:
            existing(path)
        elif source != "demo":
            from entangle.models import hub
            from entangle.texts.hub import hub_request

            request = hub_request(str(source), split=None, config=None, column=None)
            hub.check_data_set(request.name)


if __name__ == "__main__":
    sys.exit(main())
