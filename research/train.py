"""A small Llama of our own, trained on text of `research.corpus`, with checkpoints over training.

``python -m research.train --text corpus.jsonl.xz --out FOLDER`` trains a byte-level BPE tokenizer
of 8,192 tokens and a model of 15.7 million parameters (8 blocks, width 384, MLP 1,024, 6 query
heads and 2 key-value heads, tied embeddings; 80 % of the parameters in the blocks), and writes
``FOLDER/step-000000`` …: 30 ordinary Hugging Face folders in bf16, log-spaced, with
``losses.csv`` and ``training.json``. Documents end with ``<|endoftext|>``; windows have no first
token of their own, so the model is measured without BOS. The same command rebuilds the weights,
up to the GPU's rounding.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import lzma
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

END = "<|endoftext|>"


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    steps: int = 2000
    """Updates of the weights."""
    batch: int = 128
    """Windows a step."""
    window: int = 1024
    """Tokens a window."""
    rate: float = 3e-3
    """Largest learning rate; 2 % of the steps warm up, a cosine falls to a tenth."""
    decay: float = 0.1
    """AdamW's weight decay, of matrices."""
    checkpoints: int = 30
    """Checkpoints written, the untrained and the last one among them."""
    vocabulary: int = 8192
    """Tokens of the tokenizer."""
    width: int = 384
    """Hidden size."""
    mlp: int = 1024
    """Hidden units of an MLP."""
    blocks: int = 8
    """Decoder blocks."""
    seed: int = 0
    """Seed of weights and order."""


def checkpoint_steps(last: int, count: int) -> list[int]:
    """Return 0 and log-spaced steps up to ``last``, ``count`` in all, or each step if so few.

    >>> checkpoint_steps(100, 6)
    [0, 1, 3, 10, 32, 100]
    """
    if last + 1 <= count:
        return list(range(last + 1))
    steps = [0]
    for left in range(count - 1, 0, -1):  # the ratio to the end, afresh: small steps round up
        begin = max(steps[-1], 1)
        grown = round(begin * (last / begin) ** (1 / left)) if steps[-1] else 1
        steps.append(last if left == 1 else min(max(grown, steps[-1] + 1), last - left + 1))
    return steps


def read(file: Path) -> dict[str, list[str]]:
    """Return the documents of a corpus by their part, ``train`` and ``valid``."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            parts[one["part"]].append(one["text"])
    return parts


def train_tokenizer(documents: list[str], vocabulary: int, window: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of every eighth document and of the first hundred."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(documents[:100] + documents[100::8], trainer)
    made: type[Any] = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = made(
        tokenizer_object=bare, eos_token=END, bos_token=None, model_max_length=window
    )
    return found


def token_ids(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return all documents' tokens (tokens,), each document's end behind it."""
    pieces = []
    for start in range(0, len(documents), 256):
        some = documents[start : start + 256]
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
    return torch.from_numpy(np.concatenate(pieces))


