"""On a CUDA device, or, for single kernels, in Triton's interpreter if TRITON_INTERPRET=1."""

import os
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        return "cpu"
    pytest.skip("torch sees no CUDA device, and TRITON_INTERPRET is not 1 or Triton is not installed")
