from tests.scoring.conftest import scored

__all__ = ["scored"]
