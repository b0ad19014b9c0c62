"""The one exception tree of graphserve.

    GraphserveError
    ├── ConfigError             an engine option, model config or plan that cannot be served (also a ValueError)
    ├── RequestError            one request is wrong; only that request ends (also a ValueError)
    ├── CheckpointError         a weight file or tensor is missing, truncated or has the wrong shape
    ├── UnsupportedModelError   the model computes something the compiler refuses, with op and module
    ├── CompileError            a pass or lowering failed: a bug of ours, named by pass and node
    ├── CacheMissError          something would have to be compiled although strict_compile_cache forbids it
    ├── DeviceError             a GPU driver call failed: names the call, the kernel and the driver's own error
    └── EngineDeadError         the engine process or loop has stopped; no more answers will come

A catch-all ``except Exception`` is allowed only at the isolation boundaries listed here, each of which reports
what it caught and keeps one failure from spreading:

    engine/engine_core.py     one request's part in a finished step: that request ends with an error
    engine/output_processor.py one request's text and log-probabilities: that request ends with an error
    engine/llm_engine.py      a step as a whole: re-raised as EngineDeadError, the engine is closed
    engine/process.py         the engine process main loop: reports the traceback to its parent and exits
    async_llm.py              the engine thread's loop: every waiting caller gets EngineDeadError with the cause
    server/app.py             one HTTP request: answers 500 in OpenAI's error shape
    cli/main.py               one command: becomes an error line, a hint and an exit status
    compiler/pipeline.py      one pass: re-raised as CompileError that names the pass
    compiler/capture.py       the torch.compile call: re-raised as UnsupportedModelError with the reason
    models/tokenizer.py       one tokenizer: the library raises bare Exception; re-raised as ConfigError
    compiler/backend.py       one graph of a user's module: runs eagerly, a warning gives the reason
    runtime/background_build.py one build beside a running model: plain torch goes on, a warning gives the reason
"""


class GraphserveError(Exception):
    """Base of every error graphserve raises on purpose."""


class ConfigError(GraphserveError, ValueError):
    """An option or config value is wrong: says what was given, what is allowed and what to do."""


class RequestError(GraphserveError, ValueError):
    """A single request is invalid. ``param`` names the offending field, as OpenAI's error shape wants it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CheckpointError(GraphserveError):
    """A checkpoint cannot be loaded: names file, tensor, expected and found."""


class UnsupportedModelError(GraphserveError):
    """The model cannot be compiled faithfully; the message names op, module and reason.

    ``guards``: conditions on the number of tokens under which the trace would hold, if that is the reason.
    """

    def __init__(self, message: str, guards: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.guards = guards


class CompileError(GraphserveError):
    """A compiler stage failed on a graph it should handle (a bug): names stage and node."""


class CacheMissError(GraphserveError):
    """Something is not in the artifact store and must not be compiled; names it, the store and the way to fill it."""


class DeviceError(GraphserveError):
    """A GPU driver refused a call, or a binary does not fit it: names call, kernel and the driver's error."""


class EngineDeadError(GraphserveError):
    """The engine has stopped and cannot serve; the cause is chained."""
