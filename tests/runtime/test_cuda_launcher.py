"""The launcher against a stand-in for the driver that reads each launch from memory as C does."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

triton = pytest.importorskip("triton")

from graphserve.errors import DeviceError  # noqa: E402
from graphserve.kernels.arg_spec import ArgSpec  # noqa: E402
from graphserve.kernels.triton import TritonArgument, TritonKernel, generate  # noqa: E402
from graphserve.kernels.triton.compile import compile_for  # noqa: E402
from graphserve.runtime.cubin import KernelParameter, kernel_parameters  # noqa: E402
from graphserve.runtime.cuda_driver import (  # noqa: E402
    CudaDriver,
    LaunchAttribute,
    LaunchConfig,
    MemoryAccess,
    MemoryProperties,
)
from graphserve.runtime.cuda_launcher import ArgumentBuffer, CudaLauncher  # noqa: E402
from tests.runtime.stub_cuda import StubCuda, parameter_table  # noqa: E402

MIXED = TritonKernel(
    symbol="mixed",
    key="mixed-sizes-1",
    source="""import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "R"])
def mixed(x_ptr, T, y_ptr, R, out_ptr):
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    x = tl.load(x_ptr + i, mask=i < T, other=0.0)
    tl.store(out_ptr + i, x + tl.load(y_ptr + i % R), mask=i < T)
