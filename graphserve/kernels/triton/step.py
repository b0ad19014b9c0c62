"""``step_prologue`` and ``step_epilogue``: a few integers a token or row, one program for many of them."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused
from graphserve.kernels.step_rules import STOPPED
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2
from graphserve.kernels.triton.sampler_text import require_shape

_TOKENS = 256  # of one prologue program
_ROWS = 32  # of one epilogue program

_PROLOGUE = """
token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
inside = token < T
given = tl.load(host_ids_ptr + token, mask=inside, other=0)
is_carried = given < 0
lane = tl.load(token_lanes_ptr + token, mask=is_carried, other=0)
last = tl.load(last_tokens_ptr + lane, mask=is_carried, other=0)
tl.store(input_ids_ptr + token, tl.where(is_carried, tl.maximum(last, 0), given), mask=inside)
has_ended = is_carried & (last < 0)
for group in range(GROUPS):
    place = group * T.to(tl.int64) + token
    slot = tl.load(host_slots_ptr + place, mask=inside, other=0)
    tl.store(slots_ptr + place, tl.where(has_ended, 0, slot), mask=inside)
"""
_EPILOGUE = """
row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
inside = row < R
token = tl.load(token_ids_ptr + row, mask=inside, other=0)
lane = tl.load(row_lanes_ptr + row, mask=inside, other=DEAD)
left = tl.load(tokens_left_ptr + row, mask=inside, other=0)
given = tl.load(host_ids_ptr + tl.load(logits_indices_ptr + row, mask=inside, other=0), mask=inside, other=0)
is_live = inside & (lane < DEAD)
before = tl.load(last_tokens_ptr + lane, mask=is_live, other=0)
which = tl.arange(0, STOPS_BLOCK)
has_stop = inside[:, None] & (which < STOPS)[None, :]
stop = tl.load(stop_ids_ptr + row[:, None].to(tl.int64) * STOPS + which[None, :], mask=has_stop, other=-1)
is_stop = tl.max(((stop == token[:, None]) & (stop >= 0)).to(tl.int32), axis=1) > 0
finished = ((given < 0) & (before < 0)) | is_stop | (left <= 1) | (token < 0)
tl.store(last_tokens_ptr + lane, tl.where(finished, STOPPED, token), mask=is_live)
slot = ring_ptr + tl.load(ring_slot_ptr).to(tl.int64) * (2 * RING_ROWS)
tl.store(slot + row, token.to(tl.int32), mask=inside)
tl.store(slot + RING_ROWS + row, finished.to(tl.int32), mask=inside)
"""


def step_prologue(call: Call, target: str) -> TritonKernel:
    """Ids and slots of the step's tokens; see :func:`graphserve.kernels.step.step_prologue`."""
    slots, last_tokens = call.tensor(1, "host_slots"), call.tensor(3, "last_tokens")
    groups, tokens = slots.int_dim(0), slots.shape[1]
    require_shape(call.tensor(0, "host_ids"), "host_ids", "int64", (1, tokens))
    require_shape(slots, "host_slots", "int64", (groups, tokens))
    require_shape(call.tensor(2, "token_lanes"), "token_lanes", "int32", (tokens,))
    require_shape(last_tokens, "last_tokens", "int64", (last_tokens.int_dim(0),))
    require_shape(call.outputs[0], "input_ids", "int64", (1, tokens))
    require_shape(call.outputs[1], "slots", "int64", (groups, tokens))
    if tokens != "T":
        raise Refused(f"host_slots has {tokens} tokens: all T tokens of a step are served")
    text = KernelText(call)
    for index, name in enumerate(("host_ids", "host_slots", "token_lanes", "last_tokens")):
        text.pointer(f"{name}_ptr", index)
    text.output("input_ids_ptr", 0)
    text.output("slots_ptr", 1)
    text.scalar("T")
    text.constants(GROUPS=groups, TOKENS=_TOKENS)
    return text.build(_PROLOGUE, (f"cdiv(T, {_TOKENS})", 1, 1), 4)


def step_epilogue(call: Call, target: str) -> TritonKernel:
    """Last tokens and results of the step's rows; see :func:`graphserve.kernels.step.step_epilogue`."""
    names = (
        "token_ids", "host_ids", "logits_indices", "row_lanes", "stop_ids", "tokens_left", "ring_slot", "last_tokens",
        "ring",
    )  # fmt: skip
    tensors = {name: call.tensor(index, name) for index, name in enumerate(names)}
    stops, ring_rows = tensors["stop_ids"].int_dim(1), tensors["ring"].int_dim(2)
    lanes, slots = tensors["last_tokens"].int_dim(0), tensors["ring"].int_dim(0)
    shapes: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "token_ids": ("int64", ("R",)),
        "host_ids": ("int64", (1, "T")),
        "logits_indices": ("int64", ("R",)),
        "row_lanes": ("int32", ("R",)),
        "stop_ids": ("int32", ("R", stops)),
        "tokens_left": ("int32", ("R",)),
        "ring_slot": ("int32", (1,)),
        "last_tokens": ("int64", (lanes,)),
        "ring": ("int32", (slots, 2, ring_rows)),
    }
    text = KernelText(call)
    for index, name in enumerate(names):
        require_shape(tensors[name], name, *shapes[name])
        text.pointer(f"{name}_ptr", index)
    text.scalar("R")
    text.constants(
        STOPS=stops,
        STOPS_BLOCK=next_power_of_2(stops),
        ROWS=_ROWS,
        DEAD=lanes - 1,
        RING_ROWS=ring_rows,
        STOPPED=STOPPED,
    )
    return text.build(_EPILOGUE, (f"cdiv(R, {_ROWS})", 1, 1), 1)
