"""Generated C++ kernels for the CPU: generate source, compile it once into a store, call it by pointer.

kernel = generate("gs.rms_norm", {"eps": 1e-5, ...}, [x_spec, weight_spec], [out_spec], isa_level())
library = build([kernel], store_dir)
sequence = CompiledSequence(library, [(library.function_pointer(kernel.symbol), pointers)])
sequence.run(num_tokens=1, num_rows=1, num_sequences=1, num_threads=2)
"""

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.cpu.build import (
    Library,
    build,
    compile_missing,
    load_stored,
    stored_libraries,
)
from graphserve.kernels.cpu.compiler import compiler
from graphserve.kernels.cpu.generate import generate
from graphserve.kernels.cpu.isa import ISA_LEVELS, available_levels, isa_level
from graphserve.kernels.cpu.kernel import CppKernel
from graphserve.kernels.cpu.packing import pack_linear_weight, pack_moe_weights, unpack_linear_weight
from graphserve.kernels.cpu.sequence import CompiledSequence

__all__ = [
    "ISA_LEVELS",
    "ArgSpec",
    "CompiledSequence",
    "CppKernel",
    "Library",
    "Refusal",
    "available_levels",
    "build",
    "compiler",
    "generate",
    "isa_level",
    "compile_missing",
    "load_stored",
    "stored_libraries",
    "pack_linear_weight",
    "pack_moe_weights",
    "unpack_linear_weight",
]
