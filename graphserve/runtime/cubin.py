"""The parameter table of a kernel, read from its cubin.

A cubin is an ELF file. Its section ``.nv.info.<kernel>`` lists attributes; one of them (``EIATTR_KPARAM_INFO``)
describes a parameter each: its number, its offset in the parameter buffer and its size. This is what the GPU reads, so
it is what arguments are placed by: Triton adds hidden scratch pointers after a kernel's own parameters, and how many
depends on its version.
"""

from __future__ import annotations

import struct

import msgspec

from graphserve.errors import DeviceError

_EIATTR_KPARAM_INFO = 0x17
_EIFMT_SVAL = 0x04  # value of a size that stands before it; the other formats hold two bytes
_KPARAM_SIZE_SHIFT = 18  # of the last word of a KPARAM_INFO value


class KernelParameter(msgspec.Struct, frozen=True, order=True):
    """One parameter: its number, and its place in the parameter buffer in bytes."""

    ordinal: int
    offset: int
    size: int


def kernel_parameters(cubin: bytes, name: str) -> tuple[KernelParameter, ...]:
    """Parameters of a kernel in order.

    Args:
        cubin: the whole file.
        name: the kernel's name in it.

    Raises:
        DeviceError: the file is not a 64-bit ELF file, holds no such kernel, or its table has a gap.
    """
    info = _section(cubin, f".nv.info.{name}")
    found: list[KernelParameter] = []
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _EIFMT_SVAL:
            continue
        if attribute == _EIATTR_KPARAM_INFO:
            _, ordinal, offset, packed = struct.unpack_from("<IHHI", info, at)
            found.append(KernelParameter(ordinal, offset, packed >> _KPARAM_SIZE_SHIFT))
        at += size
    found.sort()
    if [parameter.ordinal for parameter in found] != list(range(len(found))):
        raise DeviceError(f"cubin of {name} describes parameters {[p.ordinal for p in found]}: some are missing")
    return tuple(found)


def _section(elf: bytes, wanted: str) -> bytes:
    """Contents of one section."""
    if elf[:5] != b"\x7fELF\x02" or len(elf) < 64:
        raise DeviceError(f"not a cubin: {len(elf)} bytes that do not start like a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    if table + entry_size * count > len(elf):
        raise DeviceError(f"truncated cubin: {len(elf)} bytes, its section table ends at {table + entry_size * count}")
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    names_at = headers[names_index][4]
    sections = {}
    for name_offset, _, _, _, offset, size in headers:
        start = names_at + name_offset
        sections[elf[start : elf.index(b"\0", start)].decode()] = (offset, size)
    if wanted not in sections:
        kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
        raise DeviceError(f"cubin has no section {wanted}: its kernels are {', '.join(kernels) or 'none'}")
    offset, size = sections[wanted]
    return elf[offset : offset + size]
