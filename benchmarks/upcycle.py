"""Make a small real mixture of experts out of the demo model, none being small enough to fetch.

``python -m benchmarks.upcycle --out FOLDER`` parts the neurons of every feed-forward block: those
that put out most make an expert that every token uses, the others are parted into experts by which
of them are large on the same tokens (every neuron in one expert, no copies). It fits a router, and
trains routers and experts on the demo text until the time is up: next-token loss, and the dense
model's own distribution as a soft target, on the text and on what the dense model writes itself.
What it writes is an ordinary Qwen2-MoE folder that transformers loads, and says plainly what it is:
an upcycled model, whose router was trained for minutes, not a mixture trained from scratch.

``--pack FOLDER`` writes the same model as 4-bit changes of the dense model's weights (about 42 MB
in files below 16 MiB); ``--unpack PACK --out FOLDER`` makes the ordinary folder of it. Both folders
hold one model to the bit, since what was trained is rounded before it is measured and written.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import entangle
from entangle.models.loading import LanguageModel
from entangle.models.pretrained import quiet

GROUP = 64  # weights with one scale
SHARD = 14 * 2**20  # bytes of a file
_SPREAD = 0.03  # of the routers' first logits
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SHARED = tuple(f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def part(dense: LanguageModel, ids: Tensor, experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """Part the neurons of every block into experts, and fit routers.

    Parameters
    ----------
    dense
        A Llama.
    ids
        Text, (sequences, tokens).
    experts
        Number of experts that tokens are sent to.
    shared
        Neurons of the expert that all tokens use: those whose part of the output is largest, in the
        mean of squares.

    Returns
    -------
    order : Tensor
        Neurons, those of the shared expert first, then one expert after the other, int64 of shape
        (blocks, neurons).
    routers : Tensor
        By least squares from a token to how much an expert puts out on it, beside the others, and
        small, so that the chosen ones weigh about the same; (blocks, experts, features).
    """
    module: Any = dense.module
    order, routers = [], []
    for hidden, z, down in _streams(module, ids):
        parts = (z * down.norm(dim=0)).square()
        ranked = parts.mean(0).argsort(descending=True).cpu()
        rest = ranked[shared:].sort().values
        sizes = (z.abs() / z.abs().mean(0)).cpu()[:, rest]
        own = rest[_balanced(nn.functional.normalize(sizes - sizes.mean(0), dim=0).T, experts)]
        order.append(torch.cat([ranked[:shared], own]))
        large = parts[:, own.to(z.device)].unflatten(1, (experts, -1))
        large = large.sum(-1).sqrt().double()
        large = large / large.mean(1, keepdim=True) - 1
        x = hidden.double()
        ridge = x.T @ x + 1e-2 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1]).to(x)
        routers.append(_SPREAD * torch.linalg.solve(ridge, x.T @ large).T.float().cpu())
    return torch.stack(order), torch.stack(routers)


def _streams(module: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what enters the feed-forward part of every block, its neurons and its last weight."""
    seen: list[Tensor] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for block in module.model.layers
    ] + [
        block.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for block in module.model.layers
    ]
    with torch.no_grad():
        module(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for block, hidden, z in zip(module.model.layers, seen[::2], seen[1::2], strict=True):
        down = block.mlp.down_proj.weight.detach().float()
        yield hidden.flatten(0, 1).float(), z.flatten(0, 1).float(), down


def _balanced(points: Tensor, k: int) -> Tensor:
    """Return an order of points in which each of k runs, all of one length, is a cluster."""
    n, each = len(points), len(points) // k
    rng = np.random.default_rng(0)
    centres = points[torch.from_numpy(rng.permutation(n)[:k])]
    for _ in range(3):
        near = (points @ centres.T).numpy()
        _, place = linear_sum_assignment(-np.repeat(near, each, axis=1))
        labels = place // each
        centres = torch.stack([points[labels == i].mean(0) for i in range(k)])
    return torch.from_numpy(np.argsort(labels, kind="stable"))


def mixture(
    dense: LanguageModel, order: Tensor, routers: Tensor, top_k: int, shared: int
) -> Qwen2MoeForCausalLM:
    """Return a Qwen2-MoE with the dense model's weights, neurons in the order of their experts.

    Routing weights add up to 1, so an expert puts out ``top_k`` times what its neurons did; the
    shared expert's gate begins at one half, so that expert puts out twice as much: with all experts
    chosen and a router of zeros the logits are the dense ones.
    """
    module: Any = dense.module
    own, experts = module.config, routers.shape[1]
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
            "rope_parameters")  # fmt: skip
    config = Qwen2MoeConfig(
        **{name: getattr(own, name) for name in same}, qkv_bias=False, norm_topk_prob=True,
        moe_intermediate_size=(own.intermediate_size - shared) // experts, num_experts=experts,
        num_experts_per_tok=top_k, shared_expert_intermediate_size=shared,
    )  # fmt: skip
    state = {k: v for k, v in module.state_dict().items() if ".mlp." not in k}
    for i, block in enumerate(module.model.layers):
        gate, up, down = (
            getattr(block.mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down")
        )
        neurons = order[i].to(gate.device)
        always, place = neurons[:shared], neurons[shared:].unflatten(0, (experts, -1))
        name = f"model.layers.{i}.mlp"
        for key, weight in zip(
            SHARED, (gate[always], up[always], 2 * down[:, always]), strict=True
        ):
            state[f"{name}.{key}"] = weight
        state[f"{name}.shared_expert_gate.weight"] = torch.zeros_like(gate[:1])
        state[f"{name}.experts.gate_up_proj"] = torch.cat([gate[place], up[place]], 1)
        state[f"{name}.experts.down_proj"] = top_k * down.T[place].mT.contiguous()
        state[f"{name}.gate.weight"] = routers[i]
    with quiet():
        made = Qwen2MoeForCausalLM(config)
    made.load_state_dict(state)
    made.to(next(module.parameters()).device).eval()
    return made


def own_text(module: Any, ids: Tensor, batches: int, seed: int) -> Tensor:
    """Return text that the dense model writes, begun by any 32 tokens in a row of the text."""
    torch.manual_seed(seed)
    written, (n, length) = [ids], ids.shape
    for _ in range(batches):
        begun = torch.randint(n, (1024,)) if n > 32 else torch.arange(n)
        first = torch.randint(length - 31, (len(begun), 1)) + torch.arange(32)
        start = ids[begun[:, None], first].to(next(module.parameters()).device)
        with torch.no_grad():
            more = module.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                max_new_tokens=length - 32, min_new_tokens=length - 32,
            )  # fmt: skip
        written.append(more.cpu())
    return torch.cat(written)


