"""What an operator that fails on a device means for whoever drives it, or is about to."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headway import stages
from headway.config import ConfigError, EngineSettings
from headway.kv.pool import KVPool, PoolShape
from headway.models.presets import preset
from headway.placement import engine
from headway.stages import device
from headway.stages.device import DeviceLost, check_device, operators_for
from headway.stages.operators import Operators

DEVICE = torch.device("cuda:0")

Measured = Callable[..., tuple[list[str], str]]


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


# Triton, where its kernels do not compile


class TritonOperators(Operators):
    """As little as tells them from torch's."""

    def __init__(self, config: Any, pool: KVPool, num_positions: int) -> None:
        super().__init__(config, pool)
        self.name = "Triton's"


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    """Measures an engine on a GPU that is not there, which `fails` with the operators that have this name. Says whose
    were measured, and where the prices are from."""
    config = preset("smollm2-135m")
    model: Any = SimpleNamespace(config=config, device=DEVICE, dtype=torch.float32, rope=torch.empty(64, 0))
    pool = KVPool(PoolShape(4, 1, 16, 1, 64, torch.float32))
    matrices: Any = SimpleNamespace(head=SimpleNamespace(name="torch's"))
    gpu = SimpleNamespace(suits=lambda config: config.head_size == 64, TritonOperators=TritonOperators)
    monkeypatch.setattr(stages, "gpu", gpu, raising=False)
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def measured(fails: Exception | None, named: tuple[str, ...] = ("Triton's",)) -> tuple[list[str], str]:
        names: list[str] = []

        def measure() -> None:
            names.append(operators_for(model, pool).name)
            if fails is not None and names[-1] in named:
                raise fails

        calibration = SimpleNamespace(measure=measure, check=None)
        monkeypatch.setattr(engine, "Calibration", lambda *about: calibration)
        monkeypatch.setattr(engine, "_touch", lambda pool: None)
        _, source = engine._prices(EngineSettings(cost_cache=False), model, matrices, pool, 1, 64)
        return names, source

    yield measured
    device.WITHOUT_TRITON.clear()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "Failed to find C"),
        (ValueError("out of resource: shared memory, Required: 147456\nReducing block sizes may help."), "147456): "),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_without_triton_an_engine_starts_all_the_same(
    prices: Measured, error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a C compiler, or with less shared memory than its blocks want: torch's operators do it, here and in all
    that this process does later, and it is said why in one line."""
    names, source = prices(error)
    assert names == ["Triton's", "torch's"]
    assert source.startswith("measured")
    (line,) = caplog.messages
    assert words in line
    assert "\n" not in line
    assert caplog.records[0].levelno == logging.WARNING
    assert prices(error)[0] == ["torch's"]


def test_with_triton_nothing_is_measured_twice(prices: Measured, caplog: pytest.LogCaptureFixture) -> None:
    assert prices(None)[0] == ["Triton's"]
    assert not caplog.messages


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("This cannot be."),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_what_is_no_fault_of_triton_is_not_blamed_on_it(prices: Measured, error: Exception) -> None:
    with pytest.raises(type(error)):
        prices(error)
    assert prices(None)[0] == ["Triton's"]


def test_what_fails_with_torch_s_operators_too_is_told(prices: Measured) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        prices(RuntimeError("something else"), named=("Triton's", "torch's"))


def test_a_device_that_is_lost_is_not_measured_again(prices: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceLost):
        prices(RuntimeError("an illegal memory access was encountered"))
    assert not device.WITHOUT_TRITON.is_set()
