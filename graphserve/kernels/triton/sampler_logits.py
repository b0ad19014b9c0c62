"""``process_logits``: one program a block of tokens applies everything that changes logits before the threshold.

A program owns its block, so lists of token ids need no atomics: it reads a row's whole list and changes the ids that
lie in its block, one list after the other. A list that the launch does not have leaves no code behind.
"""

from __future__ import annotations

import textwrap

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.sampling_rules import GROUP
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, require_float
from graphserve.kernels.triton.sampler_text import Vocabulary, require_shape

_LIST_TOKENS = 256  # of a list that are looked at in one step
_NUM_WARPS = 8

_HEAD = """
row = tl.program_id(0).to(tl.int64)
first = tl.program_id(1) * BLOCK
column = first + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
inside = column < V
logits = logits_ptr + row * ROW_STRIDE
scores = scores_ptr + row * V
x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
"""
_BITMASK = """
words = bitmask_ptr + row * WORDS
word = tl.load(words + column // 32, mask=inside, other=0)
x = tl.where(((word >> (column % 32)) & 1) != 0, x, -float("inf"))
"""
# Scores hold the block's values while lists change them in memory, where any thread can reach any token. Most rows have
# no list: theirs stay in registers.
_SPILL = """
tl.store(scores + column, x, mask=inside)
"""
_RELOAD = """
tl.debug_barrier()
x = tl.load(scores + column, mask=inside, other=-float("inf"))
"""
_LIST = """
tl.debug_barrier()
start = tl.load({name}_starts_ptr + row)
end = tl.load({name}_starts_ptr + row + 1)
for at in range(start, end, LIST):
    place = at + tl.arange(0, LIST)
    token = tl.load({name}_ids_ptr + place, mask=place < end, other=-1)
    mine = (token >= first) & (token < first + BLOCK) & (token < V)
{change}
    tl.store(scores + token, value, mask=mine)
"""
_OLD = "    old = tl.load(scores + token, mask=mine, other=0.0)\n"
_CHANGES = {
    "allowed": "    value = tl.load(logits + token, mask=mine, other=0.0).to(tl.float32)",
    "banned": '    value = tl.full([LIST], -float("inf"), tl.float32)',
    "bias": _OLD + "    value = old + tl.load(bias_values_ptr + place, mask=mine, other=0.0)",
    "seen": (
        "    penalty = tl.load(repetition_penalty_ptr + row)\n"
        + _OLD
        + "    value = tl.where(old > 0, tl.div_rn(old, penalty + tl.zeros([LIST], tl.float32)), old * penalty)"
    ),
    "output": (
        "    count = tl.load(output_counts_ptr + place, mask=mine, other=0.0)\n"
        "    subtracted = tl.load(frequency_penalty_ptr + row) * count + tl.load(presence_penalty_ptr + row)\n"
        + _OLD
        + "    value = old - subtracted"
    ),
}
_ALLOWED_BITMASK = """
    allowed_word = tl.load(words + token // 32, mask=mine, other=0)
    value = tl.where(((allowed_word >> (token % 32)) & 1) != 0, value, -float("inf"))"""
_RESTRICT = """
is_restricted = tl.load(allowed_starts_ptr + row + 1) > tl.load(allowed_starts_ptr + row)
x = tl.where(is_restricted, -float("inf"), x)
"""
_TEMPERATURE = """
temperature = tl.load(temperature_ptr + row)
x = tl.div_rn(x, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(x))
"""
_TAIL = """
tl.store(scores + column, x, mask=inside)
has_nan = tl.max((x != x).to(tl.int32), axis=1)
largest = tl.where(has_nan > 0, float("nan"), tl.max(x, axis=1))
group = first // GROUP + tl.arange(0, BLOCK // GROUP)
tl.store(group_max_ptr + row * GROUPS + group, largest, mask=group < GROUPS)
"""

# List → (its arguments in op order with their dtypes, those of one value a row after them).
_LISTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "allowed": (("allowed_starts", "allowed_ids"), ()),
    "banned": (("banned_starts", "banned_ids"), ()),
    "bias": (("bias_starts", "bias_ids", "bias_values"), ()),
    "seen": (("seen_starts", "seen_ids"), ("repetition_penalty",)),
    "output": (("output_starts", "output_ids", "output_counts"), ("frequency_penalty", "presence_penalty")),
}
_INT_SUFFIXES = ("_starts", "_ids")


def process_logits(call: Call, target: str) -> TritonKernel:
    """Adjust logits and divide them by the temperature; see :func:`graphserve.kernels.sampling.process_logits`."""
    logits = call.tensor(0, "logits")
    require_float(("logits", logits))
    text = KernelText(call)
    vocabulary = Vocabulary(text, logits, "logits")
    rows = vocabulary.num_rows
    text.constants(GROUP=GROUP, GROUPS=vocabulary.num_groups)
    text.pointer("logits_ptr", 0)
    temperature, bitmask = call.optional(1), call.optional(2)
    if temperature is not None:
        require_shape(temperature, "temperature", "float32", (rows,))
        text.pointer("temperature_ptr", 1)
    lines = [_HEAD]
    if bitmask is not None:
        num_words = -(-vocabulary.size // 32)
        require_shape(bitmask, "bitmask", "int32", (rows, num_words))
        text.constants(WORDS=num_words)
        text.pointer("bitmask_ptr", 2)
        lines.append(_BITMASK)
    changes = _lists(call, text, rows, bitmask is not None)
    if changes:
        text.constants(LIST=_LIST_TOKENS)
        restrict = [_RESTRICT] if "allowed" in changes else []
        lengths = [f"(tl.load({n}_starts_ptr + row + 1) > tl.load({n}_starts_ptr + row))" for n in changes]
        lines.append(f"if {' | '.join(lengths)}:")
        lines.append(textwrap.indent("".join([*restrict, _SPILL, *changes.values(), _RELOAD]), "    "))
    if temperature is not None:
        lines.append(_TEMPERATURE)
    require_shape(call.outputs[0], "scores", "float32", (rows, vocabulary.size))
    require_shape(call.outputs[1], "group_max", "float32", (rows, vocabulary.num_groups))
    text.output("scores_ptr", 0)
    text.output("group_max_ptr", 1)
    return text.build("".join([*lines, _TAIL]), (rows, vocabulary.num_blocks, 1), _NUM_WARPS)


def _lists(call: Call, text: KernelText, rows: int | str, has_bitmask: bool) -> dict[str, str]:
    """Add the pointers of the lists that the launch has; statements of each by name."""
    statements = {}
    index = 3
    for name, (entries, values) in _LISTS.items():
        if call.optional(index) is not None:
            for offset, argument in enumerate((*entries, *values)):
                spec = call.tensor(index + offset, argument)
                dtype = "int32" if argument.endswith(_INT_SUFFIXES) else "float32"
                starts = (rows + 1,) if isinstance(rows, int) else (f"{rows}+1",)
                shape = starts if argument.endswith("_starts") else (rows,) if argument in values else spec.shape
                require_shape(spec, argument, dtype, shape)
                text.pointer(f"{argument}_ptr", index + offset)
            change = _CHANGES[name] + (_ALLOWED_BITMASK if name == "allowed" and has_bitmask else "")
            statements[name] = _LIST.format(name=name, change=change)
        index += len(entries) + len(values)
    return statements