def more_text(file: Path, tokenizer: Any, given: Any, part: str = "train") -> Tensor:
    """Return sequences of a part of a corpus that ``research.corpus`` wrote."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    texts = [one["text"] for one in documents if one["part"] == part][:: given.stride]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    flat = torch.tensor([token for row in rows for token in row])
    n = len(flat) // given.seq_len
    return flat[: n * given.seq_len].view(n, given.seq_len)


def _parted(dense: LanguageModel, ids: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    """Return `part`, from its file where that is there, which is made otherwise."""
    if given.parted is not None and given.parted.exists():
        known = load_file(given.parted)
        return known["order"], known["routers"]
    order, routers = part(dense, ids, given.experts, given.shared)
    if given.parted is not None:
        save_file({"order": order, "routers": routers}, given.parted)
    return order, routers


def train(
    dense: LanguageModel, made: Qwen2MoeForCausalLM, ids: Tensor, held: Tensor, given: Any
) -> list[dict[str, float]]:
    """Train routers and experts until the time is up; the best on ``held`` text stays."""
    teacher: Any = dense.module
    device = next(made.parameters()).device
    _at_once(made)
    routers = [p for name, p in made.named_parameters() if name.endswith(ROUTERS)]
    experts = [p for name, p in made.named_parameters() if name.endswith((*EXPERTS, *SHARED))]
    for p in made.parameters():
        p.requires_grad_(False)
    for p in (*routers, *experts):
        p.requires_grad_(True)
    groups = [
        {"params": routers, "rate": given.router_rate},
        {"params": experts, "rate": given.rate},
    ]
    optimiser = torch.optim.AdamW(
        groups, lr=given.rate, weight_decay=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    generator = torch.Generator().manual_seed(given.seed)
    begun, best, kept, told, step = time.monotonic(), math.inf, dict[str, Tensor](), [], 0
    while True:
        gone = (time.monotonic() - begun) / (60 * given.minutes)
        gone = max(gone, step / given.steps) if given.steps else gone
        if step % given.every == 0 or gone >= 1:
            loss = _held_loss(made, held, given.batch)
            told.append({"step": step, "seconds": time.monotonic() - begun, "ppl": math.exp(loss)})
            print(json.dumps(told[-1]), flush=True)
            if loss < best:
                best = loss
                kept = {
                    k: v.detach().clone() for k, v in made.named_parameters() if v.requires_grad
                }
        if gone >= 1:
            break
        share = min(1.0, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * min(gone, 1)))
        for group in optimiser.param_groups:
            group["lr"] = share * group["rate"]
        batch = ids[torch.randint(len(ids), (given.batch,), generator=generator)].to(device)
        _loss(teacher, made, batch, given).backward()
        nn.utils.clip_grad_norm_((*routers, *experts), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
    made.load_state_dict(kept, strict=False)
    for module in made.modules():
        module.__dict__.pop("forward", None)
    return told


def _at_once(made: Qwen2MoeForCausalLM) -> None:
    """Compute the neurons of all experts at once, those of the others times zero: few launches."""
    for module in made.modules():
        if isinstance(module, Qwen2MoeExperts):
            module.forward = partial(_all_experts, module)  # type: ignore[method-assign]


def _all_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    n = experts.num_experts
    share = weights.new_zeros(len(hidden), n).scatter(1, index, weights)
    both = nn.functional.linear(hidden, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (n, -1))
    gate, up = both.chunk(2, dim=-1)
    inner = (experts.act_fn(gate) * up * share[:, :, None]).flatten(1)
    down = experts.down_proj.transpose(0, 1).flatten(1)
    return nn.functional.linear(inner, down).to(hidden.dtype)


def _loss(teacher: Any, made: Any, batch: Tensor, given: Any) -> Tensor:
    """Return next-token loss, divergence from the dense model, and the balance of the experts."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        with torch.no_grad():
            wanted = teacher(batch, use_cache=False).logits
        found = made(batch, use_cache=False, output_router_logits=True)
    total = batch.new_zeros((), dtype=torch.float32)
    for logits, soft, target in zip(  # few sequences at a time: the vocabulary is large
        found.logits.split(4), wanted.split(4), batch.split(4), strict=True
    ):
        logs = logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
        hard = nn.functional.nll_loss(logs, target[:, 1:].flatten())
        kl = nn.functional.kl_div(logs, soft[:, :-1].float().log_softmax(-1).flatten(0, 1),
                                  reduction="batchmean", log_target=True)  # fmt: skip
        total = total + len(target) * (given.soft * kl + (1 - given.soft) * hard)
    balance: Tensor = given.balance * _imbalance(found.router_logits, made.config)
    return total / len(batch) + balance


