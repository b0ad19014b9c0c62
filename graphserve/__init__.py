"""graphserve: serve Hugging Face decoders compiled from their own mathematics.

The public names are imported on first use, so ``import graphserve`` (and ``graphserve --help``) loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphserve.async_llm import AsyncLLM
    from graphserve.config import EngineConfig
    from graphserve.engine.llm_engine import LLMEngine
    from graphserve.errors import (
        CheckpointError,
        CompileError,
        ConfigError,
        EngineDeadError,
        GraphserveError,
        RequestError,
        UnsupportedModelError,
    )
    from graphserve.llm import LLM
    from graphserve.outputs import CompletionOutput, Logprob, RequestOutput
    from graphserve.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

# Read by torch at its first allocation: weights and KV pool in huge pages make a one-stream CPU step 9 % shorter
# (DECISIONS.md, CPU kernels). A value that is set already stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_MODULE_OF = {
    "LLM": "graphserve.llm",
    "AsyncLLM": "graphserve.async_llm",
    "LLMEngine": "graphserve.engine.llm_engine",
    "EngineConfig": "graphserve.config",
    "SamplingParams": "graphserve.sampling_params",
    "RequestOutputKind": "graphserve.sampling_params",
    "RequestOutput": "graphserve.outputs",
    "CompletionOutput": "graphserve.outputs",
    "Logprob": "graphserve.outputs",
    "GraphserveError": "graphserve.errors",
    "ConfigError": "graphserve.errors",
    "RequestError": "graphserve.errors",
    "CheckpointError": "graphserve.errors",
    "UnsupportedModelError": "graphserve.errors",
    "CompileError": "graphserve.errors",
    "EngineDeadError": "graphserve.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "LLMEngine",
    "EngineConfig",
    "SamplingParams",
    "RequestOutputKind",
    "RequestOutput",
    "CompletionOutput",
    "Logprob",
    "GraphserveError",
    "ConfigError",
    "RequestError",
    "CheckpointError",
    "UnsupportedModelError",
    "CompileError",
    "EngineDeadError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'graphserve' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
