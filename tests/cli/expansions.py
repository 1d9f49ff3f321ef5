"""Small runs of ``entangle expand`` in the current folder, and what they should come to."""

from pathlib import Path

import torch

from entangle.experts.expand import Expansion, expand
from entangle.experts.linear import ExpandedLinear
from entangle.models.loading import LanguageModel, load_model
from entangle.packed.linear import PackedLinear
from entangle.texts.calibration import load_calibration
from tests.cli.runs import Ran, holds

N_SEQ, SEQ_LEN = 6, 32
TOKENS = N_SEQ * SEQ_LEN
WIDE = (
    "expand", "model", "--device", "cpu", "--calibration", "text.txt", "--n-seq", N_SEQ,
    "--seq-len", SEQ_LEN, "--experts", 3, "--quiet",
)  # fmt: skip
"""Expands all MLP linears of the tiny Llama, quietly."""
SMALL = (*WIDE, "--proj", "up_proj")
"""Expands one layer a block."""
BLOCKS = [f"block-{index:04d}.safetensors" for index in range(3)]
BUILDS = [name.replace("safetensors", "build") for name in BLOCKS]
FILES = sorted([
    *BLOCKS, *BUILDS, "README.md", "config.json", "dense.safetensors", "generation_config.json",
    "layers.parquet", "manifest.json", "model.safetensors.index.json",
    "modeling_sparse_expansion.py", "run.json", "tokenizer.json", "tokenizer_config.json",
])  # fmt: skip


def in_memory(**settings: object) -> Expansion:
    """Return what `SMALL`, with these settings changed, should build."""
    model = load_model("model", device="cpu")
    ids = load_calibration("text.txt", model.tokenizer, n_seq=N_SEQ, seq_len=SEQ_LEN, seed=0)
    chosen = {"experts": 3, "proj": "up_proj", **settings}
    return expand(model, ids, progress=False, **chosen)  # type: ignore[arg-type]


def experts_of(model: LanguageModel | None) -> dict[str, torch.Tensor]:
    """Return the experts of every expanded layer, by its name."""
    assert model is not None
    found = {}
    for name, module in model.module.named_modules():
        if isinstance(module, ExpandedLinear):
            found[name] = module.weight.detach()
        if isinstance(module, PackedLinear):
            found[name] = torch.stack([module.dense(e) for e in range(module.experts)])
    return found


def content_of(folder: str | Path) -> dict[str, bytes]:
    """Return the bytes of every file, by its name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def without_run(folder: str | Path) -> dict[str, bytes]:
    """Return all but ``run.json``: what two builds of the same settings have in common."""
    return {name: content for name, content in content_of(folder).items() if name != "run.json"}


def listing() -> list[str]:
    """Return every path below the current folder."""
    return sorted(str(path) for path in Path().rglob("*"))


def check_one_line(ran: Ran, names: str, *, status: int = 2) -> None:
    """Check that a run ended in one clear line that holds ``names`` (see `holds`)."""
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("entangle: error: ")
    assert (ran.err.count("\n"), ran.err[-2:]) == (1, ".\n")
    assert holds(ran.err, names), ran.err
