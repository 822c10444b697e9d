"""What differs from device to device: whose operators suit it, and what a yield must do to be honest on one that runs
behind the program."""

from collections import deque
from importlib.util import find_spec
from threading import Event

import torch

from headway.kv.pool import KVPool
from headway.models.decoder import Decoder
from headway.stages import native
from headway.stages.operators import Operators

LAUNCH_AHEAD = 2  # tiles that may be queued on the device and not finished
WITHOUT_TRITON = Event()  # once set, its kernels are used in this process no more: they have failed


def operators_for(model: Decoder, pool: KVPool) -> Operators:
    """The compiled ones on a CPU, Triton's on CUDA, where they are there and suit the model; else torch's."""
    if uses_triton(model):
        from headway.stages import gpu

        return gpu.TritonOperators(model.config, pool, len(model.rope))
    found = native.library()
    if found is not None and native.suits(found, model.config, model.dtype, model.device):
        return native.NativeOperators(model.config, pool, found)
    return Operators(model.config, pool)


def uses_triton(model: Decoder) -> bool:
    """Whether its kernels are there, suit the model and have not failed."""
    if model.device.type != "cuda" or find_spec("triton") is None or WITHOUT_TRITON.is_set():
        return False
    from headway.stages import gpu  # needs Triton, which only CUDA builds of torch bring along

    return gpu.suits(model.config)


class DeviceLost(BaseException):
    """Nothing runs on the device any more, as after an illegal access: whoever drives must end, and begin anew."""


def check_device(device: torch.device) -> None:
    """After an operator has failed: raise DeviceLost if it was not the step's own fault."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(f"{device} answers no more: {error}") from error


class LaunchAhead:
    """On a CPU an operator has ended when its call returns. On CUDA the program runs ahead of the device: after each
    tile, of whichever step, an event is recorded, and the program waits for the one `depth` tiles back, never for all
    of them."""

    def __init__(self, device: torch.device, depth: int = LAUNCH_AHEAD) -> None:
        self.depth = depth
        self._marks: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def passed(self) -> None:
        """A tile has been issued."""
        if self._marks is None:
            return
        mark = torch.cuda.Event()
        mark.record()
        self._marks.append(mark)
        while len(self._marks) > self.depth:
            self._marks.popleft().synchronize()
