"""A process that compiles Triton kernels: ``python -m graphserve.kernels.triton.compile_worker TARGET ROOT NICENESS``.

Reads a kernel a line from stdin, compiles it into the store at ROOT, and answers with a line on stdout; both JSON. See
:mod:`graphserve.kernels.triton.compile_jobs`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from graphserve.artifacts.store import ArtifactStore
from graphserve.kernels.triton.compile import COMPILE_ERRORS, compile_for
from graphserve.kernels.triton.compile_jobs import Reply
from graphserve.kernels.triton.kernel import TritonKernel


def main(target: str, root: str, niceness: str) -> None:
    os.nice(int(niceness))
    answers = os.fdopen(os.dup(1), "wb")
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
        answers.write(msgspec.json.encode(reply) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