def _imbalance(logits: Any, config: Any) -> Tensor:
    """Return n · Σ share · probability of the experts, mean over blocks: 1 where all are equal."""
    found = []
    for one in logits:
        chosen = one.float().softmax(-1)
        used = torch.zeros_like(chosen).scatter(
            1, one.topk(config.num_experts_per_tok).indices, 1.0
        )
        share = used.mean(0) / config.num_experts_per_tok
        found.append(len(share) * (share * chosen.mean(0)).sum())
    return torch.stack(found).mean()


def _held_loss(made: Any, held: Tensor, batch: int) -> float:
    losses, device = [], next(made.parameters()).device
    with torch.no_grad():
        for ids in held.to(device).split(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=ids.is_cuda):
                logits = made(ids, use_cache=False).logits
            for one, target in zip(logits[:, :-1], ids[:, 1:], strict=True):
                losses.append(nn.functional.cross_entropy(one.float(), target).item())
    return sum(losses) / len(losses)


def rounded(start: Qwen2MoeForCausalLM, made: Qwen2MoeForCausalLM) -> dict[str, Tensor]:
    """Round what was trained to what a pack holds, in place, and return the pack's tensors.

    Changes of experts become 4-bit numbers with a 16-bit scale for every 64 of them.
    """
    pack: dict[str, Tensor] = {}
    before = dict(start.named_parameters())
    with torch.no_grad():
        for name, now in made.named_parameters():
            if name.endswith(ROUTERS):
                pack[name] = now.half().cpu().contiguous()
                now.copy_(pack[name])
            elif name.endswith((*EXPERTS, *SHARED)):
                change = (now - before[name]).reshape(-1, GROUP)
                scale = (change.abs().amax(1, keepdim=True) / 7).half()
                codes = (change / scale.float().clamp_min(1e-12)).round().clamp(-7, 7) + 8
                pairs = codes.to(torch.uint8).reshape(-1, 2)
                pack[f"{name}.codes"] = (pairs[:, 0] | pairs[:, 1] << 4).cpu()
                pack[f"{name}.scale"] = scale.cpu()
                now.copy_(_changed(before[name], pack, name))
    return pack


