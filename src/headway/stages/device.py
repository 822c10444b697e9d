"""What a yield must do to be honest on a device that runs behind the program."""

from collections import deque

import torch

LAUNCH_AHEAD = 2  # tiles that may be queued on the device and not finished


class LaunchAhead:
    """On a CPU an operator has ended when its call returns. On CUDA the program runs ahead of the device: after each
    tile an event is recorded, and the program waits for the one `depth` tiles back, never for all of them."""

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
        if len(self._marks) > self.depth:
            self._marks.popleft().synchronize()
