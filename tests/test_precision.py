import pytest
import torch

from entangle.errors import InvalidInput
from entangle.precision import (
    accumulator_dtype,
    check_device_map,
    full_precision,
    resolve_device,
    resolve_dtype,
)


def test_dtypes_by_name_and_as_they_are() -> None:
    assert resolve_dtype("auto") is None
    assert resolve_dtype("bfloat16") == resolve_dtype(torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("float16") == torch.float16
    with pytest.raises(InvalidInput, match=r"float32.*bfloat16.*float16.*'int8'"):
        resolve_dtype("int8")


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device() == torch.device("cpu")
    with pytest.raises(InvalidInput, match=r"`device`.*'cuda:1'"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InvalidInput, match=r"`device`.*'cuda:2'.* 2 "):
        resolve_device("cuda:2")


@pytest.mark.parametrize("device_map", ["cuda", "mps", "nowhere", {"a": "cpu", "b": "cuda:0"}])
def test_devices_of_a_map_must_be_there(
    device_map: str | dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="`device_map`"):
        check_device_map(device_map)
    for placement in (None, "auto", "cpu", {"a": "cpu", "b": 0, "c": "disk"}):
        check_device_map(placement)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda:x", torch.device("meta")])
def test_other_devices_are_refused(device: str | torch.device) -> None:
    with pytest.raises(InvalidInput, match=r"`device`.*auto"):
        resolve_device(device)


def test_sums_are_as_wide_as_the_device_allows() -> None:
    assert accumulator_dtype(torch.device("cpu")) == torch.float64
    assert accumulator_dtype(torch.device("cuda")) == torch.float64
    assert accumulator_dtype(torch.device("mps")) == torch.float32


def test_full_precision_is_undone_also_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
