"""``entangle run``: text from a Sparse Expansion, and tokens a second beside its dense model."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records, say
from entangle.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel

FORMATS = {"new tokens": ",d", "seconds": ".2f", "tokens a second": ",.1f", "× dense": ".2f"}
_WARM_UP = 2  # tokens, before the clock starts


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "run",
        help="generate text with a Sparse Expansion and time it beside its dense model",
        description="Generate the likeliest tokens after a prompt, and print the text and tokens a "
        "second, the prompt's time included. Beside a Sparse Expansion its dense model runs too, "
        "if it is at hand.",
    )
    parser.add_argument(
        "model", metavar="DIR", help="folder of a Sparse Expansion, or any MODEL of the other "
        "commands",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0,
        help="draw tokens with the seed at this temperature (default: 0, the likeliest)",
    )  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dense", metavar="MODEL", help="dense model, if it is not where the manifest says"
    )
    group.add_argument("--no-dense", action="store_true", help="do not run the dense model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    options.add_table_options(parser, "speed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Generate, time, print."""
    import pandas as pd

    from entangle.experts.checkpoint import load_expanded
    from entangle.models.loading import load_model
    from entangle.runs.provenance import is_expansion

    expansion = is_expansion(arguments.model)
    load = load_expanded if expansion else load_model
    model = load(arguments.model, device=arguments.device)
    rows = [_timed("expansion" if expansion else "model", model, arguments)]
    del model
    dense = _dense(arguments, expansion=expansion)
    if dense is not None:
        rows.append(_timed("dense", dense, arguments))
    table = pd.DataFrame(rows)
    if dense is not None:
        speed = table["tokens a second"]
        table["× dense"] = speed / speed.iloc[-1]
    if not (arguments.json or arguments.csv or arguments.latex):
        say(arguments.prompt + str(rows[0]["text"]))
    printed = Table(
        "speed", table, "Speed", FORMATS, keys=("model", "tokens a second"),
        shown=table.drop(columns="text"),
    )  # fmt: skip
    present(arguments, [printed], {"prompt": arguments.prompt, "results": records(table)})


def _dense(arguments: argparse.Namespace, *, expansion: bool) -> "LanguageModel | None":
    """Load the dense model: the one that is named, or the manifest's if it needs no download."""
    from entangle.experts.checkpoint import base_at_hand, load_base
    from entangle.models.loading import load_model

    if arguments.dense is not None and not expansion:
        return load_model(arguments.dense, device=arguments.device)
    if arguments.no_dense or not expansion:
        return None
    if arguments.dense is None and not base_at_hand(arguments.model):
        return None
    try:
        return load_base(arguments.model, arguments.dense, device=arguments.device)
    except Unavailable:
        if arguments.dense is not None:
            raise
        return None


def _timed(label: str, model: "LanguageModel", arguments: argparse.Namespace) -> dict[str, Any]:
    """Return one row: what a model generates, after a few tokens to warm up, and how fast."""
    import torch

    if model.tokenizer is None:
        raise InvalidInput(f"{model.name!r} has no tokenizer, which a prompt needs.")
    prompt = model.tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if not prompt["input_ids"].shape[1]:
        raise InvalidInput("`prompt` must hold at least one token; got none.")
    module: Any = model.module
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if arguments.temperature > 0:
        chosen = {"do_sample": True, "temperature": arguments.temperature}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(arguments.seed)
        module.generate(**prompt, max_new_tokens=_WARM_UP, **chosen)
        torch.manual_seed(arguments.seed)
        _wait(model)
        start = time.perf_counter()
        found = module.generate(**prompt, max_new_tokens=arguments.max_new_tokens, **chosen)
        _wait(model)
        seconds = time.perf_counter() - start
    new = found[0, prompt["input_ids"].shape[1] :]
    return {
        "model": label,
        "text": model.tokenizer.decode(new, skip_special_tokens=True),
        "new tokens": len(new),
        "seconds": seconds,
        "tokens a second": len(new) / seconds,
    }


def _wait(model: "LanguageModel") -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
