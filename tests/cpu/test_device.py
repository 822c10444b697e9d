"""What an operator that fails on a device means for whoever drives it."""

import pytest
import torch

from headway.stages.device import DeviceLost, check_device

DEVICE = torch.device("cuda:0")


def test_a_step_that_failed_of_itself_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device still answers, as when there was too little memory for one step."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    check_device(DEVICE)
    assert asked == [DEVICE]


def test_a_device_that_answers_no_more_ends_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call fails. That is no fault of a step: the driver goes, another engine comes."""

    def fails(device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceLost, match="cuda:0 answers no more: CUDA error"):
        check_device(DEVICE)
    assert not issubclass(DeviceLost, Exception), "or it would count as the failure of one step"
