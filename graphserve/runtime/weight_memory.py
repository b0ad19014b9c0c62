"""A model's weights on their device, which can be given back and taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from graphserve.errors import ConfigError
from graphserve.plan.runner import torch_dtype
from graphserve.plan.schema import Plan, WeightSpec
from graphserve.runtime.virtual_memory import arena_on, padded_bytes
from graphserve.runtime.weights import kept_weights, materialize_weights

Parameters = Iterable[tuple[str, torch.Tensor]]
ParameterSource = Parameters | Mapping[str, torch.Tensor] | Callable[[], Parameters]
HOST_COPY, NO_COPY = 1, 2  # levels of sleep: what is kept of the weights


class WeightMemory:
    """Weights by name, and where they are while the model sleeps.

    On CUDA they lie in virtual memory: they come back to the addresses that captured graphs hold. On a CPU level 1 has
    nothing to do, since the weights are in host memory as it is, and level 2 makes new tensors.

    Args:
        parameters: (name, tensor) of the model's parameters: a dict or a stream, read once, or a function that gives
            a stream each time it is called, which level 2 needs.
        constants: values of the plan's constant weights.

    Attributes:
        tensors: name → tensor. Whoever packs weights for its kernels may replace some.
        num_bytes: of all weights.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: ParameterSource,
        constants: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._constants = dict(constants)
        self._device = device
        self._read: Callable[[], Parameters] | None = None
        if callable(parameters):
            self._read, stream = parameters, parameters()
        else:
            stream = parameters.items() if isinstance(parameters, Mapping) else parameters
        kept = kept_weights(plan)
        self._arena = arena_on(device, sum(padded_bytes(_num_bytes(weight)) for weight in kept.values()))
        self._places: dict[str, torch.Tensor] = {}
        if self._arena is not None:
            self._places = {
                name: self._arena.allocate([int(d) for d in weight.spec.shape], torch_dtype(weight.spec.dtype))
                for name, weight in kept.items()
            }
        self._host: torch.Tensor | None = None
        self._level = 0
        self.tensors = self._materialize(stream)
        self.num_bytes = sum(w.numel() * w.element_size() for w in self.tensors.values())

    def _materialize(self, stream: Parameters) -> dict[str, torch.Tensor]:
        tensors = materialize_weights(self._plan, stream, self._constants, self._device, self._places)
        if self._arena is not None:
            self._arena.synchronize()  # steps run on another stream, which does not wait for this one
        return tensors

    def sleep(self, level: int) -> None:
        """Give the device's memory back. No step may be on its way, nor come before :meth:`wake_up`.

        Args:
            level: 1 keeps a copy in the host's memory, 2 reads the checkpoint again when the model wakes up.

        Raises:
            ConfigError: level 2, and the parameters cannot be read again.
        """
        if level == NO_COPY and self._read is None:
            raise ConfigError("sleep(level=2) needs parameters that can be read again: use level=1")
        if self._arena is not None:
            if level == HOST_COPY:
                self._arena.synchronize()
                pinned = torch.cuda.is_available()  # copied at the full speed of the bus
                self._host = torch.empty(self._arena.bytes.shape, dtype=torch.uint8, pin_memory=pinned)
                self._host.copy_(self._arena.bytes)
            self._arena.unmap()
        elif level == NO_COPY:
            self.tensors.clear()
        self._level = level

    def wake_up(self) -> None:
        """Take memory again, with the weights in it.

        Raises:
            DeviceError: the device has not that much free memory; the model sleeps on.
            CheckpointError: level 2, and the checkpoint cannot be read any more.
        """
        if self._arena is not None and not self._arena.is_mapped:
            self._arena.map()
        if self._arena is not None and self._host is not None:
            self._arena.bytes.copy_(self._host)
            self._arena.synchronize()
            self._host = None
        elif self._level == NO_COPY:
            assert self._read is not None
            # Into the same dict, and on CUDA into the same tensors: others hold them.
            self.tensors.update(self._materialize(self._read()))
        self._level = 0

    def close(self) -> None:
        """Free all weights, though others may hold tensors; those must not be used any more."""
        self.tensors.clear()
        self._places.clear()
        self._host = None
        if self._arena is not None:
            self._arena.close()


def _num_bytes(weight: WeightSpec) -> int:
    count = torch_dtype(weight.spec.dtype).itemsize
    for dim in weight.spec.shape:
        count *= int(dim)
    return count
