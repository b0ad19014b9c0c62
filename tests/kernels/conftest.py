"""Builds and checks generated kernels, at every ISA level of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cpu_kernel_cases import Case, assert_close

from graphserve.kernels.cpu import available_levels, build, compiler


@pytest.fixture(scope="session")
def check_cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Case]], None]:
    """Build every case for every ISA level of this machine at once, run each on 1 and 2 threads, compare."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    store: Path = tmp_path_factory.mktemp("kernels")

    def check(cases: list[Case]) -> None:
        kernels = {(case.name, isa): case.kernel(isa) for case in cases for isa in available_levels()}
        assert len(kernels) == len(cases) * len(available_levels()), "two cases share a name"
        library = build(list(kernels.values()), store)
        for case in cases:
            expected = case.expected()
            for isa in available_levels():
                function = library.function_pointer(kernels[case.name, isa].symbol)
                for num_threads in (1, 2):
                    actual = case.run(function, library, num_threads)
                    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
                        try:
                            assert_close(got, wanted)
                        except AssertionError as error:
                            raise AssertionError(
                                f"{case.name}, {isa}, {num_threads} threads, result {i}: {error}"
                            ) from error

    return check
