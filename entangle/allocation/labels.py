"""What an allocation is called in tables and files."""

import hashlib
from collections.abc import Mapping

from entangle.allocation.allocation import Allocation
from entangle.allocation.registry import RULES
from entangle.allocation.steps import ROW


def rule_label(allocation: Allocation) -> str:
    """Return the rule and the columns that it read, if any, for example ``protect wd`` or ``owl``.

    A rule whose strength was searched for is ``search: linear wd``.
    """
    settings = allocation.manifest.get("settings")
    if not isinstance(settings, Mapping):
        return "given"
    by, rule = settings.get("by"), settings.get("rule", "given")
    columns = "+".join(map(str, by)) if isinstance(by, list) else str(by or "")
    used = [str(name) for name in (rule, settings.get("across")) if str(name) in RULES]
    if used and not any(RULES[name].scored for name in used):
        columns = ""
    searched = "search: " if "search" in allocation.manifest else ""
    return f"{searched}{rule} {columns}".strip()


def nominal_sparsity(allocation: Allocation) -> float:
    """Return the overall sparsity as it was asked for: to 4 digits, if that is the same budget."""
    rounded = round(allocation.overall, 4)
    same = round(rounded * allocation.n_weights) == allocation.n_zeros
    return rounded if same else allocation.overall


def zeros_digest(allocation: Allocation) -> str:
    """Return the SHA-256 of all layers' names and zeros, and of an n:m pattern, in hexadecimal."""
    digest = hashlib.sha256()
    if allocation.pattern != ROW:
        digest.update(f"{allocation.pattern}\n".encode())
    for name, zeros in allocation.zeros.items():
        digest.update(f"{name}\t{len(zeros)}\n".encode())
        digest.update(zeros.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
