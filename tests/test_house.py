"""Counts of a house made by hand."""

from pathlib import Path

from benchmarks.house import read


def test_a_small_house(tmp_path: Path) -> None:
    package = tmp_path / "entangle"
    (package / "stats").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A house."""\n')
    (package / "errors.py").write_text(
        '"""One\nidea."""\n\ndef f(x):\n    """Do."""\n    return x\n'
    )
    (package / "stats" / "mean.py").write_text("from entangle.errors import f\n\nf(1)\n")
    (package / "cli.py").write_text("import entangle.stats.mean\nfrom entangle import errors\n")
    found = read(package)
    assert (found["files"], found["lines"]) == (4, 12)
    assert found["docstrings, % of lines"] == round(100 * 4 / 12, 1)
    assert (found["functions"], found["lines of the longest function"]) == (1, 2)
    assert (found["rooms"], found["floors"]) == (4, 3)
