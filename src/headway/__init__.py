"""Headway: an inference engine and server for models that must answer in time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.llm import LLM, Completion, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: the command and the door never need it
    if name in ("LLM", "Completion", "SamplingParams"):
        from headway import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
