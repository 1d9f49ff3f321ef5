"""``entangle layers``: list the linears of a model."""

import argparse

from entangle.cli.options import Subparsers, add_model_options, load_model
from entangle.cli.tables import print_json, print_table, records


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "layers",
        help="list the addressable linear layers of a model",
        description="List the linear layers of a model by the names that --layer accepts.",
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """List the layers."""
    import pandas as pd

    from entangle.models.layers import list_fused_experts, list_layers

    model = load_model(arguments)
    rows: list[tuple[str, int | None, str, str, bool]] = [
        (layer.name, layer.block, layer.projection, f"{layer.shape[0]} × {layer.shape[1]}", True)
        for layer in list_layers(model.module)
    ]
    for experts in list_fused_experts(model.module):
        shape = " × ".join(map(str, experts.shape))
        rows.append((experts.name, experts.block, experts.name.rpartition(".")[2], shape, False))
    frame = pd.DataFrame(rows, columns=["name", "block", "projection", "shape", "addressable"])
    frame = frame.astype({"block": "Int64"})
    if arguments.json:
        print_json(records(frame))
        return
    frame["addressable"] = frame["addressable"].map({True: "yes", False: "no: fused experts"})
    if (frame["addressable"] == "yes").all():
        frame = frame.drop(columns="addressable")
    print_table(frame, title=f"Linear layers of {arguments.model}", formats={"block": ""})