def _changed(before: Tensor, pack: dict[str, Tensor], name: str) -> Tensor:
    codes = pack[f"{name}.codes"]
    pairs = torch.stack([codes & 15, codes >> 4], 1).reshape(-1, GROUP).float() - 8
    change = pairs * pack[f"{name}.scale"].float()
    return (before.cpu() + change.reshape(before.shape)).to(before.device)


def write_pack(folder: Path, pack: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a pack as files of at most 14 MiB, and what tells how it was made."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    number = 0
    for name, tensor in pack.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD:
            save_file(shard, folder / f"pack-{number}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor
    save_file(shard, folder / f"pack-{number}.safetensors")
    (folder / "upcycled.json").write_text(json.dumps(about, indent=1), "utf-8")


def unpack(folder: Path, dense: LanguageModel) -> tuple[Qwen2MoeForCausalLM, dict[str, Any]]:
    """Return the model of a pack, and what tells how it was made."""
    pack = {k: v for file in folder.glob("pack-*") for k, v in load_file(file).items()}
    about = json.loads((folder / "upcycled.json").read_text("utf-8"))
    order = pack.pop("order").long()
    known: Any = dense.module
    shape = (len(order), about["experts"], known.config.hidden_size)
    made = mixture(dense, order, torch.zeros(shape), about["top_k"], about["shared"])
    with torch.no_grad():
        for name, now in made.named_parameters():
            if name.endswith(ROUTERS):
                now.copy_(pack[name])
            elif name.endswith((*EXPERTS, *SHARED)):
                now.copy_(_changed(now, pack, name))
    return made, about


def save(folder: Path, made: Qwen2MoeForCausalLM, dense: LanguageModel, about: Any) -> None:
    """Write an ordinary folder."""
    with quiet():
        made.save_pretrained(folder)
        if dense.tokenizer is not None:
            dense.tokenizer.save_pretrained(folder)
    (folder / "upcycled.json").write_text(json.dumps(about, indent=1), "utf-8")


def difference(made: Qwen2MoeForCausalLM, start: Qwen2MoeForCausalLM) -> float:
    """Return the least relative distance of two experts of a block, of those of all blocks."""
    found, moved = [], []
    before = dict(start.named_parameters())
    for name, now in made.named_parameters():
        if name.endswith(EXPERTS):
            flat = now.detach().flatten(1)
            apart = torch.cdist(flat, flat) / flat.norm(dim=1)[:, None]
            found.append(float((apart + torch.eye(len(flat)).to(apart) * 1e9).min()))
            change = (now - before[name]).detach().norm()
            moved.append(float(change / before[name].detach().norm()))
    print(f"trained weights moved by {min(moved):.3f} to {max(moved):.3f} of their norm")
    return min(found)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--out", type=Path, help="ordinary folder to write")
    add("--pack", type=Path, help="small folder to write")
    add("--unpack", type=Path, help="small folder to make the ordinary one of")
    add("--device", default="auto")
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=8)
    add("--shared", type=int, default=768, help="neurons of the expert that all tokens use")
    add("--minutes", type=float, default=6.0, help="of training")
    add("--steps", type=int, default=0, help="at most so many steps; 0: as many as fit")
    add("--batch", type=int, default=32, help="sequences of a step")
    add("--seq-len", type=int, default=512)
    add("--rate", type=float, default=3e-4, help="of the experts")
    add("--router-rate", type=float, default=1e-3)
    add("--soft", type=float, default=0.8, help="weight of the dense model's distribution")
    add("--balance", type=float, default=0.01, help="weight of the experts' balance")
    add("--own-text", type=int, default=6, help="batches of text that the dense model writes")
    add("--text", type=Path, help="more to train on: .jsonl.xz of research.corpus")
    add("--stride", type=int, default=4, help="of that text each so-manyth document")
    add(
        "--parted",
        type=Path,
        help="file that keeps how neurons are parted, read if there",
    )
    add("--repeat", type=int, default=6, help="of the demo text beside that text")
    add("--every", type=int, default=200, help="steps between two looks at held-out text")
    add("--windows", type=int, default=None, help="of the evaluation text; all by default")
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    dense = entangle.load_model("demo", device=given.device, dtype="float32")
    if given.unpack is not None:
        made, about = unpack(given.unpack, dense)
        save(given.out, made, dense, about)
        return
    made, pack, about = upcycle(dense, given)
    if given.pack is not None:
        write_pack(given.pack, pack, about)
    if given.out is not None:
        save(given.out, made, dense, about)


def upcycle(
    dense: LanguageModel, given: argparse.Namespace
) -> tuple[Qwen2MoeForCausalLM, dict[str, Tensor], dict[str, Any]]:
    """Return the trained model, its pack, and what tells how it was made."""
    device, module = dense.device, dense.module
    known: Any = module.config
    width = known.intermediate_size
    if (width - given.shared) % given.experts or not 0 < given.shared < width:
        raise SystemExit(
            f"{width} neurons: {given.shared} shared and {given.experts} equal experts"
        )
    text = entangle.load_calibration(
        "demo", dense.tokenizer, n_seq=max(64, 800 * 512 // given.seq_len), seq_len=given.seq_len,
        split="train", seed=given.seed,
    )  # fmt: skip
    ids, held = text.ids[:-32], text.ids[-32:]
    order, routers = _parted(dense, ids[:32].to(device), given)
    start, made = (mixture(dense, order, routers, given.top_k, given.shared) for _ in range(2))
    sources = [own_text(module, ids, given.own_text, given.seed)]
    if given.text is not None:
        held = more_text(given.text, dense.tokenizer, given, part="valid")[-64:]
        sources = given.repeat * sources + [more_text(given.text, dense.tokenizer, given)]
    sizes = [one.numel() for one in sources]
    print(f"{text.settings['n_text_tokens']} tokens of text, {sizes} in all", flush=True)
    told = train(dense, made, torch.cat(sources), held, given)
    pack = {"order": order.to(torch.int16)} | rounded(start, made)
    evaluation = entangle.load_evaluation(
        "demo", dense.tokenizer, split="test", seq_len=given.seq_len, n_windows=given.windows
    )
    moe = LanguageModel(made, dense.tokenizer, "upcycled", "memory", None)
    values = {
        name: entangle.perplexity(one, evaluation, progress=False).value
        for name, one in (("dense", dense), ("mixture", moe))
    }
    about = {
        "what": "The demo model, its feed-forward neurons parted into experts, and routers and "
        "experts trained for minutes: upcycled, no mixture trained from scratch.",
        "experts": given.experts, "top_k": given.top_k, "shared": given.shared,
        "share_of_neurons": (given.shared + (width - given.shared) * given.top_k / given.experts)
        / width,
        "perplexity": values,
        "perplexity_ratio": values["mixture"] / values["dense"],
        "least_relative_distance_of_experts": difference(made, start), "training": told,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()},
    }  # fmt: skip
    print(json.dumps({k: v for k, v in about.items() if k not in ("training", "settings")}))
    return made, pack, about


if __name__ == "__main__":
    main()
