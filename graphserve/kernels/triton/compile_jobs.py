"""Many Triton kernels at a time: each worker is a process, because Triton's front end is Python.

Workers are fresh interpreters that get kernels line by line. Nothing is forked, since this process runs the threads of
torch, and the caller's own script is not imported again. A worker ends when its input does, so also with its parent. A
terminal's Ctrl-C is for the parent alone, which then waits for the kernels that are being compiled. Workers of an
engine process are killed with it (``engine/child.py``).
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from graphserve.artifacts.store import ArtifactStore
from graphserve.errors import CompileError, ConfigError
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.processors import available_processors

MAX_JOBS = 16  # a worker takes some 300 MB


class Reply(msgspec.Struct):
    """What a worker says of one kernel: why it does not compile, or nothing."""

    error: str | None = None


def default_jobs() -> int:
    """Compilers at a time when a start has to compile: one a processor."""
    return min(MAX_JOBS, available_processors())


def compile_in_processes(
    kernels: Sequence[TritonKernel],
    target: str,
    store: ArtifactStore,
    num_jobs: int,
    advance: Callable[[], None] = lambda: None,
    is_stopped: Callable[[], bool] = lambda: False,
    niceness: int = 0,
) -> None:
    """Compile kernels into the store.

    Args:
        advance: called after each kernel, from any thread.
        is_stopped: asked before each kernel; those that are left then are not compiled.
        niceness: added to that of the workers, so that other work goes first.

    Raises:
        CompileError: Triton refuses a kernel (a bug of ours), or a worker was killed or could not be started.
        ConfigError: Triton is not installed.
        CacheMissError: the store is strict.
    """
    if not kernels:
        return
    for kernel in kernels:
        store.begin_build(f"kernel {kernel.symbol} for {target}")
    if find_spec("triton") is None:
        raise ConfigError(f"target {target} needs Triton to compile: pip install triton")
    waiting: queue.SimpleQueue[TritonKernel] = queue.SimpleQueue()
    for kernel in kernels:
        waiting.put(kernel)
    is_over = threading.Event()  # a kernel has failed, or the caller was interrupted
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()  # one a thread

    def work() -> None:
        failure: BaseException | None = None
        try:
            with _Worker(target, store.root, niceness) as worker:
                while not (is_over.is_set() or is_stopped()):
                    try:
                        kernel = waiting.get_nowait()
                    except queue.Empty:
                        return
                    worker.compile(kernel)
                    advance()
        except BaseException as error:
            failure = error
            is_over.set()
        finally:
            outcomes.put(failure)

    # Daemons, unlike those of a pool: a script that ends does not wait for what is compiled in its background.
    threads = [threading.Thread(target=work, name="kernel compiler", daemon=True) for _ in kernels[:num_jobs]]
    for thread in threads:
        thread.start()
    try:
        # Not by join(): an interrupt in the middle of it makes Python 3.11 take a running thread for an ended one.
        failures = [failure for _ in threads if (failure := outcomes.get()) is not None]
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class _Worker:
    """A process that compiles one kernel after the other."""

    def __init__(self, target: str, root: Path, niceness: int) -> None:
        self._target = target
        command = [sys.executable, "-P", "-m", "graphserve.kernels.triton.compile_worker"]
        command += [target, str(root), str(niceness)]
        # It finds packages as this process does, and its errors go where ours go.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # Who ignores Ctrl-C, as an engine process does, hands that on; its workers stay in the group that is killed.
        group = None if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else 0
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=group
            )
        except OSError as error:
            raise CompileError(f"no compiler for {target} could be started: {error} (fewer jobs need less)") from error

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # a line that a dead worker never read
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def compile(self, kernel: TritonKernel) -> None:
        """Have one kernel in the store.

        Raises:
            CompileError: it does not compile, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(kernel) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise CompileError(
                f"the compiler of {kernel.symbol} for {self._target} ended with status {self._process.wait()} "
                "(-9 is a lack of memory, mostly: fewer jobs need less)"
            )
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error is not None:
            raise CompileError(f"{kernel.symbol} does not compile for {self._target}: {reply.error}")
