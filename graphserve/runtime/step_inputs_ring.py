"""What a step carries to the device, packed: one host buffer for each step in flight, one copy, fixed addresses.

Places depend on the step's size alone, so the launches of a bucket find their inputs at addresses that never change. A
greedy step copies only the fields in front.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from graphserve.plan.runner import StepSize, torch_dtype
from graphserve.plan.schema import Plan
from graphserve.plan.symbols import evaluate
from graphserve.runtime.step_fields import LONG_FIELDS, NUM_SAMPLING_FIELDS, Place, end_of, packed_fields, places
from graphserve.runtime.step_input import LogitsAdjustment, SamplingInput, StepInput
from graphserve.runtime.step_plan import LISTS, StepLimits, Variant, step_inputs

NO_LIMIT = 2**31 - 1

Arrays = dict[str, np.ndarray[Any, Any]]


class StepInputsRing:
    """Host buffers and device inputs of steps.

    Args:
        model: the model's plan.
        limits: sizes of the step's own inputs.
        block_table_len: places of a row of a block table.
        largest: of all steps.
        device: where the inputs are; host buffers are pinned for CUDA.

    Invariant: the device's fields are those of the step written last. A slot's host buffers are not written again
    before the caller says so by using the slot, when the copies of the step before have long ended.
    """

    def __init__(
        self, model: Plan, limits: StepLimits, block_table_len: int, largest: StepSize, device: torch.device
    ) -> None:
        self._limits = limits
        self._num_groups = len(model.cache_groups)
        self._vocab_words = -(-int(model.model["vocab_size"]) // 32)
        self._largest = largest
        self._fields = packed_fields(model, limits, block_table_len)
        self._places: dict[StepSize, dict[str, Place]] = {}
        num_bytes = self._ends(largest)[1]
        pinned = device.type == "cuda"
        self._device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._host_bytes = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in _slots(limits)]
        specs = step_inputs(model, limits)
        self._long: dict[str, torch.Tensor] = {}
        self._host_long: list[dict[str, torch.Tensor]] = [{} for _ in _slots(limits)]
        for name in LONG_FIELDS:
            spec = specs[f"step.{name}"]
            shape = [evaluate(dim, 0, largest.num_rows) for dim in spec.shape]
            dtype = torch_dtype(spec.dtype)
            self._long[f"step.{name}"] = torch.zeros(shape, dtype=dtype, device=device)
            for host in self._host_long:
                host[name] = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        self._arrays: list[dict[StepSize, Arrays]] = [{} for _ in _slots(limits)]

    @property
    def names(self) -> dict[str, torch.Tensor]:
        """Every input by name, as a plan's runner is given them; :meth:`view` cuts a step's part out."""
        return {**dict.fromkeys(self._fields, self._device_bytes), **self._long}

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._device_bytes.numel() + sum(t.numel() * t.element_size() for t in self._long.values())

    def view(self, name: str, tensor: torch.Tensor, size: StepSize) -> torch.Tensor:
        """The part of an input that belongs to a step of this size. Other tensors (state, KV cache) stay whole."""
        if name == "step.bitmask":
            return tensor[: size.num_rows]
        if name not in self._fields:
            return tensor
        return _typed(tensor, self._place(size)[name], self._fields[name].dtype)

    def write(self, step: StepInput, variant: Variant, slot: int) -> None:
        """Pack a step into the slot's buffers and enqueue its copies to the device.

        Raises:
            ValueError: a list is longer than the device's buffers (such a step must be split).
        """
        size = StepSize((len(step.input_ids), len(step.logits_indices), len(step.seq_lens)))
        arrays = self._host_arrays(size, slot)
        _write_step(arrays, step, slot)
        _write_stops(arrays, step.sampling)
        if variant != "greedy":
            _write_sampling(arrays, step.sampling)
            # The host applies the adjustments of a split step.
            self._write_lists(arrays, step.sampling if variant != "split" else SamplingInput(0), slot)
            if variant == "bitmask":
                self._write_bitmask(step.sampling, size.num_rows, slot)
        end = self._ends(size)[0 if variant == "greedy" else 1]
        self._device_bytes[:end].copy_(self._host_bytes[slot][:end], non_blocking=True)

    def _ends(self, size: StepSize) -> tuple[int, int]:
        """Where the fields of a greedy step end, and all fields."""
        names, where = list(self._fields), self._place(size)
        last_common = names[-NUM_SAMPLING_FIELDS - 1]
        return end_of(last_common, self._fields, where), end_of(names[-1], self._fields, where)

    def _place(self, size: StepSize) -> dict[str, Place]:
        if size not in self._places:
            self._places[size] = places(self._fields, size)
        return self._places[size]

    def _host_arrays(self, size: StepSize, slot: int) -> Arrays:
        if size not in self._arrays[slot]:
            assert all(a <= b for a, b in zip(size, self._largest, strict=True)), f"{size} is beyond {self._largest}"
            self._arrays[slot][size] = {
                name: _typed(self._host_bytes[slot], place, self._fields[name].dtype).numpy()
                for name, place in self._place(size).items()
            }
        return self._arrays[slot][size]

    def _write_lists(self, arrays: Arrays, sampling: SamplingInput, slot: int) -> None:
        rows = {adjustment.row: adjustment for adjustment in sampling.adjustments}
        for name, values in LISTS.items():
            starts = arrays[f"step.{name}_starts"]
            parts = [(row, a) for row, a in rows.items() if list_ids(a, name) is not None]
            counts = np.zeros(len(starts), np.int32)
            for row, adjustment in parts:
                counts[row + 1] = len(list_ids(adjustment, name))  # type: ignore[arg-type]
            np.cumsum(counts, out=starts)
            total = int(starts[-1])
            if total == 0:
                continue
            if total > self._limits.max_list_ids:
                raise ValueError(f"{total} {name} ids in one step: the device takes {self._limits.max_list_ids}")
            for key in (f"{name}_ids", values):
                if key is None:
                    continue
                host = self._host_long[slot][key]
                for row, adjustment in parts:
                    host.numpy()[starts[row] : starts[row + 1]] = getattr(adjustment, key)
                self._long[f"step.{key}"][:total].copy_(host[:total], non_blocking=True)

    def _write_bitmask(self, sampling: SamplingInput, num_rows: int, slot: int) -> None:
        host = self._host_long[slot]["bitmask"]
        words = host.numpy()[:num_rows]
        words.fill(-1)
        for adjustment in sampling.adjustments:
            if adjustment.allowed_ids is not None:
                bits = np.zeros(self._vocab_words * 32, np.uint8)
                bits[adjustment.allowed_ids] = 1
                words[adjustment.row] = np.packbits(bits, bitorder="little").view(np.int32)
        self._long["step.bitmask"][:num_rows].copy_(host[:num_rows], non_blocking=True)


def list_ids(adjustment: LogitsAdjustment, name: str) -> np.ndarray[Any, Any] | None:
    """The ids of one of :data:`~graphserve.runtime.step_plan.LISTS` of a row."""
    ids: np.ndarray[Any, Any] | None = getattr(adjustment, f"{name}_ids")
    return ids


def _typed(memory: torch.Tensor, place: Place, dtype: str) -> torch.Tensor:
    offset, shape = place
    kind = torch_dtype(dtype)
    return memory[offset : offset + math.prod(shape) * kind.itemsize].view(kind).view(shape)


def _slots(limits: StepLimits) -> range:
    return range(limits.num_slots)


def _write_step(arrays: Arrays, step: StepInput, slot: int) -> None:
    arrays["step.host_ids"][0] = step.input_ids
    arrays["positions"][0] = step.positions
    arrays["step.token_lanes"][:] = step.token_lanes
    arrays["step.row_lanes"][:] = step.row_lanes
    arrays["step.ring_slot"][0] = slot
    arrays["logits_indices"][:] = step.logits_indices
    arrays["query_start_loc"][:] = step.query_start_loc
    arrays["seq_lens"][:] = step.seq_lens
    for group, (table, slots) in enumerate(zip(step.block_tables, step.slot_mappings, strict=True)):
        arrays["step.host_slots"][group] = slots
        # Places behind a request's blocks are not read.
        arrays[f"block_table.{group}"][:, : table.shape[1]] = table


def _write_stops(arrays: Arrays, sampling: SamplingInput) -> None:
    stop_ids, tokens_left = arrays["step.stop_ids"], arrays["step.tokens_left"]
    stop_ids.fill(-1)
    tokens_left.fill(NO_LIMIT)
    if sampling.stop_ids is not None:
        width = min(stop_ids.shape[1], sampling.stop_ids.shape[1])
        stop_ids[: sampling.num_rows, :width] = sampling.stop_ids[:, :width]
    if sampling.tokens_left is not None:
        tokens_left[: sampling.num_rows] = sampling.tokens_left


def _write_sampling(arrays: Arrays, sampling: SamplingInput) -> None:
    """Parameters of the sampled rows; the rows behind them are greedy."""
    rows = sampling.num_rows
    for name, off in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("log_min_p", -np.inf), ("keys", 0)):
        arrays[f"step.{name}"].fill(off)
    if not sampling.is_greedy:
        assert sampling.temperature is not None and sampling.top_k is not None and sampling.keys is not None
        assert sampling.top_p is not None and sampling.min_p is not None
        arrays["step.temperature"][:rows] = sampling.temperature
        arrays["step.top_k"][:rows] = sampling.top_k
        arrays["step.top_p"][:rows] = sampling.top_p
        arrays["step.log_min_p"][:rows] = torch.from_numpy(sampling.min_p).log().numpy()
        arrays["step.keys"][:rows] = sampling.keys.view(np.int32)
    for name, neutral in (("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0)):
        values = arrays[f"step.{name}"]
        values.fill(neutral)
        for adjustment in sampling.adjustments:
            values[adjustment.row] = getattr(adjustment, name)
