"""A stand-in for ``libcuda``: reads every launch as C would, from raw memory, and records it.

It shares no declaration with the code under test: structures are unpacked by the offsets of ``cuda.h``, and parameters
are read where NVIDIA's own ``cuobjdump`` says that the kernel has them.
"""

import ctypes
import re
import struct
import subprocess
import tempfile
from ctypes import CFUNCTYPE, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

import triton

ERRORS = {
    1: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    2: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    500: (b"CUDA_ERROR_NOT_FOUND", b"named symbol not found"),
}
_PARAMETER = re.compile(r"Ordinal : (0x[0-9a-f]+)\s+Offset  : (0x[0-9a-f]+)\s+Size    : (0x[0-9a-f]+)")


def parameter_table(cubin):
    """(offset, size) of each parameter, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-elf", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [place for _, *place in sorted([int(n, 16) for n in row] for row in _PARAMETER.findall(text))]


class StubCuda:
    """Attributes are the driver's functions. ``calls`` holds (name, arguments), ``launches`` the decoded launches.

    ``fail`` maps a function's name to the CUresult that it returns. ``graphs`` maps a graph's handle to its nodes: the
    name of a kernel that was captured by its function (``str``) or by its library kernel (``bytes``), or an int, the
    type of another node.
    """

    def __init__(self, cubins, free_bytes=1 << 40):
        self.cubins = cubins  # kernel name → cubin
        self.memory = StubMemory(free_bytes)
        self.calls, self.launches, self.fail = [], [], {}
        self.graphs = {}
        self._modules, self._functions, self._keep = {}, {}, []

    def __getattr__(self, name):
        if name not in _SIGNATURES:
            raise AttributeError(name)
        body = getattr(type(self), f"_{name}", None)

        def function(*arguments):
            if not name.startswith("cuGetError"):
                self.calls.append((name, *(a for a in arguments)))
                if name in self.fail:
                    return self.fail[name]
            return 0 if body is None else body(self, *arguments)

        callback = CFUNCTYPE(c_int, *_SIGNATURES[name])(function)
        self._keep.append(callback)
        setattr(self, name, callback)
        return callback

    def _cuGetErrorName(self, code, out):  # noqa: N802
        return self._text(code, 0, out)

    def _cuGetErrorString(self, code, out):  # noqa: N802
        return self._text(code, 1, out)

    def _text(self, code, which, out):
        if code not in ERRORS:
            return 1
        ctypes.cast(out, ctypes.POINTER(c_char_p))[0] = ERRORS[code][which]
        return 0

    def _cuDevicePrimaryCtxRetain(self, out, device):  # noqa: N802
        return _write(out, 0xC0DE + device)

    def _cuModuleLoadData(self, out, image):  # noqa: N802
        for name, cubin in self.cubins.items():
            if ctypes.string_at(image, len(cubin)) == cubin:
                handle = 0x1000 + len(self._modules)
                self._modules[handle] = name
                return _write(out, handle)
        return 1

    def _cuModuleGetFunction(self, out, module, name):  # noqa: N802
        if self._modules.get(module) != name.decode():
            return 500
        handle = 0x2000 + module
        self._functions[handle] = name.decode()
        return _write(out, handle)

    def _cuLaunchKernelEx(self, config, function, parameters, extra):  # noqa: N802
        name = self._functions[function]
        *shape, shared, stream, attributes, num_attributes = struct.unpack("<7I4xQQI", ctypes.string_at(config, 52))
        table = parameter_table(self.cubins[name])
        pointers = struct.unpack(f"<{len(table)}Q", ctypes.string_at(parameters, 8 * len(table)))
        values = [
            int.from_bytes(ctypes.string_at(pointer, size), "little")
            for pointer, (_, size) in zip(pointers, table, strict=True)
        ]
        self.launches.append(
            {
                "kernel": name,
                "grid": tuple(shape[:3]),
                "block": tuple(shape[3:6]),
                "shared": shared,
                "stream": stream,
                "attributes": [
                    struct.unpack("<i4xi", ctypes.string_at(attributes + 72 * i, 12)) for i in range(num_attributes)
                ],
                "values": values,
                "offsets": [pointer - pointers[0] for pointer in pointers],
                "extra": extra,
            }
        )
        return 0

    def _cuGraphGetNodes(self, graph, nodes, count):  # noqa: N802
        found = self.graphs[graph]
        if nodes:
            room = ctypes.cast(count, ctypes.POINTER(c_size_t))[0]
            for place in range(min(room, len(found))):
                ctypes.cast(nodes, ctypes.POINTER(c_void_p))[place] = graph + 1 + place
        return _write(count, len(found))

    def _node(self, node):
        graph = max(handle for handle in self.graphs if handle < node)
        return self.graphs[graph][node - graph - 1]

    def _cuGraphNodeGetType(self, node, out):  # noqa: N802
        found = self._node(node)
        ctypes.cast(out, ctypes.POINTER(c_int))[0] = found if isinstance(found, int) else 0
        return 0

    def _cuGraphKernelNodeGetParams_v2(self, node, out):  # noqa: N802
        found = self._node(node)
        if isinstance(found, int):
            return 1
        # CUfunction, six sizes, shared memory, two pointers, CUkernel and context.
        function, kernel = (node, 0) if isinstance(found, str) else (0, node)
        ctypes.memmove(out, struct.pack("<Q7I4xQQQQ", function, *range(1, 8), 0, 0, kernel, 0), 72)
        return 0

    def _cuFuncGetName(self, out, function):  # noqa: N802
        return self._write_name(out, self._node(function).encode())

    def _cuKernelGetName(self, out, kernel):  # noqa: N802
        return self._write_name(out, self._node(kernel))

    def _write_name(self, out, name):
        text = c_char_p(name)
        self._keep.append(text)
        ctypes.cast(out, ctypes.POINTER(c_char_p))[0] = text
        return 0

    def _cuMemGetAllocationGranularity(self, out, properties, option):  # noqa: N802
        return self.memory.granularity(ctypes.string_at(properties, 32), option, out)

    def _cuMemAddressReserve(self, out, size, alignment, address, flags):  # noqa: N802
        return self.memory.reserve(size, (alignment, address, flags), out)

    def _cuMemAddressFree(self, address, size):  # noqa: N802
        return self.memory.free_addresses(address, size)

    def _cuMemCreate(self, out, size, properties, flags):  # noqa: N802
        return self.memory.create(size, ctypes.string_at(properties, 32), flags, out)

    def _cuMemRelease(self, handle):  # noqa: N802
        return self.memory.release(handle)

    def _cuMemMap(self, address, size, offset, handle, flags):  # noqa: N802
        return self.memory.map(address, size, (offset, flags), handle)

    def _cuMemUnmap(self, address, size):  # noqa: N802
        return self.memory.unmap(address, size)

    def _cuMemSetAccess(self, address, size, access, count):  # noqa: N802
        return self.memory.set_access(address, size, ctypes.string_at(access, 12), count)


class StubMemory:
    """The device's memory: what is reserved, created, mapped and accessible, by the rules of the driver's manual.

    Attributes:
        reserved: address → bytes.
        handles: handle → bytes, of those not released.
        mapped: address → (bytes, handle).
        accessible: addresses of mappings that the device may read and write.
        free_bytes: of memory.
    """

    GRANULARITY = 2 << 20

    def __init__(self, free_bytes):
        self.free_bytes = free_bytes
        self.reserved, self.handles, self.mapped, self.accessible = {}, {}, {}, set()
        self._next_address, self._next_handle = 0x7000_0000_0000, 0x3000

    @staticmethod
    def _is_device_memory(properties):
        """Pinned memory of device 0 that nobody else opens: type, handle types, location, and nothing else."""
        return struct.unpack("<iiii", properties[:16]) == (1, 0, 1, 0) and not any(properties[16:])

    def granularity(self, properties, option, out):
        return _write(out, self.GRANULARITY) if self._is_device_memory(properties) and option == 0 else 1

    def reserve(self, size, rest, out):
        if size == 0 or size % self.GRANULARITY or rest != (0, 0, 0):
            return 1
        address, self._next_address = self._next_address, self._next_address + size + self.GRANULARITY
        self.reserved[address] = size
        return _write(out, address)

    def free_addresses(self, address, size):
        inside = any(address <= start < address + size for start in self.mapped)
        if self.reserved.get(address) != size or inside:
            return 1
        del self.reserved[address]
        return 0

    def create(self, size, properties, flags, out):
        if size == 0 or size % self.GRANULARITY or flags or not self._is_device_memory(properties):
            return 1
        if size > self.free_bytes:
            return 2
        self.free_bytes -= size
        self._next_handle += 1
        self.handles[self._next_handle] = size
        return _write(out, self._next_handle)

    def release(self, handle):
        if handle not in self.handles:
            return 1
        size = self.handles.pop(handle)
        if all(owner != handle for _, owner in self.mapped.values()):
            self.free_bytes += size
        return 0

    def map(self, address, size, rest, handle):
        is_reserved = any(a <= address and address + size <= a + n for a, n in self.reserved.items())
        overlaps = any(a < address + size and address < a + n for a, (n, _) in self.mapped.items())
        if not is_reserved or overlaps or rest != (0, 0) or self.handles.get(handle) != size:
            return 1
        self.mapped[address] = (size, handle)
        return 0

    def unmap(self, address, size):
        if self.mapped.get(address, (0, 0))[0] != size:
            return 1
        _, handle = self.mapped.pop(address)
        self.accessible.discard(address)
        if handle not in self.handles:
            self.free_bytes += size
        return 0

    def set_access(self, address, size, access, count):
        # Location type and id, then read and write.
        if self.mapped.get(address, (0, 0))[0] != size or count != 1 or struct.unpack("<iii", access) != (1, 0, 3):
            return 1
        self.accessible.add(address)
        return 0


def _write(out, value):
    ctypes.cast(out, ctypes.POINTER(c_void_p))[0] = value
    return 0


_SIGNATURES = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (c_void_p, c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuMemGetAllocationGranularity": (c_void_p, c_void_p, c_int),
    "cuMemAddressReserve": (c_void_p, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (c_void_p, c_size_t, c_void_p, c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, c_void_p, c_size_t),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuGraphGetNodes": (c_void_p, c_void_p, c_void_p),
    "cuGraphNodeGetType": (c_void_p, c_void_p),
    "cuGraphKernelNodeGetParams_v2": (c_void_p, c_void_p),
    "cuFuncGetName": (c_void_p, c_void_p),
    "cuKernelGetName": (c_void_p, c_void_p),
}
