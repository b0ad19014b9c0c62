"""The model on a device: weights, KV cache and the plan's runner behind one ``forward``."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from graphserve.artifacts import ArtifactStore, open_store
from graphserve.errors import CompileError, ConfigError
from graphserve.kernels import register_all
from graphserve.kernels.cpu import Library, build, load_stored
from graphserve.plan.runner import PlanRunner, StepSize
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.background_build import BackgroundBuild
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.cpp_backend import CppBackend, KernelPlan, build_library, lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.step_input import StepInput
from graphserve.runtime.weight_memory import NO_COPY, ParameterSource, WeightMemory

if TYPE_CHECKING:
    from graphserve.runtime.triton_backend import TritonBackend

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "cpp"]


class ModelRunner:
    """Computes logits of a step.

    Args:
        plan: the compiled model.
        parameters: (name, tensor) of the model's parameters: a dict or a stream that is read once, or a function that
            gives such a stream each time it is called.
        constants: the plan's constants (``BuildResult.constants``).
        backend: ``reference`` runs every launch as plain torch; ``cpp`` uses generated C++ where there is a kernel;
            ``auto`` is ``cpp`` if the kernels are stored or can be built, else ``reference`` with a warning.
        store: where compiled kernels are kept; the user's cache by default.
        deterministic: a row's logits must not depend on the other rows of its step, bit for bit.
        is_tiered: missing C++ kernels are built in the background, while plain torch runs; the first step after that
            runs on them. Stored ones are used whatever compiler made them.
        choices: how decode steps run fastest, where that was measured.

    ``close`` gives all memory back; the runner is then unusable.

    Raises:
        ConfigError: ``deterministic`` with plain torch launches, which do not keep that.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: ParameterSource,
        constants: dict[str, torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
        store: ArtifactStore | None = None,
        deterministic: bool = False,
        is_tiered: bool = False,
        choices: MeasuredChoices | None = None,
    ) -> None:
        if deterministic and (is_tiered or backend == "reference"):
            raise ConfigError(
                "deterministic=True with the reference backend or a tiered start: plain torch may add up in another "
                "order for another number of rows. Use backend='auto' or 'cpp' and start='full', or deterministic=False"
            )
        register_all()
        self.plan = plan
        self.device = torch.device(device)
        self.weight_memory = WeightMemory(plan, parameters, constants or {}, self.device)
        self.weight_bytes = self.weight_memory.num_bytes
        self.kv_cache: KVCache | None = None
        self.choices = choices or MeasuredChoices()
        self._weights = self.weight_memory.tensors
        self._slept_pool: tuple[int, int] | None = None  # blocks and block size of a sleeping model's KV cache
        self._store = store if store is not None else open_store()
        self._backend = backend
        self._is_tiered = is_tiered
        self._background: BackgroundBuild[Library] | None = None
        self._deterministic = deterministic
        self._is_cpp = backend != "reference" and self.device.type == "cpu"
        self._is_triton = backend != "reference" and self.device.type == "cuda"
        self._kernel_plan: KernelPlan | None = None  # what `_cpp` runs, or will once `_background` has built it
        self._cpp: CppBackend | None = None
        self._triton: TritonBackend | None = None
        self._block_table_len = 0
        self._inputs: dict[str, torch.Tensor] = {}
        self._runner = PlanRunner(plan, self._weights, self._inputs, _view_input, self.device)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The plan's weights by name, as long as no KV cache was allocated: kernels may then keep packed ones only."""
        return self._weights

    @property
    def executed_plan(self) -> Plan:
        """The plan as it runs: each launch of the kind that this device, compiler and pool gave it."""
        return self._runner.plan

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the KV pool. May be called again: the old pool and its contents are dropped."""
        self._drop_kv_cache()
        with phase("allocate KV cache"):
            self.kv_cache = KVCache(self.plan, num_blocks, block_size, self.device)
        for layer, (keys, values) in enumerate(self.kv_cache.layers):
            self._inputs[f"kv_k.{layer}"] = keys
            self._inputs[f"kv_v.{layer}"] = values
        # A table may be longer than the pool: behind a sliding window its places hold the null block.
        self._block_table_len = -(-self.plan.model["max_model_len"] // block_size)
        if self._is_cpp:
            self._use_cpp()
        elif self._is_triton:
            self._use_triton()

    def use_choices(self, choices: MeasuredChoices) -> None:
        """Run decode steps so from now on."""
        self.choices = choices
        if self._cpp is not None:
            self._cpp.choices = choices
        self._runner.invalidate()

    def _drop_kv_cache(self) -> None:
        self.kv_cache = None
        for name in [n for n in self._inputs if n.startswith(("kv_", "block_table."))]:
            del self._inputs[name]
        self._runner.invalidate()

    def sleep(self, level: int) -> None:
        """Give memory back until :meth:`wake_up`: the KV pool, whose contents are lost, and weights.

        Args:
            level: 1 keeps the weights in the host's memory, 2 reads them again when the model wakes up.

        Raises:
            ConfigError: there is no KV pool, or level 2 and the parameters cannot be read again.
        """
        if self.kv_cache is None:
            raise ConfigError("sleep needs a model that is awake and has a KV pool")
        self.weight_memory.sleep(level)
        self._slept_pool = self.kv_cache.num_blocks, self.kv_cache.block_size
        if self.kv_cache.can_unmap:
            self.kv_cache.unmap()
            return
        self._drop_kv_cache()
        if level == NO_COPY and self._cpp is not None:
            self._cpp = None  # with the packed weights
            self._runner.set_plan(self.plan, {})

    def wake_up(self) -> None:
        """Take memory again. Nothing happens if the model is awake.

        Raises:
            DeviceError: the device has not that much free memory; the model sleeps on.
            CheckpointError: level 2, and the checkpoint cannot be read any more; the model sleeps on.
        """
        if self._slept_pool is None:
            return
        self.weight_memory.wake_up()
        if self.kv_cache is not None:
            self.kv_cache.map()
        else:
            self.allocate_kv_cache(*self._slept_pool)
        self._slept_pool = None

    def _use_cpp(self) -> None:
        """Switch launches to generated C++ for the pool's block size, now or when it is built."""
        assert self.kv_cache is not None
        with phase("generate C++ kernels"):
            kernel_plan = lower_to_cpp(self.plan, self.kv_cache, deterministic=self._deterministic)
        if self._background is not None:
            assert self._kernel_plan is not None
            if kernel_plan.kernels == self._kernel_plan.kernels:
                return  # the model woke up: the same kernels are being built already
            self._stop_background()
        self._kernel_plan = kernel_plan
        try:
            library = self._begin_tiered() if self._is_tiered else build_library(kernel_plan, self._store)
        except CompileError as error:
            # Once weights are packed for kernels, plain torch could not read them; nor does it sum in a fixed order.
            if self._backend != "auto" or self._cpp is not None or self._deterministic:
                raise
            logger.warning("plain torch runs instead of generated C++, which is slower: %s", error)
            self._is_cpp = False
            return
        if library is not None:
            self._run_on(library)

    def _begin_tiered(self) -> Library | None:
        """The compiled kernels if they can be had at once; else None, and they are built from now on."""
        assert self._kernel_plan is not None
        kernels = self._kernel_plan.distinct_kernels()
        with phase("find C++ kernels") as work:
            library = load_stored(kernels, self._store)
            if not library.misses:
                return library
            if self._cpp is None and not self._store.is_strict:
                self._background = BackgroundBuild(partial(build, kernels, self._store, any_compiler=True))
                missing, total = len(library.misses), len(library.misses) + len(library.paths)
                work.note = f"{missing} of {total} libraries are built in the background; {library.reasons}"
                logger.info(work.note)
                return None
        return build_library(self._kernel_plan, self._store)

    def _run_on(self, library: Library) -> None:
        """Run launches on compiled kernels from now on."""
        assert self._kernel_plan is not None
        if self._cpp is None:
            # Bound launches hold the plain weights, all of which would stay in memory beside the packed ones.
            self._runner.invalidate()
            self._cpp = CppBackend(self._kernel_plan, self._weights, library)
        else:
            self._cpp.replace_kernels(self._kernel_plan, library)
        self._cpp.table_lens = [self._block_table_len] * len(self.plan.cache_groups)
        self._cpp.choices = self.choices
        self._runner.set_plan(self._kernel_plan.plan, {"cpp": self._cpp})

    def _change_over(self) -> None:
        """Between two steps: if the kernels of a tiered start are built, run on them from now on. Compiles nothing."""
        if self._background is None or not self._background.is_done:
            return
        background, self._background = self._background, None
        if background.result is None:
            self._is_cpp = False
            logger.warning(
                "plain torch goes on running instead of generated C++, which is slower: %s", background.error
            )
        else:
            self._run_on(background.result)
            logger.info("generated C++ runs from now on instead of plain torch")

    def _stop_background(self) -> None:
        if self._background is not None:
            self._background.stop()
            self._background = None

    def _use_triton(self) -> None:
        """Switch launches to generated Triton kernels, compiled for this device."""
        from graphserve.kernels.triton.compiled import find_or_compile_kernels
        from graphserve.runtime.cuda_driver import CudaDriver
        from graphserve.runtime.triton_backend import TritonBackend, target_of
        from graphserve.runtime.triton_plan import lower_to_triton

        assert self.kv_cache is not None
        if self._triton is not None:
            self._triton.close()
        target = target_of(torch.cuda.get_device_capability(self.device))
        lowered = lower_to_triton(self.plan, self.kv_cache, target, self._deterministic)
        kernels = lowered.distinct_kernels()
        with phase("compile Triton kernels", total=len(kernels), unit="kernels") as work:
            compiled = find_or_compile_kernels(kernels, target, self._store, lambda done, total: work.advance())
        driver = CudaDriver()
        driver.use_device(self.device.index or 0)
        self._triton = TritonBackend(lowered, compiled, driver, self.device)
        self._triton.table_lens = [self._block_table_len] * len(self.plan.cache_groups)
        self._runner.set_plan(lowered.plan, {"triton": self._triton, "library": self._triton})

    def reserve(self, max_tokens: int, max_rows: int, max_seqs: int) -> None:
        """Make room for the largest step, so that nothing moves later."""
        with phase("allocate buffers"):
            self._grow_inputs(StepSize((max_tokens, max_rows, max_seqs)))
            self._runner.reserve(max_tokens, max_rows)

    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [R, vocab] of a step, in the model's dtype; a view that the next call overwrites.

        Raises:
            ConfigError: no KV cache was allocated, or the model sleeps.
        """
        if self._slept_pool is not None:
            raise ConfigError("forward of a sleeping model: call wake_up first")
        if self.kv_cache is None:
            raise ConfigError("forward before allocate_kv_cache: the model has nowhere to keep keys and values")
        self._change_over()
        size = StepSize((len(step.input_ids), len(step.logits_indices), len(step.seq_lens)))
        if self._is_triton and size.num_tokens == size.num_seqs:
            assert (step.query_start_loc[1:] - step.query_start_loc[:-1]).max() <= 1, "no decode step, but T equals S"
        self._grow_inputs(size)
        self._write_inputs(step)
        (logits,) = self._runner.run(size)
        return logits.view(-1, logits.shape[-1])

    def close(self) -> None:
        """Free weights, KV cache and buffers."""
        self._stop_background()
        self.kv_cache = None
        self._cpp = None
        if self._triton is not None:
            self._triton.close()
            self._triton = None
        self._runner.release()
        self.weight_memory.close()

    def _grow_inputs(self, size: StepSize) -> None:
        tokens, rows, seqs = size
        groups = range(len(self.plan.cache_groups))
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_ids": ((1, tokens), torch.int64),
            "positions": ((1, tokens), torch.int64),
            "logits_indices": ((rows,), torch.int64),
            "query_start_loc": ((seqs + 1,), torch.int32),
            "seq_lens": ((seqs,), torch.int32),
            **{f"slot_mapping.{g}": ((tokens,), torch.int64) for g in groups},
            **{f"block_table.{g}": ((seqs, self._block_table_len), torch.int32) for g in groups},
        }
        for name, (shape, dtype) in wanted.items():
            old = self._inputs.get(name)
            if old is None or any(a < b for a, b in zip(old.shape, shape, strict=True)):
                grown = shape if old is None else tuple(max(a, b) for a, b in zip(old.shape, shape, strict=True))
                self._inputs[name] = torch.zeros(grown, dtype=dtype, device=self.device)
                self._runner.invalidate()

    def _write_inputs(self, step: StepInput) -> None:
        inputs = self._inputs
        tokens, seqs = len(step.input_ids), len(step.seq_lens)
        inputs["input_ids"][0, :tokens].copy_(torch.from_numpy(step.input_ids))
        inputs["positions"][0, :tokens].copy_(torch.from_numpy(step.positions))
        inputs["logits_indices"][: len(step.logits_indices)].copy_(torch.from_numpy(step.logits_indices))
        inputs["query_start_loc"][: seqs + 1].copy_(torch.from_numpy(step.query_start_loc))
        inputs["seq_lens"][:seqs].copy_(torch.from_numpy(step.seq_lens))
        for g, (table, slots) in enumerate(zip(step.block_tables, step.slot_mappings, strict=True)):
            inputs[f"slot_mapping.{g}"][:tokens].copy_(torch.from_numpy(slots))
            inputs[f"block_table.{g}"][:seqs, : table.shape[1]].copy_(torch.from_numpy(table))


def _view_input(name: str, tensor: torch.Tensor, size: StepSize) -> torch.Tensor:
    """The part of an input that belongs to a step of this size."""
    if name in ("input_ids", "positions"):
        return tensor[:, : size.num_tokens]
    if name == "logits_indices":
        return tensor[: size.num_rows]
    if name == "query_start_loc":
        return tensor[: size.num_seqs + 1]
    if name == "seq_lens" or name.startswith("block_table."):
        return tensor[: size.num_seqs]
    if name.startswith("slot_mapping."):
        return tensor[: size.num_tokens]
    return tensor