def build(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the model with its first weights."""
    torch.manual_seed(plan.seed)
    heads = plan.width // 64
    make: type[Any] = LlamaConfig
    config = make(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        intermediate_size=plan.mlp,
        num_hidden_layers=plan.blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=plan.window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches(ids: torch.Tensor, plan: Plan) -> Iterator[torch.Tensor]:
    """Yield (batch, window + 1) tokens for ever: each epoch cuts at another place and shuffles."""
    chance = torch.Generator().manual_seed(plan.seed + 1)
    span = plan.window + 1
    if len(ids) < span * (plan.batch + 1):
        raise SystemExit(f"{len(ids):,} tokens are too few for one batch; give more text")
    while True:
        first = int(torch.randint(span, (1,), generator=chance))
        starts = first + span * torch.randperm((len(ids) - first) // span, generator=chance)
        for some in starts.split(plan.batch):
            if len(some) == plan.batch:
                places = some[:, None] + torch.arange(span)
                yield ids[places.to(ids.device)].long()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats of (windows, window + 1) tokens."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1]).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: torch.nn.Module, ids: torch.Tensor, plan: Plan) -> float:
    """Return the mean loss over up to 256 windows of the validation text."""
    span = plan.window + 1
    windows = ids[: len(ids) // span * span].view(-1, span)[:256].long()
    parts = [loss_of(model, some) * len(some) for some in windows.split(32)]
    return float(torch.stack(parts).sum() / len(windows))


def rate_at(step: int, plan: Plan) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to a tenth."""
    warm = max(1, plan.steps // 50)
    if step < warm:
        return plan.rate * (step + 1) / warm
    done = (step - warm) / max(1, plan.steps - warm)
    return plan.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary folder with bf16 weights."""
    state = {name: one.detach().to("cpu", torch.bfloat16) for name, one in model.named_parameters()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    tokenizer.save_pretrained(folder)


def optimiser(model: torch.nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Return AdamW, which decays matrices and leaves norms alone."""
    named = list(model.named_parameters())
    groups = [
        {"params": [one for _, one in named if one.ndim > 1], "weight_decay": plan.decay},
        {"params": [one for _, one in named if one.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=fused)


def train(
    plan: Plan,
    tokenizer: PreTrainedTokenizerFast,
    parts: dict[str, torch.Tensor],
    out: Path,
    *,
    faster: bool,
) -> list[dict[str, float]]:
    """Train, write checkpoints, print and return the losses at them."""
    device = parts["train"].device
    model = build(plan, tokenizer)
    torch.nn.Module.to(model, device)
    # the type of a compiled module is not told
    run: torch.nn.Module = torch.compile(model, dynamic=False) if faster else model  # type: ignore[assignment]
    steps = checkpoint_steps(plan.steps, plan.checkpoints)
    optimizer, stream = optimiser(model, plan), batches(parts["train"], plan)
    losses: list[dict[str, float]] = []
    recent = torch.zeros((), device=device)
    began, since = time.monotonic(), 0
    for step in range(plan.steps + 1):
        if step in steps:
            row: dict[str, float] = {"step": step, "tokens": step * plan.batch * plan.window}
            trained = float(recent) / since if since else math.nan
            held = validate(run, parts["valid"], plan)
            spent = time.monotonic() - began
            row |= {"train_loss": trained, "valid_loss": held, "seconds": spent}
            print(
                f"step {step:6}  train {trained:7.4f}  valid {held:7.4f}  "
                f"perplexity {math.exp(held):10.2f}  {spent:7.1f} s",
                flush=True,
            )
            losses.append(row)
            save(model, tokenizer, out / f"step-{step:06}")
            recent, since = torch.zeros((), device=device), 0
        if step == plan.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, plan)
        loss = loss_of(run, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent, since = recent + loss.detach(), since + 1
    return losses


def write_losses(losses: list[dict[str, float]], plan: Plan, text: Path, out: Path) -> None:
    """Write the curve and what it was trained on."""
    with (out / "losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(losses[0]))
        writer.writeheader()
        writer.writerows(losses)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    told = {"plan": asdict(plan), "corpus_sha256": digest, "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(told, indent=2) + "\n")


def parse() -> tuple[argparse.Namespace, Plan]:
    """Return the command line's files and plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a corpus of research.corpus")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--documents", type=int, help="use only so many documents (for a trial)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args()
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty; name a new folder")
    return given, Plan(**{name: getattr(given, name) for name in asdict(Plan())})


def main() -> None:
    """Train the model that the command line describes."""
    given, plan = parse()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    given.out.mkdir(parents=True, exist_ok=True)
    texts = {part: some[: given.documents] for part, some in read(given.text).items()}
    tokenizer = train_tokenizer(texts["train"], plan.vocabulary, plan.window)
    parts = {part: token_ids(tokenizer, some).to(given.device) for part, some in texts.items()}
    for part, ids in parts.items():
        print(f"{part}: {len(texts[part]):,} documents, {len(ids):,} tokens")
    on_gpu = given.device.startswith("cuda")
    with contextlib.ExitStack() as stack:
        if on_gpu:
            stack.enter_context(torch.cuda.device(torch.device(given.device)))
            torch.backends.cuda.matmul.allow_tf32 = True
        faster = on_gpu and not given.no_compile
        losses = train(plan, tokenizer, parts, given.out, faster=faster)
    write_losses(losses, plan, given.text, given.out)
    print(f"{given.out}: {len(losses)} checkpoints")


if __name__ == "__main__":
    main()
