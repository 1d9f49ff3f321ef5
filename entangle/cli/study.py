"""``entangle study``: the paper's claims on any list of models, with verdicts."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from entangle.checks import choice, choices, whole
from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput
from entangle.runs.provenance import expand_user

if TYPE_CHECKING:
    import pandas as pd

    from entangle.evaluation import EvaluationText, MinimalPairs
    from entangle.models.loading import LanguageModel
    from entangle.results.study import Study
    from entangle.studies.study import Loaded
    from entangle.texts.calibration_set import CalibrationSet

TABLES = ("verdicts", "deciding", "numbers", "models")
SIZES = ("small", "full")
READ = {name: name for name in (
    "revision", "dtype", "n_seq", "seq_len", "sampling", "join", "split", "calibration_config",
    "column", "special_tokens", "evaluation_split", "evaluation_config", "evaluation_column",
)} | {"window": "eval_seq_len", "windows": "eval_windows"}  # fmt: skip
"""Options that models and texts depend on, by what settings call them."""
FORMATS = {"value": ".4g", "low": ".4g", "high": ".4g", "bar": "g", "p": ".2g", "p_holm": ".2g",
           "n_parameters": ",d", "calibration_tokens": ",d", "seconds": ".0f"}  # fmt: skip


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "study",
        help="measure the paper's claims on models, and say which hold",
        description="Measure every claim of the paper on each model, on one text and the same "
        "windows for all arms, and say whether it holds; writes a table a claim and a page.",
    )
    parser.add_argument(
        "models", nargs="*", default=["demo"], metavar="MODEL",
        help="hub ids (ID@REVISION for a revision), folders, .gguf files, demo, or folders of "
        "finished studies, which are joined (default: demo)",
    )  # fmt: skip
    options.add_loading_options(parser.add_argument_group("model"))
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--size", default="full", choices=SIZES,
        help="small is for two CPU cores, full for a GPU (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--small", dest="size", action="store_const", const="small", help="the same as --size small"
    )
    group.add_argument(
        "--claims", default="all", metavar="LIST",
        help="comma-separated ids; `entangle study --dry-run` lists them (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=int, default=5, help="draws of random rows, at least 5 (default: 5)"
    )
    options.add_evaluation_options(group, default="demo, the articles that are not calibrated on")
    group.add_argument(
        "--blimp", metavar="SOURCE",
        help="minimal pairs about grammar: blimp, or a .jsonl file or a folder of them (default: "
        "none, and the claim about syntax is not measured)",
    )  # fmt: skip
    group.add_argument(
        "--other-pairs", metavar="SOURCE",
        help="minimal pairs of the same form about something else than grammar, for the double "
        "dissociation",
    )  # fmt: skip
    options.add_memory_option(group)
    group.add_argument(
        "--resume", action="store_true",
        help="go on with an unfinished study, also with other models or claims",
    )  # fmt: skip
    group.add_argument(
        "--dry-run", action="store_true",
        help="list the claims, then print tokens, passes, memory, disk and time that each and all "
        "will take, from a few measured seconds, and write nothing",
    )  # fmt: skip
    options.add_run_options(parser, *TABLES)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Study, print and save."""
    from entangle.studies.claims import CLAIMS
    from entangle.studies.study import study
    from entangle.studies.subject import SIZES as KNOWN

    claims = "all" if arguments.claims == "all" else options.names(arguments.claims)
    if claims != "all":
        choices("claims", claims, CLAIMS, kind="claim")
    options.check_run(arguments)
    whole("seeds", arguments.seeds, least=5)
    memory = options.parse_memory(arguments.memory)
    size = KNOWN[choice("size", arguments.size, KNOWN)]
    default_texts(arguments, size)

    found = study(
        arguments.models, out=arguments.out, size=arguments.size, claims=claims,
        calibration=arguments.calibration, evaluation=arguments.evaluation,
        blimp=pairs_of(arguments, arguments.blimp, size.pairs),
        other=pairs_of(arguments, arguments.other_pairs, None), seeds=arguments.seeds,
        seed=arguments.seed, memory=memory, resume=arguments.resume, force=arguments.force,
        progress=not arguments.quiet, loaded=loaded(arguments),
    )  # fmt: skip
    print_study(found, arguments)


