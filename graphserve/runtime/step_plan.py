"""The whole decode step as one plan: prologue, the model's launches, logits processing, sampling and epilogue.

One plan a variant, so that a step that needs less runs less:

* ``greedy``: every row takes its argmax.
* ``sample``: temperatures, top-k, top-p, min-p, banned ids, biases and penalties.
* ``logprobs``: and log-probabilities of the sampled and the most likely tokens.
* ``bitmask``: and a mask of allowed tokens.
* ``split``: stops after the logits, so that the host may change them, and goes on from there.

Values that are not the model's begin with ``step.``; no name of the model has a dot.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from graphserve.kernels.sampling_rules import GROUP
from graphserve.plan.schema import Dim, Launch, Plan, TensorSpec

Variant = Literal["greedy", "sample", "logprobs", "bitmask", "split"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

# Lists of token ids that process_logits takes: name → the values that stand beside the ids.
LISTS: dict[str, str | None] = {"banned": None, "bias": "bias_values", "seen": None, "output": "output_counts"}


class StepLimits(msgspec.Struct, frozen=True):
    """Sizes that are the same in every step.

    Attributes:
        num_lanes: lanes of running requests; the dead lane comes after them.
        max_rows: logits rows of the largest step.
        num_slots: steps whose results may wait for the host.
        max_stop_ids: stop ids of a row that the device looks for; the host looks for all.
        max_list_ids: ids in all rows of one list; a step with more is split.
        max_logprobs: most likely tokens that are reported; a step that wants more is split.
    """

    num_lanes: int
    max_rows: int
    num_slots: int = 2
    max_stop_ids: int = 8
    max_list_ids: int = 1 << 16
    max_logprobs: int = 20


class StepPlan(msgspec.Struct, frozen=True):
    """A variant's plan.

    Attributes:
        plan: its ``outputs`` are the ids, log-probabilities and ranks of ``gs.top_logprobs``; of ``split`` the logits,
            and the fp32 copy that the host may change; else none.
        pause_before: index of the first launch (views not counted) after the host's turn, None if it has no turn.
    """

    variant: Variant
    plan: Plan
    pause_before: int | None = None


def step_inputs(model: Plan, limits: StepLimits) -> dict[str, TensorSpec]:
    """Inputs and state of a step beside those of the model, by name; the same for every variant."""
    words = -(-_vocab_size(model) // 32)
    rows: dict[str, tuple[tuple[Dim, ...], str]] = {
        "host_ids": ((1, "T"), "int64"),
        "host_slots": ((len(model.cache_groups), "T"), "int64"),
        "token_lanes": (("T",), "int32"),
        "row_lanes": (("R",), "int32"),
        "stop_ids": (("R", limits.max_stop_ids), "int32"),
        "tokens_left": (("R",), "int32"),
        "ring_slot": ((1,), "int32"),
        "last_tokens": ((limits.num_lanes + 1,), "int64"),
        "ring": ((limits.num_slots, 2, limits.max_rows), "int32"),
        "temperature": (("R",), "float32"),
        "top_k": (("R",), "int64"),
        "top_p": (("R",), "float32"),
        "log_min_p": (("R",), "float32"),
        "keys": (("R", 2), "int32"),
        "repetition_penalty": (("R",), "float32"),
        "frequency_penalty": (("R",), "float32"),
        "presence_penalty": (("R",), "float32"),
        "bitmask": (("R", words), "int32"),
    }
    for name, values in LISTS.items():
        rows[f"{name}_starts"] = (("R+1",), "int32")
        rows[f"{name}_ids"] = ((limits.max_list_ids,), "int32")
        if values is not None:
            rows[values] = ((limits.max_list_ids,), "float32")
    return {f"step.{name}": TensorSpec(shape, dtype) for name, (shape, dtype) in rows.items()}


def step_plan(model: Plan, variant: Variant, limits: StepLimits) -> StepPlan:
    """Wrap a model's plan into a step's.

    Args:
        model: a language model's plan as it was compiled: no launch is lowered yet.
    """
    given = step_inputs(model, limits)
    step = _Writer(model)
    step.launch(
        "step_prologue",
        [_value("step.host_ids"), _value("step.host_slots"), _value("step.token_lanes"), _value("step.last_tokens")],
        {
            "input_ids": TensorSpec((1, "T"), "int64"),
            "step.slots": TensorSpec((len(model.cache_groups), "T"), "int64"),
        },
    )
    for group in range(len(model.cache_groups)):
        step.view("aten.select.int", ({"v": "step.slots"}, 0, group), f"slot_mapping.{group}")
    step.launches += model.launches
    vocab = step.vocab
    step.view("aten.view.default", ({"v": model.outputs[0]}, [{"s": "R"}, vocab]), "step.logits")

    outputs: tuple[str, ...] = ()
    pause_before = None
    if variant == "greedy":
        step.launch("greedy_tokens", [_value("step.logits")], {"step.tokens": TensorSpec(("R",), "int64")})
    elif variant == "split":
        _process(step, "step.logits", [None] * 17, "copy")
        pause_before = step.num_launches
        _process(step, "step.copy", [_value("step.temperature"), *[None] * 16], "scores")
        _sample(step)
        outputs = ("step.logits", "step.copy")
    else:
        mask = _value("step.bitmask") if variant == "bitmask" else None
        _process(step, "step.logits", [_value("step.temperature"), mask, None, None, *_list_arguments()], "scores")
        _sample(step)
    if variant in ("logprobs", "bitmask"):
        count = min(limits.max_logprobs, vocab)
        results = {
            "step.logprob_ids": TensorSpec(("R", 1 + count), "int64"),
            "step.logprobs": TensorSpec(("R", 1 + count), "float32"),
            "step.ranks": TensorSpec(("R",), "int64"),
        }
        step.launch("top_logprobs", [_value("step.logits"), _value("step.tokens"), count], results)
        outputs = tuple(results)
    epilogue = ["tokens", "host_ids", "", "row_lanes", "stop_ids", "tokens_left", "ring_slot", "last_tokens", "ring"]
    step.launch("step_epilogue", [_value(f"step.{name}" if name else "logits_indices") for name in epilogue], {})
    plan = msgspec.structs.replace(
        model, launches=step.launches, buffers=step.buffers, outputs=outputs, inputs={**model.inputs, **given}
    )
    return StepPlan(variant, plan, pause_before)


class _Writer:
    """Launches and buffers of a plan that is being written."""

    def __init__(self, model: Plan) -> None:
        self.launches: list[Launch] = []
        self.buffers = dict(model.buffers)
        self.vocab = _vocab_size(model)

    @property
    def num_launches(self) -> int:
        return sum(launch.kind != "view" for launch in self.launches)

    def launch(self, op: str, args: list[Any], results: dict[str, TensorSpec]) -> None:
        self.launches.append(Launch(f"gs.{op}.default", tuple(args), {}, tuple(results), sources=("step",)))
        self.buffers |= results

    def view(self, op: str, args: tuple[Any, ...], name: str) -> None:
        self.launches.append(Launch(op, args, {}, (name,), "view", sources=("step",)))


def _process(step: _Writer, logits: str, arguments: list[Any], result: str) -> None:
    results = {
        f"step.{result}": TensorSpec(("R", step.vocab), "float32"),
        f"step.{result}_group_max": TensorSpec(("R", -(-step.vocab // GROUP)), "float32"),
    }
    step.launch("process_logits", [_value(logits), *arguments], results)


def _sample(step: _Writer) -> None:
    """``step.tokens`` from ``step.scores``."""
    limits = [_value(f"step.{name}") for name in ("top_k", "top_p", "log_min_p")]
    rows = TensorSpec(("R",), "float32")
    scores = [_value("step.scores"), _value("step.scores_group_max")]
    step.launch("sampling_cut", [*scores, *limits], {"step.row_max": rows, "step.cut": rows})
    drawn = [_value(f"step.{name}") for name in ("row_max", "cut", "temperature", "keys")]
    step.launch("sample_tokens", [*scores, *drawn], {"step.tokens": TensorSpec(("R",), "int64")})


def _list_arguments() -> list[Any]:
    """Arguments of ``process_logits`` from the banned ids on."""
    names = ["banned_starts", "banned_ids", "bias_starts", "bias_ids", "bias_values", "seen_starts", "seen_ids"]
    names += ["repetition_penalty", "output_starts", "output_ids", "output_counts"]
    names += ["frequency_penalty", "presence_penalty"]
    return [_value(f"step.{name}") for name in names]


def _value(name: str) -> dict[str, str]:
    return {"v": name}


def _vocab_size(model: Plan) -> int:
    return int(model.model["vocab_size"])
