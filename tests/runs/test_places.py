from pathlib import Path

import platformdirs
import pytest

from entangle.runs.places import cache_folder, runs_folder


@pytest.mark.parametrize(
    ("home", "cache", "kept", "runs"),
    [
        (None, None, None, "runs"),
        ("", "", None, "runs"),
        ("/h", None, "/h/cache", "/h/runs"),
        ("/h", "/c", "/c", "/h/runs"),
        (None, "/c", "/c", "runs"),
        ("~/h", None, "/me/h/cache", "/me/h/runs"),
    ],
)
def test_where_things_go_that_nobody_names_a_place_for(
    monkeypatch: pytest.MonkeyPatch,
    home: str | None,
    cache: str | None,
    kept: str | None,
    runs: str,
) -> None:
    monkeypatch.setenv("HOME", "/me")
    for name, value in (("ENTANGLE_HOME", home), ("ENTANGLE_CACHE", cache)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    expected = Path(kept or platformdirs.user_cache_dir("entangle"))
    assert (cache_folder(), runs_folder()) == (expected, Path(runs))
