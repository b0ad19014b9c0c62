"""``torch.compile(module, backend="graphserve")``: our passes and kernels for any module, inference only.

    import torch

    module = torch.compile(MyModule().eval(), backend="graphserve")
    with torch.inference_mode():
        y = module(x)

The name is found through the entry point group ``torch_dynamo_backends`` of the installed distribution. From a source
tree that is not installed, pass the function itself: ``backend=graphserve_backend``.

Dynamo gives one graph for each piece of Python between graph breaks; each becomes a plan. With one varying size the
plan holds for all its values. With several, one plan is made for each combination seen, as ``dynamic=False`` would.
What no pass lifts and no generator covers runs as the ATen call it is. A graph that no plan can say (it writes into its
arguments, its results share memory, autocast is on, ...) runs as Dynamo's own eager graph, and a warning says why.
A graph whose results need gradients is refused: it would run without any fused part, which nobody asks for.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphserve.compiler.build_module import build_module_plan
from graphserve.errors import UnsupportedModelError
from graphserve.runtime.module_runner import ModuleRunner

logger = logging.getLogger(__name__)

# Plans of one graph with several varying sizes; each holds its own buffers.
MAX_SHAPES = 16

Call = Callable[..., Any]


def graphserve_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Call:
    """The backend, as ``torch.compile`` calls it.

    Args:
        gm: Dynamo's graph.
        example_inputs: real tensors and sizes, one for each placeholder.

    Returns:
        A function of the graph's flat arguments that gives its flat results. It raises :class:`UnsupportedModelError`
        if a result requires gradients.
    """
    if _needs_gradients(gm):
        return _refuse_training
    reason = _why_eager(example_inputs)
    if reason is not None:
        return _eager(gm, reason)
    return CompiledGraph(gm, example_inputs)


class CompiledGraph:
    """One graph of Dynamo's, compiled.

    Attributes:
        runners: by the sizes of the arguments, the empty tuple if one serves all; None where the graph runs eagerly.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._is_fixed = [_is_fixed(value) for value in example_inputs]
        self._device = next(v.device for v in example_inputs if isinstance(v, torch.Tensor))
        self.runners: OrderedDict[tuple[Any, ...], ModuleRunner | None] = OrderedDict()
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else (v,))]
        runner, reason = self._compile(values)
        self._is_one_plan = runner is not None or not any(isinstance(s, torch.SymInt) for s in sizes)
        if self._is_one_plan:
            self.runners[()] = runner
        else:
            logger.info("one plan for each combination of sizes: %s", reason)
        if self._is_one_plan and runner is None:
            _warn_eager(reason)

    def __call__(self, *arguments: Any) -> Any:
        key: tuple[Any, ...] = ()
        if not self._is_one_plan:
            key = tuple(_sizes_of(a) for a, is_fixed in zip(arguments, self._is_fixed, strict=True) if not is_fixed)
        if key not in self.runners:
            self.runners[key] = self._compile_for(arguments)
            if len(self.runners) > MAX_SHAPES:
                self.runners.popitem(last=False)
        self.runners.move_to_end(key)
        runner = self.runners[key]
        return self._gm(*arguments) if runner is None else runner(arguments)

    def _compile_for(self, arguments: Sequence[Any]) -> ModuleRunner | None:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        values = [mode.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a for a in arguments]
        runner, reason = self._compile(values)
        if runner is None:
            _warn_eager(reason)
        return runner

    def _compile(self, values: Sequence[Any]) -> tuple[ModuleRunner | None, str]:
        """The runner for arguments like ``values``, or None and why there is none."""
        try:
            with torch.inference_mode(False):
                runner = ModuleRunner(build_module_plan(self._gm, values), self._is_fixed, self._device)
        except Exception as error:  # isolation boundary: a graph that does not compile runs eagerly, with the reason
            logger.debug("graph not compiled", exc_info=True)
            return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]  # a compiler may say pages
        counts = runner.launch_kinds()
        logger.info(
            "compiled a graph of %d operations: %d generated kernels, %d library calls, %d eager calls",
            sum(n.op.startswith("call_") for n in self._gm.graph.nodes),
            counts["cpp"] + counts["triton"],
            counts["library"],
            counts["reference"],
        )
        return runner, ""


def _needs_gradients(gm: fx.GraphModule) -> bool:
    results = fx.node.map_arg(gm.graph.output_node().args, lambda n: n.meta.get("example_value"))
    return any(isinstance(r, torch.Tensor) and r.requires_grad for r in torch.utils._pytree.tree_leaves(results))


def _refuse_training(*arguments: Any) -> Any:
    raise UnsupportedModelError(
        "backend 'graphserve' compiles for inference only, and a result of this module requires gradients: call it "
        "under torch.inference_mode() or torch.no_grad(), or use another backend for training"
    )


def _why_eager(example_inputs: Sequence[Any]) -> str | None:
    """What about the arguments or the surroundings no plan can say."""
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    if not tensors:
        return "it has no tensor arguments"
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return f"an argument is a {type(tensor).__name__} of layout {tensor.layout}"
        if tensor.device != tensors[0].device:
            return f"its arguments are on {tensors[0].device} and {tensor.device}"
    if torch.is_autocast_enabled(tensors[0].device.type):
        return "autocast is on, which chooses dtypes while the module runs"
    if tensors[0].device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {tensors[0].device.type}"
    return None


def _eager(gm: fx.GraphModule, reason: str) -> Call:
    _warn_eager(reason)
    return gm.forward


def _warn_eager(reason: str) -> None:
    logger.warning("a graph given to backend 'graphserve' runs eagerly: %s", reason)


def _is_fixed(value: Any) -> bool:
    """Whether an argument is a parameter or buffer, as Dynamo marks them."""
    return isinstance(value, torch.nn.Parameter) or hasattr(value, "_dynamo_static_input_type")


def _sizes_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value
