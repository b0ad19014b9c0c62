"""A process that compiles Triton kernels: ``python -m graphserve.kernels.triton.compile_worker TARGET ROOT NICENESS``.

Reads a kernel a line from stdin, compiles it into the store at ROOT, and answers with a line on stdout; both JSON. See
:mod:`graphserve.kernels.triton.compile_jobs`.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from graphserve.artifacts.store import ArtifactStore
from graphserve.kernels.triton.compile import COMPILE_ERRORS, compile_for
from graphserve.kernels.triton.compile_jobs import Reply
from graphserve.kernels.triton.kernel import TritonKernel


def main(target: str, root: str, niceness: str) -> None:
    os.nice(int(niceness))
    answers = os.dup(1)
    os.dup2(2, 1)  # what a compiler prints is no answer
    store = ArtifactStore(Path(root))
    for line in sys.stdin.buffer:
        kernel = msgspec.json.decode(line, type=TritonKernel)
        try:
            compile_for(kernel, target, store)
        except COMPILE_ERRORS as error:
            reply = Reply(str(error))
        else:
            reply = Reply()
        with suppress(BrokenPipeError):  # the parent has ended, and with it the input
            os.write(answers, msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
