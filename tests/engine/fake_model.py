"""A model that is simple enough to know its answer, and sees its past only through the KV cache.

The "keys and values" of a token are its id and position, written to the slot that the step names and read back through
the block table. The logits are a hash of all that a query can see in every cache group, so a wrong slot, block, chunk,
window, row or a block given to two owners changes the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from engine.fake_stream import FakeStream

from graphserve.engine import model_executor
from graphserve.engine.engine_core import EngineCore
from graphserve.engine.request import EngineCoreRequest
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.plan.schema import CacheGroup, CacheSpec, Plan
from graphserve.runtime.sampler import Sampler
from graphserve.runtime.step_input import SamplingInput, StepInput, sampling_keys
from graphserve.sampling_params import SamplingParams

VOCAB = 48
FULL = CacheGroup((0,))
WINDOWED = CacheGroup((0,), window=7)
CHUNKED = CacheGroup((0,), chunk=10)
GROUP_SETS = ((FULL,), (WINDOWED,), (CHUNKED,), (FULL, WINDOWED), (CHUNKED, FULL, WINDOWED))


def visible_from(group: CacheGroup, position: int) -> int:
    """The first position that a query at ``position`` sees."""
    sees = [j for j in range(position + 1) if group.window is None or position - j < group.window]
    return next(j for j in sees if group.chunk is None or j // group.chunk == position // group.chunk)


def logits_of(groups: Sequence[CacheGroup], token_ids: Sequence[int], vocab: int = VOCAB) -> torch.Tensor:
    """The model itself, [vocab] float32: a hash of what the last position of ``token_ids`` sees in each group."""
    position = len(token_ids) - 1
    seen = [[(token_ids[j], j) for j in range(visible_from(g, position), position + 1)] for g in groups]
    return _logits(seen, vocab)


def _logits(seen: list[list[tuple[int, int]]], vocab: int) -> torch.Tensor:
    words = [np.array([len(group), *sum(group, ())], np.uint64) for group in seen]
    mixed = np.concatenate(words)
    weights = np.arange(1, len(mixed) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    seed = int(np.bitwise_xor.reduce((mixed + np.uint64(1)) * (weights | np.uint64(1))))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * 2)


def fake_plan(groups: Sequence[CacheGroup], vocab: int = VOCAB) -> Plan:
    layer = CacheSpec(kv_heads=1, k_dim=1, v_dim=1, dtype="float32")
    return Plan(
        model={"vocab_size": vocab},
        launches=[],
        init=[],
        buffers={},
        weights={},
        cache_layers=[layer],
        cache_groups=list(groups),
        outputs=("logits",),
        passes=[],
    )


class FakeRunner:
    """Stands where a model runner stands. ``fail_at_step`` makes that step raise; ``nan_after`` spoils the logits of
    every row whose last token is that id."""

    def __init__(
        self,
        groups: Sequence[CacheGroup] = (FULL,),
        vocab: int = VOCAB,
        fail_at_step: int | None = None,
        nan_after: int | None = None,
    ) -> None:
        self.plan = fake_plan(groups, vocab)
        self.device = torch.device("cpu")
        self.vocab = vocab
        self.is_closed = False
        self.allows_ended_lanes = False  # a device sends the tokens of a lane that has ended to the null block
        self.largest = (2**31, 2**31, 2**31)
        self.num_steps = 0
        self.steps: list[tuple[int, int, int]] = []
        self._fail_at_step = fail_at_step
        self._nan_after = nan_after
        self._pool = np.zeros((0, 0, 2), np.int64)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        # One pool for all groups, as in the real cache: a block with two owners is overwritten.
        self._pool = np.full((num_blocks, block_size, 2), -1, np.int64)

    def reserve(self, max_tokens: int, max_rows: int, max_seqs: int) -> None:
        self.largest = (max_tokens, max_rows, max_seqs)

    def close(self) -> None:
        self.is_closed = True
        self._pool = np.zeros((0, 0, 2), np.int64)

    def forward(self, step: StepInput) -> torch.Tensor:
        self.num_steps += 1
        assert self.num_steps != self._fail_at_step, "the fake model was told to fail here"
        sizes = (len(step.input_ids), len(step.logits_indices), len(step.seq_lens))
        assert all(size <= bound for size, bound in zip(sizes, self.largest, strict=True)), "more than was reserved"
        assert len(step.logits_indices) >= 1
        self.steps.append(sizes)
        block_size = self._pool.shape[1]
        flat = self._pool.reshape(-1, 2)
        for slots in step.slot_mappings:
            assert (slots[step.num_tokens :] < block_size).all(), "padding writes outside the null block"
            is_null = slots[: step.num_tokens] < block_size
            assert not is_null.any() or self.allows_ended_lanes, "a token writes to the null block"
            flat[slots] = np.stack([step.input_ids, step.positions], 1)
        sequence_of = np.searchsorted(step.query_start_loc, np.arange(len(step.input_ids)), side="right") - 1
        logits = torch.zeros(len(step.logits_indices), self.vocab)
        for row, token in enumerate(step.logits_indices[: step.num_logits_rows]):
            logits[row] = self._row(step, int(sequence_of[token]), int(token))
        return logits

    def _row(self, step: StepInput, sequence: int, token: int) -> torch.Tensor:
        position = int(step.positions[token])
        last = step.query_start_loc[sequence + 1] - 1
        assert step.seq_lens[sequence] == step.positions[last] + 1, "context length and positions disagree"
        if step.slot_mappings[0][token] < self._pool.shape[1]:
            return torch.zeros(self.vocab)  # of a lane that has ended: dropped by whoever asked for it
        seen = []
        for group, table in zip(self.plan.cache_groups, step.block_tables, strict=True):
            places = np.arange(visible_from(group, position), position + 1)
            blocks = table[sequence, places // self._pool.shape[1]]
            assert (blocks > 0).all(), "a visible block is null"
            entries = self._pool[blocks, places % self._pool.shape[1]]
            seen.append([(int(i), int(p)) for i, p in entries])
        if int(step.input_ids[token]) == self._nan_after:
            return torch.full((self.vocab,), torch.nan)
        return _logits(seen, self.vocab)


def generate_alone(
    groups: Sequence[CacheGroup],
    prompt: Sequence[int],
    params: SamplingParams,
    seed: int = 0,
    eos: Sequence[int] = (),
    vocab: int = VOCAB,
) -> list[int]:
    """What a request must give: computed from the model's definition, with no engine, cache or batch."""
    tokens = list(prompt)
    sampler = Sampler()
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        sampling = SamplingInput(1)
        if not params.is_greedy:
            sampling = SamplingInput(
                1,
                is_greedy=False,
                temperature=np.array([params.temperature], np.float32),
                top_k=np.array([params.top_k]),
                top_p=np.array([params.top_p], np.float32),
                min_p=np.array([params.min_p], np.float32),
                keys=sampling_keys([seed], [len(tokens)]),
            )
        tokens.append(sampler(logits_of(groups, tokens, vocab)[None], sampling).token_ids[0])
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def make_core(
    groups: Sequence[CacheGroup] = (FULL,),
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    prompt_rows: int = 16,
    pad_steps: bool = True,
    enable_chunked_prefill: bool = True,
    **runner_options: int | None,
) -> tuple[EngineCore, FakeRunner]:
    runner = FakeRunner(groups, **runner_options)  # type: ignore[arg-type]
    limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, max_num_seqs + prompt_rows, enable_chunked_prefill)
    executor = model_executor.ModelExecutor(runner)
    core = EngineCore(executor, limits, num_blocks, block_size, pad_steps)
    if isinstance(executor, FakeStream):
        executor.watch(core.scheduler)
    return core, runner


def core_request(
    request_id: str, prompt: Sequence[int], params: SamplingParams, seed: int = 0, eos: Sequence[int] = ()
) -> EngineCoreRequest:
    assert params.max_tokens is not None
    return EngineCoreRequest(request_id, list(prompt), params, params.max_tokens, seed, list(eos))
