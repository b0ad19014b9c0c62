"""A stand-in for ``libcuda``: reads every launch as C would, from raw memory, and records it.

It shares no declaration with the code under test: structures are unpacked by the offsets of ``cuda.h``, and parameters
are read where NVIDIA's own ``cuobjdump`` says that the kernel has them.
"""

import ctypes
import re
import struct
import subprocess
import tempfile
from ctypes import CFUNCTYPE, c_char_p, c_int, c_uint, c_void_p

import triton

ERRORS = {
    1: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
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

    ``fail`` maps a function's name to the CUresult that it returns.
    """

    def __init__(self, cubins):
        self.cubins = cubins  # kernel name → cubin
        self.calls, self.launches, self.fail = [], [], {}
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
    "cuModuleLoadData": (c_void_p, c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
}
