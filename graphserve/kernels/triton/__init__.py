"""Generated Triton kernels for GPUs: text first, compiled for a target with no GPU present.

kernel = generate("gs.rms_norm", {"eps": 1e-5, ...}, [x_spec, weight_spec], [out_spec], "cuda:90")
compiled = compile_for(kernel, "cuda:90")  # from graphserve.kernels.triton.compile, which imports triton
"""

from graphserve.kernels.triton.generate import generate
from graphserve.kernels.triton.grid import evaluate, grid_size
from graphserve.kernels.triton.kernel import TARGETS, TritonArgument, TritonKernel

__all__ = ["TARGETS", "TritonArgument", "TritonKernel", "evaluate", "generate", "grid_size"]