""",
    arguments=(
        TritonArgument("x_ptr", "*fp32", 0),
        TritonArgument("T", "i32", "T"),
        TritonArgument("y_ptr", "*fp32", 1),
        TritonArgument("R", "i32", "R"),
        TritonArgument("out_ptr", "*fp32", 2),
    ),
    constexprs={},
    grid=("cdiv(T, 128)", 1, "R"),
    num_warps=2,
)
ADDRESSES = [0x7F00_0000_0000, 0x7F00_0010_0000, 0x7F00_0020_0010]
STEP = {"T": 1000, "R": 7}


@pytest.fixture(scope="module")
def compiled():
    return compile_for(MIXED, "cuda:90")


@pytest.fixture
def stub(compiled):
    return StubCuda({compiled.name: compiled.binary})


def test_the_stub_declares_what_cuda_h_declares(tmp_path):
    compiler = shutil.which("cc")
    header = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h"
    if compiler is None or not header.is_file():
        pytest.skip("needs a C compiler and the cuda.h of Triton's wheel")
    names = ["gridDimX", "gridDimZ", "blockDimX", "blockDimZ", "sharedMemBytes", "hStream", "attrs", "numAttrs"]
    ours = ["grid_x", "grid_z", "block_x", "block_z", "shared_bytes", "stream", "attributes", "num_attributes"]
    prints = "".join(f'printf("%zu ", offsetof(CUlaunchConfig, {name}));' for name in names)
    source = tmp_path / "layout.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <cuda.h>\nint main(void) {{ {prints}"
        'printf("%zu %zu %zu %zu %d %d %d %d ", sizeof(CUmemAllocationProp), offsetof(CUmemAllocationProp, location),'
        " offsetof(CUmemAllocationProp, allocFlags), sizeof(CUmemAccessDesc), CU_MEM_ALLOCATION_TYPE_PINNED,"
        " CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CU_MEM_ALLOC_GRANULARITY_MINIMUM);"
        'printf("%zu %zu %zu %d %d", sizeof(CUlaunchConfig), sizeof(CUlaunchAttribute), offsetof(CUlaunchAttribute,'
        " value), CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,"
        " CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES); }"
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-I", header.parent, source, "-o", program], check=True)
    numbers = [int(n) for n in subprocess.run([program], check=True, capture_output=True).stdout.split()]
    assert numbers[: len(names)] == [getattr(LaunchConfig, name).offset for name in ours]
    sizes = [ctypes.sizeof(LaunchConfig), ctypes.sizeof(LaunchAttribute), LaunchAttribute.value.offset]
    places = [MemoryProperties.location.offset, MemoryProperties.compression_type.offset]
    memory = [ctypes.sizeof(MemoryProperties), *places, ctypes.sizeof(MemoryAccess), 1, 1, 3, 0]
    assert numbers[len(names) :] == [*memory, *sizes, 6, 8]


def test_parameters_are_those_that_cuobjdump_prints(compiled):
    ours = kernel_parameters(compiled.binary, compiled.name)
    assert [[p.offset, p.size] for p in ours] == parameter_table(compiled.binary)
    assert [(p.offset, p.size) for p in ours[:5]] == [(0, 8), (8, 4), (16, 8), (24, 4), (32, 8)]


def test_a_launch_has_every_argument_in_its_place(stub, compiled):
    driver = CudaDriver(stub)
    driver.use_device(0)
    launcher = CudaLauncher(driver, MIXED, compiled)
    launch = launcher.prepare(ADDRESSES, STEP, stream=0x55AA)
    assert not stub.launches
    launch()
    table = parameter_table(compiled.binary)
    [made] = stub.launches
    assert made == {
        "kernel": "mixed",
        "grid": (8, 1, 7),
        "block": (64, 1, 1),
        "shared": compiled.shared_bytes,
        "stream": 0x55AA,
        "attributes": [],
        "values": [ADDRESSES[0], 1000, ADDRESSES[1], 7, ADDRESSES[2]] + [0] * (len(table) - 5),
        "offsets": [offset for offset, _ in table],
        "extra": None,
    }


def test_a_generated_kernel_is_launched_with_its_tensors(stub):
    x, weight = ArgSpec("float32", ("T", 96)), ArgSpec("float32", (96,))
    attrs = {"eps": 1e-5, "offset": 0.0, "weight_fp32": False}
    kernel = generate("rms_norm", attrs, [x, weight], [x], "cuda:90")
    built = compile_for(kernel, "cuda:90")
    stub.cubins[built.name] = built.binary
    launch = CudaLauncher(CudaDriver(stub), kernel, built).prepare(ADDRESSES, {"T": 33, "R": 1, "S": 1})
    launch()
    launch()
    assert len(stub.launches) == 2 and stub.launches[0] == stub.launches[1]
    assert stub.launches[0]["values"][:3] == ADDRESSES and stub.launches[0]["values"][3] == 33


def test_launching_is_one_call_of_the_driver(stub, compiled):
    launch = CudaLauncher(CudaDriver(stub), MIXED, compiled).prepare(ADDRESSES, STEP)
    before = len(stub.calls)
    launch()
    assert [name for name, *_ in stub.calls[before:]] == ["cuLaunchKernelEx"]


def test_prepared_launches_do_not_share_their_arguments(stub, compiled):
    launcher = CudaLauncher(CudaDriver(stub), MIXED, compiled)
    small = launcher.prepare(ADDRESSES, {"T": 5, "R": 1})
    large = launcher.prepare(ADDRESSES[::-1], {"T": 500, "R": 2})
    small()
    large()
    large.set_stream(9)
    large()
    assert [made["values"][1] for made in stub.launches] == [5, 500, 500]
    assert [made["values"][0] for made in stub.launches] == [ADDRESSES[0], ADDRESSES[2], ADDRESSES[2]]
    assert [made["stream"] for made in stub.launches] == [0, 0, 9]


def test_overlap_is_programmatic_stream_serialization(stub, compiled):
    CudaLauncher(CudaDriver(stub), MIXED, compiled).prepare(ADDRESSES, STEP, overlap=True)()
    assert stub.launches[0]["attributes"] == [(6, 1)]


def test_shared_memory_above_48_kib_is_asked_for(stub, compiled):
    driver = CudaDriver(stub)
    CudaLauncher(driver, MIXED, msgspec.structs.replace(compiled, shared_bytes=48 * 1024))
    assert not any(name == "cuFuncSetAttribute" for name, *_ in stub.calls)
    large = msgspec.structs.replace(compiled, shared_bytes=100_000)
    CudaLauncher(driver, MIXED, large).prepare(ADDRESSES, STEP)()
    [(_, _, attribute, size)] = [call for call in stub.calls if call[0] == "cuFuncSetAttribute"]
    assert (attribute, size) == (8, 100_000) and stub.launches[0]["shared"] == 100_000
    stub.fail["cuFuncSetAttribute"] = 1
    with pytest.raises(DeviceError, match="mixed with 100000 bytes of dynamic shared memory: CUDA_ERROR_INVALID_VALUE"):
        CudaLauncher(driver, MIXED, large)


def test_an_empty_grid_launches_nothing(stub, compiled):
    CudaLauncher(CudaDriver(stub), MIXED, compiled).prepare(ADDRESSES, {"T": 0, "R": 1})()
    assert not stub.launches


def test_a_failed_launch_names_kernel_and_error(stub, compiled):
    launch = CudaLauncher(CudaDriver(stub), MIXED, compiled).prepare(ADDRESSES, STEP)
    stub.fail["cuLaunchKernelEx"] = 1
    message = r"cuLaunchKernelEx failed for mixed: CUDA_ERROR_INVALID_VALUE \(1\): invalid argument"
    with pytest.raises(DeviceError, match=message):
        launch()
    stub.fail["cuLaunchKernelEx"] = 12345
    with pytest.raises(DeviceError, match=r"unknown error \(12345\)"):
        launch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": [ADDRESSES[0], None, ADDRESSES[2]]}, "mixed: argument y_ptr has no memory"),
        ({"tensors": [ADDRESSES[0] + 8, *ADDRESSES[1:]]}, "argument x_ptr is at 0x7f0000000008: .* multiple of 16"),
        ({"scalars": {"T": 4}}, "argument R is the step scalar R; given: T"),
        ({"scalars": {"T": 2**31, "R": 1}}, "argument T is 2147483648: step scalars"),
        ({"scalars": {"T": 128, "R": 70_000}}, "mixed: grid .*70000.* is not within"),
    ],
)
def test_wrong_arguments_are_refused_before_the_launch(stub, compiled, change, message):
    launcher = CudaLauncher(CudaDriver(stub), MIXED, compiled)
    with pytest.raises(DeviceError, match=message):
        launcher.prepare(**{"tensors": ADDRESSES, "scalars": STEP, **change})


def test_a_binary_of_another_kernel_is_refused(stub, compiled):
    fewer = msgspec.structs.replace(MIXED, arguments=MIXED.arguments[1:])
    with pytest.raises(DeviceError, match="takes .*: the binary belongs to another version of the kernel"):
        CudaLauncher(CudaDriver(stub), fewer, compiled)
    with pytest.raises(DeviceError, match="needs a cuda target"):
        CudaLauncher(CudaDriver(stub), MIXED, msgspec.structs.replace(compiled, target="hip:gfx942"))


def test_arguments_of_the_wrong_size_are_refused():
    table = [KernelParameter(0, 0, 8), KernelParameter(1, 8, 8)]
    with pytest.raises(DeviceError, match=r"arguments of \[8, 4\] bytes, its binary takes \[8, 8\]"):
        ArgumentBuffer("k", MIXED.arguments[:2], table)


def test_a_damaged_binary_is_refused(compiled):
    for damaged in (b"", b"not an object file" * 10, compiled.binary[: len(compiled.binary) // 2]):
        with pytest.raises(DeviceError, match="cubin"):
            kernel_parameters(damaged, compiled.name)
    with pytest.raises(DeviceError, match="its kernels are mixed"):
        kernel_parameters(compiled.binary, "another")


def test_a_missing_driver_says_what_to_do(monkeypatch):
    monkeypatch.setattr("graphserve.runtime.cuda_driver.LIBRARY", "libcuda-absent.so.1")
    with pytest.raises(DeviceError, match="install the GPU's driver"):
        CudaDriver()


def test_a_driver_without_a_function_is_named(stub):
    class Old:
        def __getattr__(self, name):
            if name == "cuLaunchKernelEx":
                raise AttributeError(name)
            return getattr(stub, name)

    with pytest.raises(DeviceError, match="has no cuLaunchKernelEx: update it"):
        CudaDriver(Old())


@pytest.mark.full
@pytest.mark.parametrize("target", ["cuda:80", "cuda:100"])
def test_every_cuda_target_has_a_parameter_table(target):
    built = compile_for(MIXED, target)
    ours = kernel_parameters(built.binary, built.name)
    assert [[p.offset, p.size] for p in ours] == parameter_table(built.binary)
