"""A step on its way to its end, and what the host makes of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from graphserve.runtime.sampler import top_logprobs
from graphserve.runtime.step_input import INVALID_TOKEN, NO_LOGPROBS, SamplingInput, StepOutput, TokenLogprobs


class StepLogprobs(Protocol):
    """Log-probabilities of a step, readable once it has ended."""

    def report(self, output: StepOutput, sampling: SamplingInput) -> None:
        """Write what ``sampling`` asked for into ``output``."""


class SubmittedStep:
    """A step on its way. Its results wait in the ring until :meth:`result` takes them.

    Args:
        sampling: what the step was asked for.
        ring: its slot of the output ring, ``[2, rows]`` int32: tokens, and which rows have finished.
        logprobs: None if nobody asked for any.
        done: recorded behind the step's work; None where that is done already.
    """

    def __init__(
        self,
        sampling: SamplingInput,
        ring: torch.Tensor,
        logprobs: StepLogprobs | None,
        done: torch.cuda.Event | None,
    ) -> None:
        self.is_taken = False
        self._sampling = sampling
        self._ring = ring
        self._logprobs = logprobs
        self._done = done

    def wait(self) -> None:
        """Until the device has ended the step."""
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> StepOutput:
        """Wait for the step and take its results; called once."""
        assert not self.is_taken, "the result of a step is taken once"
        self.wait()
        output = StepOutput(self._ring[0, : self._sampling.num_rows].tolist())
        if self._logprobs is not None:
            self._logprobs.report(output, self._sampling)
        self.is_taken = True
        return output


class HostLogprobs:
    """Results of ``gs.top_logprobs`` on their way to the host: ids ``[R, 1 + n]``, log-probabilities, ranks ``[R]``."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def report(self, output: StepOutput, sampling: SamplingInput) -> None:
        ids, values, ranks = (tensor[: sampling.num_rows].tolist() for tensor in self._tensors)
        if sampling.num_logprobs is None:
            return
        output.logprobs = [
            TokenLogprobs(ids[row][: 1 + count], values[row][: 1 + count], ranks[row])
            if count != NO_LOGPROBS and output.token_ids[row] != INVALID_TOKEN
            else None
            for row, count in enumerate(sampling.num_logprobs)
        ]


class LaterLogprobs:
    """Log-probabilities of a split step, over the whole vocabulary: picked out when the result is taken."""

    def __init__(self, logits: torch.Tensor, sampling: SamplingInput) -> None:
        self._rows = {
            row: logits[row].float().log_softmax(-1)
            for row, count in enumerate(sampling.num_logprobs or ())
            if count != NO_LOGPROBS
        }
        self._prompts = [
            logits[rows.first_row : rows.first_row + len(rows.target_ids)].float().log_softmax(-1)
            for rows in sampling.prompt_logprobs
        ]

    def report(self, output: StepOutput, sampling: SamplingInput) -> None:
        if sampling.num_logprobs is not None:
            output.logprobs = [None] * sampling.num_rows
            for row, logprobs in self._rows.items():
                if output.token_ids[row] != INVALID_TOKEN:
                    output.logprobs[row] = top_logprobs(logprobs, output.token_ids[row], sampling.num_logprobs[row])
        for rows, prompt in zip(sampling.prompt_logprobs, self._prompts, strict=True):
            output.prompt_logprobs[rows.sequence] = [
                top_logprobs(logprobs, target, rows.num_logprobs)
                for logprobs, target in zip(prompt, rows.target_ids.tolist(), strict=True)
            ]
