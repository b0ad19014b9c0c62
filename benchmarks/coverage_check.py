"""One architecture of the coverage job: compile a tiny model, run packed requests, compare every logit with HF's.

Three requests of 5, 37 and 90 tokens share each step: prompts in chunks of at most 16 tokens, then 12 decode steps, so
prefill chunks and decodes of different requests mix. Blocks are handed out at random and never in order; some steps
carry padding tokens and padding sequences. The scheduler of the engine takes no part: what is under test is the
compiler, the kernels and the meaning of a step input.
"""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from typing import Literal, Protocol

import msgspec
import numpy as np
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from graphserve.compiler.build import build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.errors import ConfigError, UnsupportedModelError
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from graphserve.plan.schema import CacheSpec, Launch, Plan
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.step_input import SamplingInput, StepInput
from graphserve.runtime.triton_plan import lower_to_triton
from tests.tiny_models import checkpoint_tensors, hf_logits, text_tokens, tiny_config, tiny_model

PROMPT_LENS = (5, 37, 90)
DECODE_STEPS = 12
CHUNK_TOKENS = 16
BLOCK_SIZE = 16
MAX_MODEL_LEN = 128
GPU_TARGET = "cuda:90"
TOLERANCE = 1e-4  # max |ours - hf| / max |hf| over one request
# The same for a request whose neighbour was replaced. Generated C++ must give the same bits. Not so the references:
# another number of rows for an expert is another matrix product, which BLAS sums in another order (2.5e-6 seen); a
# token that leaks gives 1e-2 and more.
ISOLATION_TOLERANCE = {"reference": 1e-5, "cpp": 0.0}

Result = Literal["right", "wrong", "refused", "error", "hf cannot run"]


class CoverageRow(msgspec.Struct):
    """What the job found out about one architecture on one backend."""

    name: str
    backend: str
    result: Result
    reason: str = ""
    traced: bool = False
    guards: list[str] = []  # guards on T beyond T >= 2
    rules: dict[str, str] = {}  # layer type -> attention rule
    matches: dict[str, int] = {}  # pass -> number of rewrites
    launches: dict[str, int] = {}  # launch kind -> number
    max_relative_error: float | None = None  # worst request
    worst_position_error: float | None = None  # worst position, relative to its own largest logit
    isolation_error: float | None = None
    gpu_launches: dict[str, int] = {}  # "dense" and "moe" -> launches of the largest such layer, bfloat16, cuda:90
    gpu_leftovers: dict[str, int] = {}  # op that no kernel covers there -> number
    seconds: float = 0.0
    transformers: str = transformers.__version__
    torch: str = str(torch.__version__)

    @property
    def key(self) -> str:
        return f"{self.name}@{self.backend}"


class Runner(Protocol):
    """The part of `ModelRunner` that the job needs."""

    plan: Plan

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None: ...

    def forward(self, step: StepInput) -> torch.Tensor: ...


