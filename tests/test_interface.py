"""The page of the public interface says what the code does.

``python -m benchmarks.interface > docs/INTERFACE.md`` writes it anew.
"""

from pathlib import Path

from benchmarks.interface import page


def test_the_page_is_that_of_the_code() -> None:
    kept = Path(__file__).parent.parent / "docs" / "INTERFACE.md"
    assert kept.read_text("utf-8") == page()
