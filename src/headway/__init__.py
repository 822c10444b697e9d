"""Headway: an inference engine and server for models that must answer in time."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.llm import LLM, Completion, SamplingParams, StructuredOutputsParams

if "torch" not in sys.modules:
    # OpenMP reads these once, when torch is first imported. Its threads spin for milliseconds by default: with a busy
    # neighbour on one core that stretches every operator many times over. A short spin, of about 50 µs where the
    # processor's pause takes 25 ns, then sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: the command and the door never need it
    if name in ("LLM", "Completion", "SamplingParams", "StructuredOutputsParams"):
        from headway import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
