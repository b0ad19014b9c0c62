"""The two ends of a device decode step: tokens that only the device knows go in, sampled tokens come out.

State of the device: ``last_tokens [lanes + 1]`` int64, one place a lane and a last one for the *dead* lane, which
padding and rows without a request point at. A place holds the last token sampled for its lane, or :data:`STOPPED` once
the lane has ended. A lane that has ended may be in steps that were submitted before the host knew: their tokens go to
the null block and their results are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.registry import register
from graphserve.kernels.step_rules import STOPPED


def step_prologue(
    host_ids: Tensor, host_slots: Tensor, token_lanes: Tensor, last_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's token ids and slots from those the host knows and the tokens last sampled.

    Args:
        host_ids: ``[1, T]`` int64; negative where the token is the last one of its lane.
        host_slots: ``[G, T]`` int64, one row a cache group.
        token_lanes: ``[T]`` int32, read where the id is negative.
        last_tokens: ``[lanes + 1]`` int64.

    Returns:
        ``[1, T]`` int64 ids, none negative, and ``[G, T]`` int64 slots. A token of a lane that has ended has id 0 and
        slot 0, which lies in the null block.
    """
    is_carried = host_ids[0] < 0
    last = last_tokens[torch.where(is_carried, token_lanes, 0).long()]
    ids = torch.where(is_carried, last.clamp(min=0), host_ids[0])
    return ids[None], torch.where(is_carried & (last < 0), 0, host_slots)


def step_epilogue(
    token_ids: Tensor,
    host_ids: Tensor,
    logits_indices: Tensor,
    row_lanes: Tensor,
    stop_ids: Tensor,
    tokens_left: Tensor,
    ring_slot: Tensor,
    last_tokens: Tensor,
    ring: Tensor,
) -> None:
    """Keep the sampled tokens for the next step and hand them to the host.

    A row has finished when its token is one of its stop ids, the last that its length allows, or invalid. Its lane has
    then ended, until a step gives the lane's token itself.

    Args:
        token_ids: ``[R]`` int64, negative for an invalid token.
        host_ids: ``[1, T]`` int64 as in :func:`step_prologue`.
        logits_indices: ``[R]`` int64, the token that each row belongs to.
        row_lanes: ``[R]`` int32; rows of the dead lane change no lane.
        stop_ids: ``[R, K]`` int32, padded with -1.
        tokens_left: ``[R]`` int32, how many tokens the row's request may still get, this one included.
        ring_slot: ``[1]`` int32, the slot that takes the results.
        last_tokens: ``[lanes + 1]`` int64, changed in place. No two rows have the same lane, the dead one excepted.
        ring: ``[slots, 2, rows]`` int32, changed in place: of one slot the tokens, then 1 where a row has finished.
    """
    lanes = row_lanes.long()
    dead = last_tokens.shape[0] - 1
    has_ended = (host_ids[0][logits_indices] < 0) & (last_tokens[lanes] < 0)
    is_stop = ((stop_ids == token_ids[:, None]) & (stop_ids >= 0)).any(-1)
    finished = has_ended | is_stop | (tokens_left <= 1) | (token_ids < 0)
    live = lanes < dead
    last_tokens[lanes[live]] = torch.where(finished, STOPPED, token_ids)[live]
    slot = ring[int(ring_slot)]
    slot[0, : token_ids.shape[0]] = token_ids.to(torch.int32)
    slot[1, : token_ids.shape[0]] = finished.to(torch.int32)


def _fake_step_prologue(
    host_ids: Tensor, host_slots: Tensor, token_lanes: Tensor, last_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(host_ids), torch.empty_like(host_slots)


def _fake_step_epilogue(token_ids: Tensor, *_: object) -> None:
    return None


register(
    "step_prologue(Tensor host_ids, Tensor host_slots, Tensor token_lanes, Tensor last_tokens) -> (Tensor, Tensor)",
    step_prologue,
    _fake_step_prologue,
)
register(
    "step_epilogue(Tensor token_ids, Tensor host_ids, Tensor logits_indices, Tensor row_lanes, Tensor stop_ids,"
    " Tensor tokens_left, Tensor ring_slot, Tensor(a!) last_tokens, Tensor(b!) ring) -> ()",
    step_epilogue,
    _fake_step_epilogue,
)
