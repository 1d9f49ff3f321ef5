"""A build that is killed goes on to the same bytes; a checkpoint is the model in any process."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entangle.cli.main import main
from entangle.evaluation import EvaluationText, perplexity
from entangle.experts.checkpoint import load_expanded
from entangle.models.loading import load_model
from entangle.texts.calibration_set import CalibrationSet
from tests.cli.expansions import BLOCKS, FILES
from tests.killed import killed_before

COMMAND = (
    "expand", "model", "--calibration", "ids.safetensors", "--experts", "3", "--device", "cpu",
    "--quiet", "--out",
)  # fmt: skip


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder: the tiny Llama ``model`` and ``ids.safetensors``."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    save_file({"ids": calibration.ids.contiguous()}, "ids.safetensors")
    return tmp_path


def test_a_build_that_was_killed_twice_resumes_to_the_same_bytes(place: Path) -> None:
    building = Path(".x.building")
    killed_before("block-0001", 1, [*COMMAND, "x"])
    assert not Path("x").exists()
    assert sorted(path.name for path in building.glob("*.safetensors")) == BLOCKS[:1]
    assert main([*COMMAND, "x"]) == 2  # not without --resume
    killed_before("x", 1, [*COMMAND, "x", "--resume"])
    assert not Path("x").exists()
    assert sorted(path.name for path in building.glob("*.safetensors")) == BLOCKS
    assert main([*COMMAND, "x", "--resume"]) == 0
    assert main([*COMMAND, "whole"]) == 0
    resumed, whole = (
        {path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("x", "whole")
    )
    assert sorted(resumed) == FILES
    assert {**resumed, "run.json": b""} == {**whole, "run.json": b""}
    assert sorted(path.name for path in place.iterdir()) == [
        "ids.safetensors", "model", "whole", "x",
    ]  # fmt: skip


LOADER = """
import json, sys
import torch
from safetensors.torch import load_file
from entangle import load_expanded
from entangle.evaluation import EvaluationText, perplexity

torch.set_num_threads(int(sys.argv[1]))
model = load_expanded("x", device="cpu")
ids = load_file("ids.safetensors")["ids"]
losses = perplexity(model, EvaluationText(ids, "ids", {}), progress=False).window_losses
prompt = model.tokenizer("a prompt", return_tensors="pt")
new = model.module.generate(**prompt, max_new_tokens=8, do_sample=False)
print(json.dumps({"losses": losses.tolist(), "new": new.tolist(), "digest": model.digest,
                  "text": model.tokenizer.decode(new[0])}))
"""


def test_a_checkpoint_is_the_same_model_in_a_new_process(
    place: Path, calibration: CalibrationSet
) -> None:
    assert main([*COMMAND, "x"]) == 0
    command = [sys.executable, "-c", LOADER, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout)
    here, dense = load_expanded("x", device="cpu"), load_model("model", device="cpu")
    text = EvaluationText(calibration.ids, "ids", {})
    losses = perplexity(here, text, progress=False).window_losses
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["losses"] != pytest.approx(perplexity(dense, text).window_losses, rel=1e-6)
    assert found["digest"] == here.digest
    assert here.tokenizer is not None
    prompt = here.tokenizer("a prompt", return_tensors="pt")
    new = here.module.generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert found["new"] == new.tolist()
    assert found["text"] == here.tokenizer.decode(new[0])
    assert "a prompt" in found["text"]
    assert new.shape[1] > prompt["input_ids"].shape[1]
