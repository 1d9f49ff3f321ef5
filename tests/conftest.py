"""Fixtures that several rooms share; heavy imports happen when a fixture is first used."""

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from torch import nn

    from entangle.evaluation import EvaluationText
    from entangle.experiments.compare import Comparison
    from entangle.models.loading import LanguageModel
    from entangle.results.scores import NeuronScores
    from entangle.scoring.score import Method
    from entangle.texts.calibration_set import CalibrationSet


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and slow tests unless ``-m`` speaks of them."""
    asked = str(config.getoption("-m"))
    no_gpu = any(item.get_closest_marker("gpu") for item in items) and not _has_cuda()
    for item in items:
        if item.get_closest_marker("gpu") and no_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Take signals as a program in the foreground does, also in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests name less memory than a user can, so that small tables spill."""
    from entangle import memory

    monkeypatch.setattr(memory, "LEAST_BYTES", 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return a function that sets the number of threads of torch until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub count as reachable: no test but those of `entangle.models.hub` asks."""
    from entangle.models import hub

    monkeypatch.setattr(hub, "answers", lambda: True)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a test's own where results without a name go; the cache stays."""
    from entangle.runs.places import cache_folder

    home = tmp_path_factory.getbasetemp() / "homes" / uuid4().hex
    monkeypatch.setenv("ENTANGLE_CACHE", str(cache_folder()))
    monkeypatch.setenv("ENTANGLE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tiny() -> "Callable[[str], LanguageModel]":
    """Return a tiny model by name, built once; tests that change weights build their own."""
    from entangle.models.loading import as_language_model
    from tests.tiny_models import TINY

    return cache(lambda name: as_language_model(TINY[name]()))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a tiny model saved as a folder, by name, made once and only read."""
    from tests.tiny_models import save_tiny

    return cache(lambda name: save_tiny(name, tmp_path_factory.mktemp("models") / name))


@pytest.fixture(scope="session")
def calibration() -> "CalibrationSet":
    """Return 12 sequences of 16 random tokens."""
    import torch

    from entangle.seeding import torch_rng
    from entangle.texts.calibration_set import CalibrationSet

    ids = torch.randint(4, 112, (12, 16), generator=torch_rng(0, "test tokens"))
    return CalibrationSet(ids, "random ids", {})


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of about 4,000 characters, one token each for the tiny tokenizer."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(f"{i * i % 97} word{i % 13}" for i in range(400)))
    return path


@pytest.fixture(scope="session")
def count_hooks() -> "Callable[[nn.Module], int]":
    """Return a function that counts the hooks of any kind in a module tree."""

    def count(module: "nn.Module") -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)

    return count


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> "EvaluationText":
    """A text of 8 windows of 32 tokens for the tiny models."""
    from entangle.evaluation import load_evaluation
    from tests.tiny_models import tiny_tokenizer

    path = tmp_path_factory.mktemp("evaluation") / "text.txt"
    path.write_text("The quick brown fox\njumps over 13 lazy dogs. " * 6)
    return load_evaluation(path, tiny_tokenizer(), seq_len=32)


@pytest.fixture(scope="session")
def text() -> "EvaluationText":
    """Return 5 windows of 16 random tokens."""
    import torch

    from entangle.evaluation import EvaluationText
    from entangle.seeding import torch_rng

    ids = torch.randint(4, 90, (5, 16), generator=torch_rng(1, "evaluation"))
    return EvaluationText(ids, "random ids", {})


@pytest.fixture(scope="session")
def found(
    tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet", text: "EvaluationText"
) -> "Comparison":
    """Magnitude, SparseGPT and both routers at two sparsities, on a tiny model, compared once."""
    from entangle.experiments.compare import compare

    methods = ("magnitude", "sparsegpt", "expansion", "expansion-random")
    settings = {"methods": methods, "sparsity": (0.5, 0.8), "experts": (1, 3)}
    return compare(tiny("llama"), calibration, text, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path], text_file: Path
) -> dict[str, Path]:
    """Return a result of every kind, of two layers and few tokens, by its kind; only read."""
    from entangle.cli.main import main

    folder, model = tmp_path_factory.mktemp("runs"), tiny_folder("llama")
    text = ("--calibration", text_file, "--n-seq", 4, "--seq-len", 32, "--quiet")
    mlp = ("--layer", 1, "--proj", "mlp")
    evaluated = ("--evaluation", text_file, "--eval-seq-len", 32, "--eval-windows", 2)
    commands: dict[str, tuple[object, ...]] = {
        "scores": ("score", model, *mlp, *text),
        "ablation": (
            "ablate", model, *mlp, *text, *evaluated, "--seeds", 1, "--strength", "0.5",
            "--count", 2, "--measure", "perplexity,divergence",
        ),
        "comparison": (
            "compare", model, *text, *evaluated, "--methods", "wanda", "--sparsity", "0.5",
        ),
        "decomposition": (
            "decompose", model, "--layer", 1, "--proj", "mlp.gate_proj", *text, "--experts", "1,2",
        ),
        "anchor": ("anchor", model, "--layer", 1, "--proj", "up_proj", *text, "--atoms", 20),
        "expansion": ("expand", model, *text, "--proj", "up_proj", "--experts", 2),
        "pruning": ("prune", model, *text, "--proj", "up_proj"),
        "allocation": ("allocate", folder / "scores", "--sparsity", 0.5, "--quiet"),
        "study": (
            "study", model, *text, *evaluated, "--size", "small", "--claims", "non-gaussian,wd-md",
        ),
        "trace": ("trace", model, tiny_folder("qwen3"), *text, *evaluated, "--seeds", 1),
        "difference": ("diff", folder / "scores", folder / "ablation" / "scores"),
    }  # fmt: skip
    paths = {kind: folder / kind for kind in commands}
    paths["allocation"] = folder / "allocation.safetensors"
    for kind, command in commands.items():
        assert main([*map(str, command), "--out", str(paths[kind])]) == 0
    return paths


@pytest.fixture(scope="session")
def scored(
    tiny: "Callable[[str], LanguageModel]", calibration: "CalibrationSet"
) -> "Callable[[str, Method], NeuronScores]":
    """Scores of block 1 of a tiny model by a method, computed once and only read."""
    from entangle.scoring.score import score

    return cache(
        lambda name, method: score(tiny(name), calibration, layers=1, proj=None, method=method)
    )
