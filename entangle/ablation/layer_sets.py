"""Names of many layers in one short text."""

import re
from collections.abc import Iterable, Sequence

_FIRST_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_RANGES = re.compile(r"\{([\d,-]+)\}")
_SEPARATOR = "; "


def layer_set(names: Iterable[str]) -> str:
    """Return the names of layers with the blocks of like ones joined.

    ``model.layers.{0-29}.mlp.up_proj`` are 30 layers, ``h.{0,2-4}.mlp.c_fc`` four; different ones
    are parted by ``"; "``. `layer_names` undoes it.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        found = _FIRST_NUMBER.search(name)
        if found is None or str(int(found[0])) != found[0]:
            groups.setdefault(name, [])
            continue
        template = f"{name[: found.start()]}{{}}{name[found.end() :]}"
        groups.setdefault(template, []).append(int(found[0]))
    return _SEPARATOR.join(
        template.replace("{}", _joined(sorted(set(blocks)))) for template, blocks in groups.items()
    )


def layer_names(text: str) -> list[str]:
    """Return the full names of the layers that `layer_set` joined, like ones by block."""
    names: list[str] = []
    for part in text.split(_SEPARATOR) if text else ():
        found = _RANGES.search(part)
        if found is None:
            names.append(part)
            continue
        for ends in found[1].split(","):
            low, _, high = ends.partition("-")
            blocks = range(int(low), int(high or low) + 1)
            names += [f"{part[: found.start()]}{b}{part[found.end() :]}" for b in blocks]
    return names


def _joined(blocks: Sequence[int]) -> str:
    """Return a number as it is, several as ``{0-2,5}``."""
    if len(blocks) == 1:
        return str(blocks[0])
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    said = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{{{','.join(said)}}}"
