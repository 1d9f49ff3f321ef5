"""Settings of other types, called without the type checks that the tests add.

What can be meant gives the result of a plain number; everything else is one clear `InvalidInput`.
"""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from decimal import Decimal

import numpy as np
import torch

from entangle.texts import CalibrationSet
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, load_evaluation, perplexity
from entangle.experts import expand
from entangle.experiments.compare import arms, compare
from entangle.models.loading import as_language_model
from entangle.pruning import prune
from entangle.experts.router import fit_router
from entangle.seeding import torch_rng
from tests.tiny_models import TINY

model = as_language_model(TINY["llama"]())
ids = torch.randint(4, 112, (6, 16), generator=torch_rng(0, "foreign"))
calibration, text = CalibrationSet(ids, "ids", {}), EvaluationText(ids[:4], "ids", {})
weight, gram = torch.randn(8, 32, generator=torch_rng(0, "weight")), torch.eye(32)
NAME = "model.layers.0.mlp.up_proj"


def built(**settings):
    fixed = {"experts": 2, "restarts": 1, "layers": [NAME], "proj": None, "sparsity": 0.5}
    found = expand(model, calibration, progress=False, **{**fixed, **settings})
    return json.dumps([found.costs, found.manifest["settings"]])


def pruned(**settings):
    return prune(weight, gram, **{"sparsity": 0.5, **settings}).weight.tolist()


def compared(*lists):
    sparsity, experts = lists
    found = compare(
        model, calibration, text, methods="expansion", sparsity=sparsity, experts=experts,
        seed=experts[0], memory=experts[0] << 20,
    )
    return [found.frame.drop(columns="seconds").to_csv(), json.dumps(found.manifest["settings"])]


SAME = {
    "experts": (built(), built(experts=np.int64(2))),
    "settings": (
        built(sparsity=np.float32(0.5), restarts=np.int8(1), damping=np.float64(0.01),
              seed=np.int64(0), memory=np.int64(2**31), bits=np.int64(4)),
        built(bits=4),
    ),
    "memory": (built(memory=2e9), built(memory=float("inf"))),
    "allocation": (
        built(allocation={NAME: torch.full((48,), 0.5)}),
        built(allocation={NAME: np.full(48, 0.5, np.float32)}),
    ),
    "one share a layer": (built(), built(allocation={NAME: np.float64(0.5)})),
    "rows": (pruned(rows=torch.tensor([0, 2])), pruned(rows=[0, 2])),
    "rows of numpy": (pruned(rows=torch.tensor([0, 2])), pruned(rows=np.array([0, 2]))),
    "sparsities": (pruned(), pruned(sparsity=[0.5] * 8)),
    "random": (pruned(method="random", seed=3), pruned(method="random", seed=np.int64(3))),
    "router": (
        fit_router([weight], 2, seed=0, n_components=2).centroids.tolist(),
        fit_router([weight], np.int64(2), seed=0, n_components=np.int32(2)).centroids.tolist(),
    ),
    "windows": (
        load_evaluation(ids, seq_len=8, n_windows=2).digest,
        load_evaluation(ids, seq_len=np.int64(8), n_windows=np.int32(2)).digest,
    ),
    "batch": (
        perplexity(model, text, batch_size=2).value,
        perplexity(model, text, batch_size=np.int64(2)).value,
    ),
    "arms": (
        compared([0.5], [2]), compared(np.array([0.5], np.float32), np.array([2])),
    ),
}
REFUSED = {
    "`experts` must be an integer": [lambda: built(experts=2.5), lambda: built(experts="4"),
                                     lambda: arms(["expansion"], [0.5], [2.5])],
    "`restarts` must be an integer": [lambda: built(restarts=1.5)],
    "`bits` must be an integer": [lambda: built(bits=4.0)],
    "`seed` must be an integer": [lambda: built(seed=1.5), lambda: pruned(seed="x")],
    "`damping` must be finite": [lambda: built(damping="x"), lambda: pruned(damping=None)],
    "`memory` must be a number": [lambda: built(memory="2G")],
    "`sparsity` must be a number": [lambda: built(sparsity=Decimal("0.5"))],
    "`sparsity` must be in": [lambda: arms(["wanda"], ["half"], [1])],
    "`sparsity` must be numbers": [lambda: pruned(sparsity="half")],
    "`rows` must be": [lambda: pruned(rows="all"), lambda: pruned(rows=[0.5]),
                       lambda: pruned(rows=3)],
    "`pattern` must be": [lambda: pruned(pattern=None), lambda: built(pattern=2)],
    "`weight` must be a tensor": [lambda: prune(weight.numpy(), gram, sparsity=0.5)],
    "`gram` must be a tensor": [lambda: prune(weight, gram.numpy(), sparsity=0.5)],
    "`stream` must give tensors": [lambda: fit_router([weight.numpy()], 2, seed=0)],
    "`k` must be an integer": [lambda: fit_router([weight], 2.5, seed=0)],
    "`pruner` must be one of": [lambda: built(pruner=3)],
    "`method` must be one of": [lambda: pruned(method=3)],
    "`router` must be one of": [lambda: built(router=None)],
    "`allocation` must be an Allocation": [lambda: built(allocation="a.safetensors")],
    "None (NoneType)": [lambda: load_evaluation(None), lambda: expand(model, None)],
    "`seq_len` must be an integer": [lambda: load_evaluation(ids, seq_len=8.0)],
}


def refused(call):
    try:
        call()
    except InvalidInput as error:
        return str(error)
    return "accepted"


print(json.dumps({
    "differ": [name for name, (one, other) in SAME.items() if one != other],
    "wrong": [
        (wanted, found)
        for wanted, calls in REFUSED.items()
        for found in map(refused, calls)
        if wanted not in found or chr(10) in found or not found.endswith(".")
    ],
}))
"""


def test_settings_of_other_types() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"differ": [], "wrong": []}
