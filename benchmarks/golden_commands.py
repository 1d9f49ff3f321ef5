"""What `benchmarks.golden` runs: its inputs, command lines and calls of functions."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MODELS = ("llama", "gpt_neox")

# Command lines. Words in braces are filled in from `WORDS`.

_CUT = "--sampling random --join '\\n\\n' --special-tokens model --seed 3"
_RUN = "--dtype {dtype} --device cpu"
_JSON = "--json --quiet"
WORDS: Mapping[str, str] = {
    "model": f"inputs/{{of}} {_RUN}",
    "layers": "--layer all --proj mlp",
    "text": f"--calibration inputs/text.txt --n-seq 8 --seq-len 32 {_CUT}",
    "memory": "--memory 1G",
    "data": "--evaluation inputs/held.txt --eval-seq-len 32 --eval-windows 4",
    "scored": "allocate {of}/score-exact --sparsity 0.6 --lowest 0.05 --highest 0.95 --memory 1G",
    "exported": "--export csv:{of}/{name}.csv",
}
RULES: Mapping[str, str] = {
    "uniform": "",
    "layer": "--by wd --spread 0.1",
    "protect": "--by wd --protect 0.1 --protect-sparsity 0.1 --across uniform",
    "linear": "--by wd+weight_norm --combine zscore --spread 0.05 --across model",
    "rank": "--by wd+skewness --combine rank --spread 0.1 --across layer",
    "loss": "--by wd --spread 0.3 {text}",
    "sensitivity": "--by wd --spread 0.3 --across model {text}",
    "depth": "--by wd --spread 0.3 --across layer {text}",
    "owl": "--spread 0.08 {text}",
    "alphapruning": "--spread 0.3",
    "trim": "{text}",
    "neuroal": "{text}",
    "neuroal-blocks": "{text}",
    "erk": "",
    "magnitude-global": "",
    "search": "--tune linear --by wd --evaluations 6 --held-out 0.25 {text}",
}
"""Allocation rules, each with options that have a meaning for it."""
SCORES = {
    "exact": "score {model} {layers} {text} --method exact {memory} --batch-size 4 --top 9",
    "sketch": "score {model} {layers} {text} --method sketch {memory} --batch-size 4 --top 9",
    "no-md": "score {model} --layer 1 --proj attn {text} --method exact --no-md {memory} "
    "--batch-size 8 --top 9",
    "ids": "score {model} --layer 0,2 --calibration inputs/ids.safetensors --method sketch "
    "{memory} --batch-size 3 --top 9 --seed 5",
    "lines": "score {model} {layers} --calibration inputs/lines.jsonl --column body --n-seq 6 "
    "--seq-len 24 --sampling contiguous --join ' ' --special-tokens none --seed 1 --method auto "
    "--no-md {memory} --batch-size 2 --top 9",
}
MORE_ALLOCATIONS = {
    "two-of-four": "--rule linear --by wd --spread 0.1 --across uniform --pattern n:4",
    "experts": "--rule protect --by wd --protect 0.1 --protect-sparsity 0.1 --across uniform "
    "--experts 2 --entangled 0.1 --fewest 1 --most 4",
    "exports": "--rule depth --by md --spread 0.2 --across layer {text} "
    "--export llmcompressor:{of}/{name}.yaml --export alphapruning:{of}/{name}.npy "
    "--export evopress:{of}/{name}.txt --export safetensors:{of}/{name}.rows.safetensors "
    "--plot {of}/{name}-plot",
}
_ABLATE = "ablate {model} --layer 1 --proj mlp {text} {memory}"
_PRUNED = "--damping 0.01 --measure perplexity,divergence {data}"
ABLATIONS = {
    "prune": _ABLATE + " --select top,bottom,random,random-norm,random-variance --by wd,variance "
    "--fraction 0.1 --scope layer --seeds 2 --intervention prune,prune-wanda --strength 0.5,0.9 "
    "--experts 1 --match " + _PRUNED,
    "edits": _ABLATE + " --select top,bottom,random --by md,abs_skewness --count 6 --scope model "
    "--seeds 2 --intervention zero,mean,clamp-negative,clamp-positive,flip-negative "
    "--edit-strength 0.5,1 --measure perplexity,divergence,blimp {data} --pairs inputs/pairs.jsonl "
    "--pairs-per-paradigm 6",
    "experts": _ABLATE + " --select top,all --by weight_norm --fraction 0.2 --scope layer "
    "--intervention prune,prune-magnitude,prune-random --strength 0.8 --experts 1,3 "
    "--router kmeans,random " + _PRUNED,
    "listed": _ABLATE + " --scores {of}/score-exact --select inputs/{of}.csv --intervention prune "
    "--strength 0.7 --experts 1 --no-md " + _PRUNED,
    "allocation": _ABLATE.replace("--layer 1", "--layer all") + " --scores {of}/score-exact "
    "--allocation {of}/allocate-protect.safetensors --intervention prune,prune-wanda --experts 1 "
    + _PRUNED,
}
_METHODS = "--methods magnitude,wanda,sparsegpt,expansion,expansion-random"
COMPARISONS = {
    "all": f"compare {{model}} {{text}} {_METHODS} --sparsity 0.5,0.75 --experts 1,3 {{data}} "
    "{memory}",
    "allocation": f"compare {{model}} {{text}} {_METHODS} --sparsity 0.6 --experts 2 {{data}} "
    "--allocation {of}/allocate-linear.safetensors,deep={of}/allocate-depth.safetensors {memory}",
}
_EXPAND = "expand {model} {text} {memory} --evaluation inputs/held.txt --eval-seq-len 32 "
_EXPAND += "--eval-windows 4"
EXPANSIONS = {
    "one": _EXPAND + " {layers} --experts 1 --sparsity 0.5 --pattern row --pruner sparsegpt "
    "--damping 0.05",
    "three": _EXPAND + " {layers} --experts 3 --sparsity 0.7 --pattern row --pruner sparsegpt "
    "--router kmeans --damping 0.01",
    "random": _EXPAND + " {layers} --experts 3 --sparsity 0.7 --pattern layer --pruner wanda "
    "--router random",
    "bits": _EXPAND + " {layers} --experts 2 --sparsity 0.5 --pattern 2:4 --pruner sparsegpt "
    "--router kmeans --bits 4 --damping 0.01",
    "attention": _EXPAND + " --layer 0,2 --proj attn --experts 2 --sparsity 0.6 --pattern block "
    "--pruner sparsegpt --router kmeans --damping 0.01 --no-baseline",
    "magnitude": _EXPAND + " {layers} --experts 2 --sparsity 0.6 --pattern row --pruner magnitude "
    "--router kmeans --no-baseline",
    "allocation": _EXPAND + " --allocation {of}/allocate-experts.safetensors --pattern row "
    "--pruner sparsegpt --router kmeans --damping 0.01",
    "two-of-four": _EXPAND + " --allocation {of}/allocate-two-of-four.safetensors --experts 2 "
    "--pattern n:4 --pruner random --router kmeans --bits 8",
}
_DECOMPOSE = "decompose {model} {text} {memory}"
DECOMPOSITIONS = {
    "sparsegpt": _DECOMPOSE + " --layer 1 --proj mlp --experts 1,2,4 --sparsity 0.8 "
    "--pruner sparsegpt --router kmeans --contexts 3 --token-pairs 200 --separated 5",
    "wanda": _DECOMPOSE + " --layer 2 --proj mlp --neurons 3,17 --experts 1,2 --sparsity 0.5 "
    "--pruner wanda --router random --contexts 2 --token-pairs 100 --separated 4",
}
_EVALUATE = "--eval-seq-len 32 --eval-windows 4 --join '\\n\\n' --seed 0 --batch-size"
EVALUATIONS = {
    "dense": "evaluate {model} --evaluation inputs/held.txt --special-tokens model " + _EVALUATE
    + " 4",
    "ends": "evaluate {model} --evaluation inputs/held.txt --special-tokens published " + _EVALUATE
    + " 3",
    "expansion": "evaluate {of}/expand-three --base inputs/{of} --device cpu --evaluation "
    "inputs/held.txt --special-tokens model " + _EVALUATE + " 2",
    "quantised": "evaluate {of}/expand-bits --base inputs/{of} --device cpu --evaluation "
    "inputs/held.txt --special-tokens none " + _EVALUATE + " 4",
}  # fmt: skip
_DEMO = f"--n-seq 2 --seq-len 128 {_CUT} --calibration demo --memory 1G"
_DEMO_DATA = "demo --eval-seq-len 64 --eval-windows 2"
DEMO = {
    "score-demo": f"score demo {_RUN} --layer 1 --proj gate_proj,down_proj {_DEMO} "
    "--method exact --batch-size 4 --top 9",
    "ablate-demo": f"ablate demo {_RUN} --layer 1 --proj gate_proj {_DEMO} --select top,random "
    "--by wd --fraction 0.03 --scope layer --seeds 1 --intervention prune --strength 0.9 "
    f"--experts 1 --damping 0.01 --no-md --measure perplexity,divergence --evaluation {_DEMO_DATA}",
    "expand-demo": f"expand demo {_RUN} --layer 1 --proj gate_proj,up_proj {_DEMO} --experts 2 "
    "--sparsity 0.7 --pattern row --pruner sparsegpt --router kmeans --damping 0.01 "
    f"--evaluation {_DEMO_DATA}",
    "evaluate-demo": f"evaluate demo {_RUN} --evaluation demo --eval-seq-len 128 --eval-windows 6 "
    "--join '\\n\\n' --special-tokens model --seed 0 --batch-size 3",
}


def commands(*, demo: bool) -> list[dict[str, list[str]]]:
    """Return command lines by the name of what they make, in stages that need earlier ones."""
    stages: list[dict[str, list[str]]] = [{}, {}, {}, {}]
    for of in MODELS:
        made = {f"score-{name}": (0, line) for name, line in SCORES.items()}
        lines = {name: f"--rule {name} {options}" for name, options in RULES.items()}
        for name, line in (lines | MORE_ALLOCATIONS).items():
            allocated = f"{{scored}} {line} --model {{model}} {{layers}} {{exported}}"
            made[f"allocate-{name}"] = (1, allocated)
        for kind, several in (
            ("ablate", ABLATIONS), ("compare", COMPARISONS), ("expand", EXPANSIONS),
            ("decompose", DECOMPOSITIONS), ("evaluate", EVALUATIONS),
        ):  # fmt: skip
            for name, line in several.items():
                needs = any(f"{{of}}/{one}-" in line for one in ("allocate", "expand"))
                made[f"{kind}-{name}"] = (2 if needs else 1, line)
        made["layers"] = (1, "layers {model}")
        for name, (stage, line) in made.items():
            stages[stage][f"{of}/{name}"] = _filled(line, of=of, name=name, dtype="float32")
        drawn = [f"{of}/{name}" for name in made if not name.startswith(("layers", "evaluate"))]
        drawn = [f"{one}.safetensors" if "/allocate-" in one else one for one in drawn]
        figures = ["figures", *drawn, "--out", f"{of}/figures"]
        stages[3][f"{of}/figures"] = [*figures, "--format", "png", "--column", "double"]
    for name, line in (
        ("score-exact", SCORES["exact"]), ("expand-three", EXPANSIONS["three"]),
        ("compare-all", COMPARISONS["all"]),
    ):  # fmt: skip
        of = "llama"
        stages[0][f"half/{name}"] = _filled(line, of=of, name=name, dtype="bfloat16", place="half")
    for name, line in DEMO.items() if demo else ():
        stages[0][f"demo/{name}"] = _filled(line, of="demo", name=name, dtype="float32")
    return stages


def _filled(line: str, *, of: str, name: str, dtype: str, place: str | None = None) -> list[str]:
    while "{" in line:
        line = line.format(**WORDS, of=of, name=name, dtype=dtype)
    kind = name.partition("-")[0]
    if kind == "layers":
        return [*shlex.split(line), "--json"]
    out = f"{place or of}/{name}" + (".safetensors" if kind == "allocate" else "")
    return [*shlex.split(f"{line} {_JSON}"), "--out", out]


def write_inputs() -> None:
    """Write models, texts, token ids, minimal pairs and lists of neurons."""
    import torch
    from safetensors.torch import save_file

    from tests.tiny_models import TINY, save_tiny

    inputs = Path("inputs")
    for of in MODELS:
        save_tiny(of, inputs / of)
        layers = [name for name, _ in TINY[of]().named_modules() if ".1.mlp." in name]
        rows = [f"{name},{i}" for name in layers if "act" not in name for i in (0, 5, 21)]
        (inputs / f"{of}.csv").write_text("layer,neuron\n" + "\n".join(rows) + "\n")
    words = [f"{i * i % 97} word{i % 13}" for i in range(500)]
    (inputs / "text.txt").write_text("\n\n".join(" ".join(words[i::5]) for i in range(5)))
    (inputs / "held.txt").write_text(" ".join(f"{i * 7 % 101} Other{i % 11}," for i in range(200)))
    lines = [json.dumps({"body": " ".join(words[i::40])}) for i in range(40)]
    (inputs / "lines.jsonl").write_text("\n".join(lines))
    pairs = [
        {"sentence_good": f"{word} sees", "sentence_bad": f"{word} see", "UID": f"kind{i % 2}"}
        for i, word in enumerate(words[:24])
    ]
    (inputs / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 100, (6, 24), generator=generator)
    save_file({"ids": ids}, inputs / "ids.safetensors")


def call_functions() -> None:
    """Call the package's functions on each model and write what they return."""
    import torch

    import entangle
    from entangle import evaluation, pruning
    from entangle.experiments.damage import residual_variance, single_neuron_damage
    from entangle.experiments.outliers import gmm_components
    from entangle.experiments.predictors import predictor_table
    from entangle.stats.wasserstein import null_floor, shape_statistics

    generator = torch.Generator().manual_seed(1)
    for of in MODELS:
        model = entangle.load_model(f"inputs/{of}", dtype="float32", device="cpu")
        token_ids = entangle.load_calibration(
            "inputs/text.txt", model.tokenizer, n_seq=8, seq_len=32, seed=4
        )
        text = entangle.load_evaluation("inputs/held.txt", model.tokenizer, seq_len=32, n_windows=4)
        pairs = entangle.load_minimal_pairs("inputs/pairs.jsonl", n_per_paradigm=5, seed=2)
        quiet: dict[str, Any] = {"memory": 2**30, "progress": False, "seed": 2}
        few: dict[str, Any] = {"layers": [0, 1], "proj": "mlp", **quiet}
        scores = entangle.score(model, token_ids, method="exact", md=True, batch_size=4, **few)
        first = str(scores.layers["layer"].iloc[0])
        target = scores.frame.assign(target=scores.frame["wd"] * scores.frame["weight_norm"])
        reference = evaluation.DenseReference(model, text, memory=2**30, progress=False)
        weight, other, inputs = (torch.randn(8, n, generator=generator) for n in (16, 16, 64))
        gram = (inputs.T @ inputs)[:16, :16]
        sketched = entangle.score(model, token_ids, method="sketch", md=False, batch_size=4, **few)
        made: dict[str, object] = {
            "score": scores, "sketch": sketched, "top": scores.top(7, by="md"),
            "ablate": entangle.ablate(
                model, token_ids, evaluation=text, pairs=pairs, scores=scores, selections=["top"],
                by="variance", fraction=0.1, interventions=["prune", "zero"], strengths=0.6,
                **few,
            ),
            "compare": entangle.compare(
                model, token_ids, text, methods=["wanda", "expansion"], sparsity=0.6, experts=2,
                seed=2, memory=2**30,
            ),
            "decompose": entangle.decompose(
                model, token_ids, layers=1, proj="mlp", experts=[1, 2], sparsity=0.7,
                token_pairs=50, contexts=2, separated=3, restarts=2, **quiet,
            ),
            "expand": entangle.expand(
                model, token_ids, experts=2, sparsity=0.6, restarts=2, evaluation=text, keep=False,
                **few,
            ),
            "allocate": entangle.allocate(scores, sparsity=0.55, rule="rank", model=model),
            "modes": entangle.neuron_modes(
                model, token_ids, first, [0, 7], per_mode=3, window=6, seed=2, progress=False
            ),
            "perplexity": entangle.perplexity(model, text, batch_size=4, progress=False),
            "divergence": evaluation.compare_with_dense(model, reference, progress=False),
            "pairs": evaluation.minimal_pair_scores(model, pairs, progress=False),
            "distances": shape_statistics(other), "null_floor": null_floor(64, seed=3, n_draws=50),
            "predictors": predictor_table(target, "target", n_boot=50, seed=2),
            "components": gmm_components(
                scores, rows={first: [0, 3]}, points=200, seed=2, progress=False
            ),
            "residual": residual_variance(model, token_ids, **quiet),
            "damage": single_neuron_damage(
                model, text, {first: [1, 4]}, intervention="zero", n_boot=50, batch_size=4, **quiet
            ),
            **{
                f"prune-{name}": pruning.prune(weight, gram, method=name, sparsity=0.5, seed=2)
                for name in pruning.METHODS
            },
        }  # fmt: skip
        for name, value in made.items():
            write_value(value, Path("python", of, name))


def write_value(value: object, place: Path) -> None:
    """Write all numbers of a value: a frame as Parquet, a tensor as safetensors, others as JSON."""
    import torch
    from safetensors.torch import save_file

    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, pd.DataFrame):
        value.to_parquet(f"{place}.parquet")
    elif isinstance(value, torch.Tensor | np.ndarray):
        save_file({"value": torch.as_tensor(value).contiguous()}, f"{place}.safetensors")
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            write_value(getattr(value, one.name), place / one.name)
    elif isinstance(value, Mapping) and not _is_json(value):
        for key, one in value.items():
            write_value(one, place / str(key))
    elif _is_json(value):
        Path(f"{place}.json").write_text(json.dumps(value))


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
