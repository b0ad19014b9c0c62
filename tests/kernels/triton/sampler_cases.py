"""Launches of the sampler's kernels: described, interpreted, or compiled."""

import numpy as np
import torch

from graphserve.kernels import sampling
from graphserve.kernels.arg_spec import ArgSpec
from graphserve.kernels.sampling import GROUP
from graphserve.kernels.triton import TritonKernel, generate, sampler_text

LISTS = ("allowed", "banned", "bias", "seen", "output")


def kernels_of(op, attrs, args, outputs, target="cuda:90"):
    """The generated kernels of one launch, as a list."""
    made = generate(op, attrs, args, outputs, target)
    assert isinstance(made, (TritonKernel, list)), made
    return [made] if isinstance(made, TritonKernel) else made


def spec(tensor, rows="R"):
    """How a launch describes a tensor whose first dimension is the step's rows."""
    if tensor is None:
        return None
    return ArgSpec(str(tensor.dtype).removeprefix("torch."), (rows, *tensor.shape[1:]))


def interpreted(op, args, outputs, attrs=None):
    """Outputs of an op's kernels in the interpreter; ``args`` and ``outputs`` all start with the rows dimension."""
    from graphserve.kernels.triton.compile import interpret

    kernels = kernels_of(op, attrs or {}, [spec(a) for a in args], [spec(o) for o in outputs])
    interpret(kernels, [*args, *outputs], {"R": outputs[0].shape[0], "T": 1, "S": 1})
    return outputs


def cut_of(scores, group_max, top_k, top_p, log_min_p):
    """``sampling_cut`` in the interpreter."""
    outputs = [torch.full((scores.shape[0],), -7.0), torch.full((scores.shape[0],), -7.0)]
    return interpreted("sampling_cut", [scores, group_max, top_k, top_p, log_min_p], outputs)


def draw_of(scores, row_max, cut, temperature, keys):
    """``sample_tokens`` in the interpreter."""
    tokens = torch.full((scores.shape[0],), -7)
    return interpreted("sample_tokens", [scores, row_max, cut, temperature, keys], [tokens])[0]


def group_max_of(scores):
    """What ``process_logits`` leaves beside the scores."""
    return sampling.process_logits(scores, *[None] * 17)[1]


def small_blocks(monkeypatch, tokens=GROUP):
    """Split even a small vocabulary over several programs."""
    monkeypatch.setattr(sampler_text, "BLOCK_TOKENS", tokens)


def sparse(rows):
    """(starts, ids) of lists of token ids, one a row."""
    starts = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    return torch.from_numpy(starts), torch.tensor([i for row in rows for i in row] or [0], dtype=torch.int32)
