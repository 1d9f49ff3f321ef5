"""Reading minimal pairs from JSON lines and from data sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entangle.checks import names, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation.minimal_pairs import MinimalPairs, check_pair
from entangle.runs.reading import decoding
from entangle.seeding import check_seed, numpy_rng
from entangle.texts.documents import as_path
from entangle.texts.files import json_object, numbered_lines, well_formed
from entangle.texts.hub import HubRequest, hub_request, plain_errors
from entangle.texts.special_tokens import DEFAULT_POLICY, check_policy

BLIMP = "nyu-mll/blimp"
"""Data set that the name ``blimp`` stands for: 67 paradigms of 1,000 pairs each."""

_FIELDS = ("sentence_good", "sentence_bad")


@dataclass(frozen=True)
class _Pair:
    """One pair as it was read."""

    good: str
    bad: str
    paradigm: str

    @classmethod
    def of(cls, row: Mapping[str, Any], where: str, *, unnamed: str) -> "_Pair":
        """Read a row; ``unnamed`` is the paradigm of one without ``UID``."""
        for field in _FIELDS:
            if field not in row:
                raise unknown_name(f"field of {where}:", field, row)
        values = [*(row[field] for field in _FIELDS), row.get("UID") or unnamed]
        for field, value in zip((*_FIELDS, "UID"), values, strict=True):
            if not isinstance(value, str):
                raise InvalidInput(
                    f"field {field!r} must hold text; {where} has {type(value).__name__}."
                )
        good, bad, paradigm = map(well_formed, values)
        check_pair(good, bad, where)
        return cls(good, bad, paradigm)


def load_minimal_pairs(
    source: str | Path = "blimp",
    *,
    paradigms: str | Iterable[str] | None = None,
    n_per_paradigm: int | None = None,
    seed: int = 0,
    special_tokens: str = DEFAULT_POLICY,
) -> MinimalPairs:
    """Read minimal pairs in the form of BLiMP.

    A row has the fields ``sentence_good`` and ``sentence_bad``, and may name its paradigm in
    ``UID``; if not, that is the file's name without its ending, or the data set's configuration.

    Parameters
    ----------
    source
        ``blimp`` (the data set ``nyu-mll/blimp``); a ``.jsonl`` file with one object a line, or a
        folder of them, read sorted by name without its subfolders; or another data set's id on
        the Hugging Face Hub, whose split ``train`` is read. Data sets are downloaded once.
    paradigms
        Take only these; None for all. In a data set of several configurations, each is a paradigm,
        and only those asked for are downloaded.
    n_per_paradigm
        Take so many pairs of each paradigm, drawn at random without replacement; None for all.
        Which ones does not depend on the other paradigms. They stay in their order.
    seed
        Of that draw.
    special_tokens
        What `minimal_pair_scores` puts in front of a sentence unless it is told otherwise there.

    Returns
    -------
    MinimalPairs
        ``settings`` has the data set or number of files, and the options.

    Raises
    ------
    Unavailable
        If a path cannot be read or the Hub not be reached.
    UnknownName
        If the data set, a paradigm or a field does not exist.
    InvalidInput
        If a line is not JSON, a field holds no text, a paradigm has fewer pairs than asked, the
        two sentences of a pair are equal, or there is no pair.

    Notes
    -----
    Warstadt et al., BLiMP: The Benchmark of Linguistic Minimal Pairs for English, TACL 2020.
    """
    paradigms = None if paradigms is None else names("paradigms", paradigms)
    if n_per_paradigm is not None:
        n_per_paradigm = whole("n_per_paradigm", n_per_paradigm, least=1)
    policy = check_policy(special_tokens)
    seed = check_seed(seed)
    path = None if source == "blimp" else as_path(source)
    if path is None:
        pairs, settings = _from_hub(BLIMP if source == "blimp" else str(source), paradigms)
    else:
        pairs, settings = _from_files(path, paradigms)
    if not pairs:
        raise InvalidInput(f"'{source}' holds no minimal pair; give a file that has some.")
    kept = pairs if n_per_paradigm is None else _subset(pairs, n_per_paradigm, seed)
    settings |= {
        "chosen": None if paradigms is None else list(paradigms),
        "n_per_paradigm": n_per_paradigm,
        "seed": None if n_per_paradigm is None else seed,
        "special_tokens": str(policy),
    }
    return MinimalPairs(
        good=tuple(pair.good for pair in kept),
        bad=tuple(pair.bad for pair in kept),
        paradigms=tuple(pair.paradigm for pair in kept),
        source=str(source),
        settings=settings,
    )


def _from_files(
    path: Path, paradigms: Sequence[str] | None
) -> tuple[list[_Pair], dict[str, object]]:
    files = _files(path)
    pairs = [pair for file in files for pair in _read(file)]
    return _named(pairs, paradigms, f"'{path}'"), {"n_files": len(files)}


def _files(path: Path) -> list[Path]:
    """Return the file, or the JSON-lines files of the folder."""
    with decoding(path, remedy="give a .jsonl file, or a folder of them"):
        path.stat()
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [f for f in inside if f.suffix.lower() == ".jsonl" and not f.name.startswith(".")]
    if not files:
        raise InvalidInput(
            f"minimal pairs must be in .jsonl files; '{path}' is none and holds none."
        )
    return files


def _read(path: Path) -> Iterator[_Pair]:
    for where, line in numbered_lines(path):
        yield _Pair.of(json_object(line, where), where, unnamed=path.stem)


def _from_hub(name: str, paradigms: Sequence[str] | None) -> tuple[list[_Pair], dict[str, object]]:
    import datasets

    if "/" not in name:
        raise unknown_name("source of minimal pairs", name, ["blimp"], "Or give owner/data-set.")
    request, where = _request(name), f"data set {name!r}"
    with plain_errors(request):
        configs = list(datasets.get_dataset_config_names(name))
    chosen = configs
    if len(configs) > 1 and paradigms is not None:
        chosen = list(dict.fromkeys(paradigms))
        for paradigm in chosen:
            if paradigm not in configs:
                raise unknown_name(f"paradigm of {where}", paradigm, configs)
    pairs = [pair for config in chosen for pair in _read_config(name, config)]
    if len(configs) == 1:
        pairs = _named(pairs, paradigms, where)
    return pairs, {"dataset": name, "split": request.split}


def _request(name: str, config: str | None = None) -> HubRequest:
    return hub_request(name, split=None, config=config, column=None)


def _read_config(name: str, config: str) -> Iterator[_Pair]:
    import datasets

    request = _request(name, config)
    with plain_errors(request):
        rows = datasets.load_dataset(name, config, split=request.split)
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {config!r} of data set {name!r}"
        yield _Pair.of(row, where, unnamed=config)


def _named(pairs: list[_Pair], paradigms: Sequence[str] | None, where: str) -> list[_Pair]:
    """Return the pairs of these paradigms."""
    if paradigms is None:
        return pairs
    found = {pair.paradigm for pair in pairs}
    for name in paradigms:
        if name not in found:
            raise unknown_name(f"paradigm of {where}", name, sorted(found))
    return [pair for pair in pairs if pair.paradigm in paradigms]


def _subset(pairs: list[_Pair], wanted: int, seed: int) -> list[_Pair]:
    places: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        places.setdefault(pair.paradigm, []).append(index)
    chosen: set[int] = set()
    for paradigm, indices in places.items():
        if wanted > len(indices):
            raise InvalidInput(
                f"`n_per_paradigm` must be at most {len(indices)}, as many pairs as {paradigm!r} "
                f"has; got {wanted}."
            )
        rng = numpy_rng(seed, "minimal pairs", paradigm)
        chosen.update(rng.choice(indices, size=wanted, replace=False).tolist())
    return [pairs[index] for index in sorted(chosen)]
