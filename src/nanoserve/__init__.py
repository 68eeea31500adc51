"""nanoserve: an LLM serving engine that people can read. Start at request.py; build.py is the table of contents."""

from typing import TYPE_CHECKING, Any

from nanoserve.request import SamplingParams

if TYPE_CHECKING:
    from nanoserve.llm import LLM, AsyncLLM, RequestOutput

__all__ = ["LLM", "AsyncLLM", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """What needs gRPC is imported when it is asked for, so that `nanoserve --help` comes at once."""
    if name in __all__:
        from nanoserve import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
