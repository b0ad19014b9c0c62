"""Exceptions as the lines a user reads: ``error:`` what is wrong, ``hint:`` what to do."""

from __future__ import annotations

from graphserve.errors import (
    CacheMissError,
    CheckpointError,
    CompileError,
    ConfigError,
    EngineDeadError,
    GraphserveError,
    RequestError,
    UnsupportedModelError,
)

_HINTS: tuple[tuple[type[Exception], str], ...] = (
    (ConfigError, "graphserve {command} --help lists the options"),
    (RequestError, "graphserve {command} --help lists the options and their ranges"),
    (CheckpointError, "check the files of the model folder, or download them again"),
    (UnsupportedModelError, "graphserve explain MODEL shows what was traced and what was refused"),
    (CompileError, "this is a bug of graphserve: run again with --debug and report the output"),
    (CacheMissError, "graphserve warmup fills the store; without --strict-compile-cache a start compiles what lacks"),
    (EngineDeadError, "run again with --debug for the traceback of the engine"),
    (MemoryError, "give a smaller --max-model-len, --max-num-seqs or --kv-cache-memory-bytes"),
)


def describe(error: Exception, command: str) -> tuple[int, str]:
    """Exit status and the two lines for an exception that ended ``command``.

    Wrong input (options, requests) is status 2, any other failure 1.
    """
    status = 2 if isinstance(error, (ConfigError, RequestError)) else 1
    hint = next((text for kind, text in _HINTS if isinstance(error, kind)), "run again with --debug for the traceback")
    text = " ".join(str(error).split()) or "no further information"
    if not isinstance(error, GraphserveError):
        text = f"{type(error).__name__}: {text}"
    return status, f"error: {text}\nhint: {hint.format(command=command)}\n"
