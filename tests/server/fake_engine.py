"""An engine process without a model, for tests of what surrounds the engine: it repeats the prompt, one byte a step.

Run as ``fake_engine.py FD FOLDER`` in the place of ``graphserve.engine.process``; the process, its loop and its
messages are the real ones. The prompt's text steers it: ``<fail>`` ends that request with an error, ``<crash>`` raises
in the step, ``<exit>`` ends the process as a kernel fault would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from graphserve import progress
from graphserve.engine.messages import (
    AddRequest,
    ConvertedTokenizer,
    EngineInfo,
    EngineStats,
    OutputDelta,
    RequestEnded,
    TokenizerSource,
)
from graphserve.engine.process import run_engine_process
from graphserve.errors import ConfigError, RequestError
from graphserve.outputs import Logprob
from graphserve.progress import PhaseEvent

BLOCK_SIZE = 16


class EchoEngine:
    """Answers choice ``i`` with the prompt rotated by ``i`` tokens, for ever, until ``max_tokens``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._step_s = float(config.get("step_s", 0.0))
        self._requests: dict[str, tuple[AddRequest, int]] = {}
        self._num_steps = self._num_tokens = 0
        self.info = EngineInfo(
            model="echo",
            served_model_names=config.get("served_model_names", ["echo"]),
            max_model_len=config.get("max_model_len", 4096),
            max_num_seqs=config.get("max_num_seqs", 256),
            max_logprobs=20,
            vocab_size=300,
            num_blocks=10_000,
            block_size=BLOCK_SIZE,
            default_sampling_params={"temperature": 0.7},
        )

    def add(self, request: AddRequest) -> None:
        if "<invalid>" in (request.prompt or ""):
            raise RequestError("the engine refuses this prompt", param="prompt")
        self._requests[request.request_id] = (request, 0)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> tuple[list[OutputDelta], list[RequestEnded]]:
        time.sleep(self._step_s)
        self._num_steps += 1
        deltas: list[OutputDelta] = []
        ended: list[RequestEnded] = []
        for request_id, (request, position) in list(self._requests.items()):
            text = request.prompt or ""
            if "<crash>" in text:
                raise ValueError("told to crash")
            if "<exit>" in text:
                os._exit(17)
            if "<fail>" in text and position == 2:
                del self._requests[request_id]
                ended.append(RequestEnded(request_id, "secret detail /etc/passwd", None, False))
                continue
            is_last = position + 1 == request.params.max_tokens
            deltas.extend(_delta(request, index, position, is_last) for index in range(request.params.n))
            self._num_tokens += request.params.n
            self._requests[request_id] = (request, position + 1)
            if is_last:
                del self._requests[request_id]
        return deltas, ended

    def stats(self) -> EngineStats:
        lengths = [len(request.prompt_token_ids) + position for request, position in self._requests.values()]
        return EngineStats(
            num_running=len(lengths),
            num_blocks_in_use=sum(-(-length // BLOCK_SIZE) for length in lengths),
            num_blocks=10_000,
            generation_tokens_total=self._num_tokens,
            num_steps_total=self._num_steps,
            num_sync_steps_total=1,
            num_variant_steps_total={"greedy": self._num_steps} if self._num_steps else {},
            num_eager_steps_total=2,
            num_graphs=70,
        )

    def close(self) -> None:
        self._requests.clear()


def _delta(request: AddRequest, index: int, position: int, is_last: bool) -> OutputDelta:
    ids = request.prompt_token_ids
    token_id = ids[(index + position) % len(ids)]
    text = chr(token_id) if token_id < 128 else ""
    wanted = request.params.logprobs
    logprobs = None
    if wanted is not None:
        others = {(token_id + 1 + rank) % 128: Logprob(-2.0 - rank, rank + 2, "x") for rank in range(wanted)}
        logprobs = [{token_id: Logprob(-0.5, 1, text), **others}]
    prompt_logprobs = None
    if request.params.prompt_logprobs is not None and position == 0:
        prompt_logprobs = [None, *({i: Logprob(-1.0, 1, chr(i))} for i in ids[1:])]
    return OutputDelta(
        request.request_id,
        index,
        text,
        [token_id],
        logprobs,
        "length" if is_last else None,
        prompt_logprobs=prompt_logprobs,
    )


def _compile(report: Path) -> None:
    """Begin a phase, a process and a temporary folder, and end none of them; the report has a line for each of both."""
    progress.emit(PhaseEvent("compile", "begin"))
    compiler = subprocess.Popen(["sleep", "600"])
    report.with_suffix(".part").write_text(f"{compiler.pid}\n{tempfile.mkdtemp()}")
    report.with_suffix(".part").rename(report)


def make_engine(config: dict[str, Any], send_tokenizer: Callable[[TokenizerSource], None]) -> EchoEngine:
    if config.get("refuses_to_start"):
        raise ConfigError("this model cannot be served")
    marker = config.get("starts_once")
    if marker is not None:
        if os.path.exists(marker):
            raise ConfigError("it started once and will not again")
        with open(marker, "w"):
            pass
    if "converted" in config:
        send_tokenizer(TokenizerSource(converted=msgspec.convert(config["converted"], ConvertedTokenizer)))
    else:
        send_tokenizer(TokenizerSource(config["tokenizer_path"]))
    if "compiles" in config:
        _compile(Path(config["compiles"]))
    time.sleep(float(config.get("load_s", 0.0)))
    return EchoEngine(config)


if __name__ == "__main__":
    sys.exit(run_engine_process(sys.argv[1:], make_engine))
