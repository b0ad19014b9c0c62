"""Many Triton kernels at a time, each worker a process: Triton's front end is Python."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from graphserve.artifacts import ArtifactStore
from graphserve.errors import CompileError, ConfigError
from graphserve.kernels.triton.kernel import TritonKernel

_WORTH_A_PROCESS = 4  # kernels; starting a worker and importing Triton there costs about as much as two kernels


def compile_in_processes(
    kernels: Sequence[TritonKernel], target: str, store: ArtifactStore, num_jobs: int, advance: Callable[[], None]
) -> None:
    """Compile kernels into the store.

    Args:
        advance: called after each kernel.

    Raises:
        CompileError: Triton refuses a kernel (a bug of ours).
        ConfigError: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ConfigError(f"target {target} needs Triton to compile: pip install triton") from None
    if num_jobs == 1 or len(kernels) < _WORTH_A_PROCESS:
        for kernel in kernels:
            _compile(kernel, target, store.root)
            advance()
        return
    # Not forked: this process runs the threads of torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_jobs, len(kernels)), mp_context=context) as pool:
        futures = {pool.submit(_compile, kernel, target, store.root): kernel for kernel in kernels}
        for future in as_completed(futures):
            try:
                future.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                raise CompileError(f"{futures[future].symbol} does not compile for {target}: {error}") from error
            advance()


def _compile(kernel: TritonKernel, target: str, root: Path) -> None:
    from graphserve.kernels.triton.compile import compile_for

    compile_for(kernel, target, ArtifactStore(root))
