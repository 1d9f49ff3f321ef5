"""What an expanded model says to ``save_pretrained``, which knows no routers."""

from torch import nn

from entangle.errors import InvalidInput


def refuse_saving(module: nn.Module) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` raise `InvalidInput`.

    They would write the experts as plain weights, without the routers, which nothing could load.

    Parameters
    ----------
    module
        An expanded model; nothing happens to one without these methods.
    """
    for name in ("save_pretrained", "push_to_hub"):
        if hasattr(module, name):
            object.__setattr__(module, name, _refuse)


def _refuse(*_arguments: object, **_settings: object) -> None:
    raise InvalidInput(
        "transformers cannot write the routers of a Sparse Expansion; write a checkpoint with "
        "entangle.expand(..., out=DIR) (entangle expand --out DIR) and load it with "
        "entangle.load_expanded(DIR)."
    )
