"""Generated joining of tensors against ``torch.cat``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cpu_kernel_cases import Case
from torch import Tensor

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.cpu import generate


@dataclass
class Joined(Case):
    """Parts beside ``torch.cat`` of them."""

    def _reference(self, args: list[Tensor | None]) -> list[Tensor]:
        return [torch.cat([a for a in args if a is not None], self.attrs["dim"])]


def joined(name: str, dim: int, *parts: Tensor, tokens_at: int = 0) -> Joined:
    dynamic: dict[tuple[int | str, int], str] = {(i, tokens_at): "T" for i in range(len(parts))}
    dynamic[("out", tokens_at)] = "T"
    return Joined(name, "concat", {"dim": dim}, list(parts), dynamic, {"T": parts[0].shape[tokens_at]})


def test_parts_of_any_strides_stand_side_by_side(check_cases) -> None:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):

        def made(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape) * 50).to(kind)

        cases += [
            joined(f"{dtype} last", -1, made(5, 3, 16), made(5, 3, 7), made(5, 3, 1)),
            joined(f"{dtype} shared by heads", -1, made(5, 4, 32)[..., 16:], made(5, 1, 8).expand(5, 4, 8)),
            joined(f"{dtype} heads first", -1, *(made(1, 6, 4, n).transpose(1, 2) for n in (16, 8)), tokens_at=2),
            joined(f"{dtype} in the middle", 1, made(5, 3, 16), made(5, 2, 16)),
        ]
    check_cases(cases, core=("torch.float32 shared",))


def test_what_cannot_be_joined_is_refused_by_name() -> None:
    def reason(*parts: ArgSpec, out: ArgSpec) -> str:
        result = generate("concat", {"dim": 0}, list(parts), [out], "generic")
        assert isinstance(result, Refusal), result
        return result.reason

    x = ArgSpec("float32", ("T", 8))
    assert "a part is bfloat16" in reason(ArgSpec("bfloat16", ("T", 8)), x, out=x)
    assert "must be a constant" in reason(x, x, out=ArgSpec("float32", ("2*T", 8)))
    assert "float64" in reason(*(ArgSpec("float64", (4, 8)),) * 2, out=ArgSpec("float64", (8, 8)))
