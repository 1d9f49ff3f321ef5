"""What the tests of evaluation share."""

import pytest

from entangle.evaluation import EvaluationText, load_evaluation
from tests.tiny_models import tiny_tokenizer

TEXT = "The quick brown fox\njumps over 13 lazy dogs. " * 6


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> EvaluationText:
    """Return a text of 8 windows of 32 tokens for the tiny models."""
    path = tmp_path_factory.mktemp("evaluation") / "text.txt"
    path.write_text(TEXT)
    return load_evaluation(path, tiny_tokenizer(), seq_len=32)