def claims_table(claims: Sequence[str]) -> "pd.DataFrame":
    """Return the claims, and what decides about each."""
    import pandas as pd

    from entangle.studies.claims import CLAIMS
    from entangle.studies.rules import MAIN

    return pd.DataFrame([{"claim": one, "sentence": CLAIMS[one].sentence, "decides": "; ".join(
        f"{name} > {bar.bar:g}" + ("" if bar.role == MAIN else " (control)")
        for name, bar in CLAIMS[one].bars.items()
    )} for one in claims])  # fmt: skip


def loaded(arguments: argparse.Namespace) -> "Loaded":
    """Return how the options say that models are loaded, and texts made."""
    from entangle.studies.study import Loaded

    def load(name: str, revision: str | None) -> "LanguageModel":
        own = {"model": name} | ({} if revision is None else {"revision": revision})
        return options.load_model(argparse.Namespace(**{**vars(arguments), **own}))

    def texts(model: "LanguageModel", _size: object) -> "tuple[CalibrationSet, EvaluationText]":
        given = argparse.Namespace(**vars(arguments))
        for name in ("seq_len", "eval_seq_len"):  # what a model's context does not hold
            if name not in arguments.given and model.context_length:
                setattr(given, name, min(getattr(given, name), model.context_length))
        return options.load_calibration(given, model), options.load_evaluation(given, model)

    said = {name: getattr(arguments, own) for name, own in READ.items()}
    return Loaded(texts, load, said)


def default_texts(arguments: argparse.Namespace, size: Any) -> None:
    """Fill in what the size says of texts, unless it was given."""
    if arguments.evaluation is None:
        arguments.evaluation = "demo"
        arguments.evaluation_split = arguments.evaluation_split or "test"
    for name, value in (("n_seq", size.n_seq), ("seq_len", size.seq_len),
                        ("eval_seq_len", size.window), ("eval_windows", size.windows)):  # fmt: skip
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def pairs_of(
    arguments: argparse.Namespace, source: str | None, most: int | None
) -> "MinimalPairs | None":
    """Return minimal pairs, at most some of each paradigm."""
    if source is None:
        return None
    from entangle.evaluation import load_minimal_pairs

    return load_minimal_pairs(
        source, n_per_paradigm=most, seed=arguments.seed, **options.special_tokens(arguments)
    )


def show(arguments: argparse.Namespace) -> None:
    """Print the study that was made before."""
    from entangle.results import load_result
    from entangle.results.study import Study

    found = load_result(arguments.out)
    if not isinstance(found, Study):
        raise InvalidInput(f"{arguments.out!r} holds no study; got a {found.KIND}.")
    print_study(found, arguments)


def print_study(found: "Study", arguments: argparse.Namespace) -> None:
    """Print the verdicts, and where the page is."""
    content = {"out": arguments.out, "manifest": dict(found.manifest)}
    content |= {one: records(getattr(found, one)) for one in ("frame", "numbers", "models")}
    verdicts = found.verdicts()
    deciding = found.frame.drop(columns=["sentence", "paper"])
    tables = [
        Table("verdicts", verdicts, "Verdicts", keys=("claim", *verdicts.columns[1:])),
        Table("deciding", deciding, "The number that decided (95 %)", FORMATS,
              keys=("claim", "model", "verdict"),
              optional=("why", "lost", "verdict_holm", "setting")),
    ]  # fmt: skip
    if arguments.csv or arguments.latex or arguments.table:
        tables += [Table("numbers", found.numbers, "All numbers", FORMATS,
                         keys=("claim", "model", "setting", "number")),
                   Table("models", found.models, "Models", FORMATS, keys=("model",))]  # fmt: skip
    page = (expand_user(arguments.out) / "index.html").resolve()
    present(arguments, tables, content, said=[f"Page: {page.as_uri()}."], out=arguments.out)
