"""Where the time of a rank goes is counted once, and by functions that exist."""

import time

import pytest

from benchmarks.rank_profile import Profile, profile_table, profiled
from entangle.scoring import score


def test_a_phase_does_not_count_what_another_takes_within_it() -> None:
    begin, profile = time.perf_counter(), Profile()
    with profile.phase("outer"):
        time.sleep(0.02)
        with profile.phase("inner"):
            time.sleep(0.06)
    whole = time.perf_counter() - begin
    walls = {name: wall for name, (wall, _) in profile.seconds.items()}
    assert walls["inner"] >= 0.06
    assert walls["outer"] >= 0.02
    assert sum(walls.values()) <= whole


def test_the_table_has_a_row_a_phase_in_their_order() -> None:
    table = profile_table({"one": {"tables": (1.0, 0.5), "begin": (2.0, 0.5)}, "two": {}})
    assert list(table.index) == ["begin", "tables", "in all"]
    assert list(table["one"]) == ["2.00 (0.50)", "1.00 (0.50)", "3.00"]


def test_phases_are_functions_of_the_package() -> None:
    before = vars(score)["agree_on"]
    with profiled() as profile:
        assert vars(score)["agree_on"] is not before
        vars(score)["agree_on"]()
    assert vars(score)["agree_on"] is before
    assert set(profile.seconds) == {"begin", "the rest"}


def test_an_error_ends_its_phase() -> None:
    profile = Profile()
    with pytest.raises(ValueError, match="no"), profile.phase("one"):
        raise ValueError("no")
    with profile.phase("two"):
        pass
    assert set(profile.seconds) == {"one", "two"}