class PackedRun:
    """Drives a runner over several requests at once and collects the logits of every position.

    Invariant: a (request, group) pair owns its blocks for the whole run; no block belongs to two owners, and block 0 to
    none.
    """

    def __init__(self, runner: Runner, prompts: list[list[int]], forced: list[list[int]] | None = None) -> None:
        """
        Args:
            forced: the tokens to decode with, `DECODE_STEPS` per request; greedy choice when None.
        """
        self._runner = runner
        self._random = random.Random(0)
        self.tokens = [list(prompt) for prompt in prompts]
        self._prompt_lens = [len(prompt) for prompt in prompts]
        self._forced = forced
        self._computed = [0] * len(prompts)
        self._logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        blocks_each = -(-MAX_MODEL_LEN // BLOCK_SIZE)
        num_groups = len(runner.plan.cache_groups)
        num_blocks = 1 + blocks_each * len(prompts) * num_groups
        ids = self._random.sample(range(1, num_blocks), num_blocks - 1)
        self._blocks = np.array(ids, dtype=np.int32).reshape(num_groups, len(prompts), blocks_each)
        runner.allocate_kv_cache(num_blocks, BLOCK_SIZE)

    def run(self) -> list[torch.Tensor]:
        """Logits per request, `[prompt + DECODE_STEPS, vocab]`."""
        while requests := self._unfinished():
            self._random.shuffle(requests)
            self._step(requests, padding_tokens=self._random.choice((0, 3)), padding_seqs=self._random.choice((0, 2)))
        return [torch.cat(rows) for rows in self._logits]

    def decoded(self) -> list[list[int]]:
        return [tokens[length:] for tokens, length in zip(self.tokens, self._prompt_lens, strict=True)]

    def _unfinished(self) -> list[int]:
        return [r for r, length in enumerate(self._prompt_lens) if self._computed[r] < length + DECODE_STEPS]

    def _step(self, requests: list[int], padding_tokens: int, padding_seqs: int) -> None:
        lens = [self._query_len(r) for r in requests]
        spans = [range(self._computed[r], self._computed[r] + n) for r, n in zip(requests, lens, strict=True)]
        num_tokens = sum(lens)
        padding_tokens = max(padding_tokens, 2 - num_tokens)  # plans hold for two tokens and more
        padding = [0] * padding_tokens
        starts = np.cumsum([0, *lens, *[0] * padding_seqs])
        step = make_step_input(
            input_ids=[self.tokens[r][p] for r, span in zip(requests, spans, strict=True) for p in span] + padding,
            positions=[p for span in spans for p in span] + padding,
            query_start_loc=starts.tolist(),
            seq_lens=[span.stop for span in spans] + [0] * padding_seqs,
            block_tables=[self._block_table(group, requests, padding_seqs) for group in range(len(self._blocks))],
            slot_mappings=[self._slots(group, requests, spans) + padding for group in range(len(self._blocks))],
            logits_indices=list(range(num_tokens)),
        )
        rows = self._runner.forward(step).detach().float().cpu().clone()
        assert rows.shape[0] == num_tokens, f"{rows.shape[0]} rows of logits for {num_tokens} indices"
        for request, part in zip(requests, rows.split(lens), strict=True):
            self._logits[request].append(part)
            self._advance(request, part)

    def _query_len(self, request: int) -> int:
        return max(1, min(CHUNK_TOKENS, self._prompt_lens[request] - self._computed[request]))

    def _advance(self, request: int, rows: torch.Tensor) -> None:
        self._computed[request] += len(rows)
        num_decoded = self._computed[request] - self._prompt_lens[request]
        if 0 <= num_decoded < DECODE_STEPS:
            choice = int(rows[-1].argmax())
            self.tokens[request].append(self._forced[request][num_decoded] if self._forced else choice)

    def _block_table(self, group: int, requests: list[int], padding_seqs: int) -> np.ndarray:
        table = self._blocks[group, requests]
        return np.concatenate([table, np.zeros((padding_seqs, table.shape[1]), dtype=np.int32)])

    def _slots(self, group: int, requests: list[int], spans: list[range]) -> list[int]:
        return [
            int(self._blocks[group, r, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
            for r, span in zip(requests, spans, strict=True)
            for p in span
        ]


def make_step_input(
    input_ids: list[int],
    positions: list[int],
    query_start_loc: list[int],
    seq_lens: list[int],
    block_tables: list[np.ndarray],
    slot_mappings: list[list[int]],
    logits_indices: list[int],
) -> StepInput:
    """A step input with the arrays the model reads; shapes as `StepInput` describes them."""
    return StepInput(
        input_ids=np.array(input_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        query_start_loc=np.array(query_start_loc, dtype=np.int32),
        seq_lens=np.array(seq_lens, dtype=np.int32),
        block_tables=[np.ascontiguousarray(table, dtype=np.int32) for table in block_tables],
        slot_mappings=[np.array(slots, dtype=np.int64) for slots in slot_mappings],
        logits_indices=np.array(logits_indices, dtype=np.int64),
        token_lanes=np.zeros(len(input_ids), dtype=np.int32),
        row_lanes=np.zeros(len(logits_indices), dtype=np.int32),
        sampling=SamplingInput(num_rows=0),
        num_tokens=query_start_loc[-1],
        num_sequences=sum(length > 0 for length in seq_lens),
        num_logits_rows=len(logits_indices),
    )


def check_architecture(name: str, backend: str = "reference") -> CoverageRow:
    """Compile the tiny model of `name` (see `tests.tiny_models.tiny_config`) and compare it with HF's.

    Args:
        backend: "reference" (plain-torch launches) or "cpp" (compiled CPU launches).

    Never raises for a fault of the model or the compiler: that is the row's result and reason.
    """
    start = time.perf_counter()
    row = CoverageRow(name=name, backend=backend, result="error")
    try:
        model = _runnable_hf_model(name)
    except Exception as e:  # noqa: BLE001 - whatever a class of transformers raises: the row says so
        row.result, row.reason = "hf cannot run", _one_line(e)
    else:
        try:
            _check_against(row, model)
        except (UnsupportedModelError, ConfigError) as e:
            row.result, row.reason = "refused", " ".join(str(e).split())
            row.guards = list(getattr(e, "guards", ()))
        except Exception as e:  # noqa: BLE001 - a bug of ours: the row names it and the job goes on
            row.result, row.reason = "error", f"{_one_line(e)} [{_location(e)}]"
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _runnable_hf_model(name: str) -> nn.Module:
    model = tiny_model(tiny_config(name))
    tokens = text_tokens(max(PROMPT_LENS), seed=99)
    logits = hf_logits(model, tokens)
    if not torch.isfinite(logits).all():
        raise ValueError("the tiny model's own logits are not finite")
    earlier = hf_logits(model, [*tokens[:-1], tokens[0]])[:-1]
    if relative_error(earlier, logits[:-1]) > TOLERANCE:
        raise ValueError("not causal in transformers itself: a later token changes earlier logits")
    return model


def _check_against(row: CoverageRow, model: nn.Module) -> None:
    config = tiny_config(row.name)
    register_interfaces()
    meta = build_meta_model(config, torch.float32)
    bake_rope(meta, MAX_MODEL_LEN)
    phases: list[str] = []
    try:
        built = build_plan(meta, MAX_MODEL_LEN, non_persistent_buffers(meta), progress=phases.append)
    finally:
        row.traced = "prove" in phases  # the phase after capture
    plan = built.plan
    describe_plan(row, plan, config)
    describe_gpu_plan(row)
    parameters = checkpoint_tensors(model)
    prompts = [text_tokens(length, seed=i) for i, length in enumerate(PROMPT_LENS)]

    runner = ModelRunner(plan, parameters, built.constants, backend=row.backend)
    first = PackedRun(runner, prompts)
    ours = first.run()
    row.launches = dict(Counter(launch.kind for launch in runner.executed_plan.launches))
    truth = [hf_logits(model, tokens) for tokens in first.tokens]
    row.max_relative_error = max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))
    row.worst_position_error = max(worst_position_error(a, b) for a, b in zip(ours, truth, strict=True))

    changed = [prompts[0], text_tokens(PROMPT_LENS[1], seed=1000), prompts[2]]
    second = PackedRun(
        ModelRunner(plan, parameters, built.constants, backend=row.backend), changed, forced=first.decoded()
    )
    others = second.run()
    row.isolation_error = max(relative_error(others[i], ours[i]) for i in (0, 2))
    row.result, row.reason = judge(row.max_relative_error, row.isolation_error, row.backend)


def judge(max_relative_error: float, isolation_error: float, backend: str = "reference") -> tuple[Result, str]:
    """Right when both errors keep within their tolerances (a nan never does), else wrong and why."""
    if not max_relative_error <= TOLERANCE:
        return "wrong", f"logits differ from transformers by {max_relative_error:.2g} (allowed {TOLERANCE:g})"
    allowed = ISOLATION_TOLERANCE[backend]
    if not isolation_error <= allowed:
        return "wrong", f"another request changed the logits by {isolation_error:.2g} (allowed {allowed:g})"
    return "right", ""


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """max |ours - truth| / max |truth|; both `[T, vocab]`; nan when either has one."""
    assert ours.shape == truth.shape, f"{tuple(ours.shape)} against {tuple(truth.shape)}"
    return float((ours - truth).abs().max() / truth.abs().max())


def worst_position_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest over positions of max |ours - truth| / max |truth|, each over one position's logits."""
    return float(((ours - truth).abs().amax(-1) / truth.abs().amax(-1)).max())


def describe_plan(row: CoverageRow, plan: Plan, config: PretrainedConfig) -> None:
    """Fills the columns that describe how the model was compiled."""
    matches: Counter[str] = Counter()
    for report in plan.passes:
        matches[report["name"]] += report["matches"]
    row.matches = dict(matches)
    row.launches = dict(Counter(launch.kind for launch in plan.launches))
    attention = [launch for launch in plan.launches if launch.op.startswith("gs.paged_attention")]
    layer_types = getattr(config.get_text_config(), "layer_types", None) or []
    rules: dict[str, list[str]] = {}
    for i, (launch, spec) in enumerate(zip(attention, plan.cache_layers, strict=True)):
        layer_type = layer_types[i] if len(layer_types) == len(attention) else "attention"
        rules.setdefault(layer_type, []).append(describe_rule(launch, spec))
    row.rules = {layer_type: " | ".join(dict.fromkeys(found)) for layer_type, found in rules.items()}


def describe_gpu_plan(row: CoverageRow) -> None:
    """Fills the columns on GPU launches, from the plan in the dtype that models are served in."""
    meta = build_meta_model(tiny_config(row.name), torch.bfloat16)
    bake_rope(meta, MAX_MODEL_LEN)
    plan = build_plan(meta, MAX_MODEL_LEN, non_persistent_buffers(meta)).plan
    lowered = lower_to_triton(plan, KVCache(plan, 2, BLOCK_SIZE, torch.device("meta")), GPU_TARGET)
    moe_layers = {launch.layer for launch in plan.launches if launch.op == "gs.moe.default"}
    for layer, count in lowered.launches_per_layer().items():
        kind = "moe" if layer in moe_layers else "dense"
        row.gpu_launches[kind] = max(row.gpu_launches.get(kind, 0), count)
    row.gpu_leftovers = dict(Counter(plan.launches[index].op for index in lowered.refusals))


def describe_rule(launch: Launch, spec: CacheSpec) -> str:
    """What a `gs.paged_attention` launch says of itself, such as "causal, window 8, sinks, 2x16"."""
    sinks, _, _, window, chunk, softcap, causal = launch.args[6:13]
    parts = ["causal" if causal else "bidirectional"]
    parts += [f"{word} {size:g}" for word, size in (("window", window), ("chunk", chunk), ("softcap", softcap)) if size]
    parts += ["sinks"] if sinks is not None else []
    parts.append(f"{spec.kv_heads}x{spec.k_dim}" + (f"/{spec.v_dim}" if spec.v_dim != spec.k_dim else ""))
    parts += [f"KV of layer {spec.shared_with}"] if spec.shared_with is not None else []
    return ", ".join(parts)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def _location(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "graphserve" in frame.filename] or frames
    return f"{ours[-1].filename.rsplit('graphserve/', 1)[-1]}:{ours[-1].lineno}"
