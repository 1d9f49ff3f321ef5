import pickle

import pytest

from entangle import errors
from entangle.errors import EntangleError, InvalidInput, MemoryLimit, Unavailable, unknown_name


def test_every_error_of_a_user_ends_with_status_2() -> None:
    kinds = [errors.InvalidInput, errors.UnknownName, errors.Unavailable, errors.MemoryLimit]
    assert [kind.exit_code for kind in kinds] == [2] * 4
    assert errors.NumericalError.exit_code == EntangleError.exit_code == 1


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidInput, ValueError),
        (errors.UnknownName, LookupError),
        (Unavailable, OSError),
        (MemoryLimit, MemoryError),
        (errors.NumericalError, ArithmeticError),
    ],
)
def test_each_is_also_the_python_error_of_its_kind(
    kind: type[EntangleError], builtin: type[Exception]
) -> None:
    error = kind("what, rule, remedy.")
    assert isinstance(error, builtin)
    assert str(error) == "what, rule, remedy."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("kind", [EntangleError, InvalidInput, errors.UnknownName, Unavailable])
def test_messages_are_one_line_that_acts_on_no_terminal(kind: type[EntangleError]) -> None:
    error = kind("'\x1b[31m\n\u202e\udcff日' is none")
    assert str(error) == r"'\x1b[31m\n\u202e\udcff日' is none"
    assert str(kind(error)) == str(error)


def test_unknown_name_lists_the_five_closest_once_and_in_order() -> None:
    names = ["gate_proj", "gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "lm_head", "x"]
    error = unknown_name("layer", "gate_prj", names, "List them.")
    assert isinstance(error, errors.UnknownName)
    listed = str(error).split("Closest: ")[1].split(". ")[0].split(", ")
    assert str(error).startswith("unknown layer 'gate_prj'. Closest: gate_proj, ")
    assert str(error).endswith(". List them.")
    assert len(listed) == len(set(listed)) == 5
    assert "x" not in listed


def test_unknown_name_without_choices_or_remedy() -> None:
    assert str(unknown_name("column", "text", [])) == "unknown column 'text'. There are none."
    assert str(unknown_name("column", "a", ["b"])) == "unknown column 'a'. Closest: b."
