"""``entangle layers``: list the linears of a model."""

import argparse

from entangle.cli.options import Subparsers, add_model_options, add_table_options, load_model
from entangle.cli.tables import Table, present, records


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "layers",
        help="list the addressable linear layers of a model",
        description="List the linear layers of a model by the names that --layer accepts.",
    )
    add_model_options(parser)
    add_table_options(parser, "layers")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """List the layers."""
    import pandas as pd

    from entangle.models.layers import list_fused_experts, list_layers

    model = load_model(arguments)
    rows: list[tuple[str, int | None, str, str, str]] = [
        (layer.name, layer.block, layer.projection, f"{layer.shape[0]} × {layer.shape[1]}", "")
        for layer in list_layers(model.module)
    ]
    for experts in list_fused_experts(model.module):
        shape = " × ".join(map(str, experts.shape))
        rows.append(
            (experts.name, experts.block, experts.name.rpartition(".")[2], shape, experts.why)
        )
    frame = pd.DataFrame(rows, columns=["name", "block", "projection", "shape", "addressable"])
    why = frame["addressable"].map(lambda one: f"no: {one}" if one else "yes")
    frame = frame.astype({"block": "Int64"}).assign(addressable=frame["addressable"] == "")
    shown = frame.assign(addressable=why)
    if frame["addressable"].all():
        shown = shown.drop(columns="addressable")
    table = Table(
        "layers", frame, f"Linear layers of {arguments.model}", {"block": ""}, keys=("name",),
        optional=("projection", "block", "shape"), shown=shown,
    )  # fmt: skip
    present(arguments, [table], records(frame))
