"""Builds and checks generated kernels, at every ISA level of the machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cpu_kernel_cases import Case, assert_close

from graphserve.artifacts import ArtifactStore
from graphserve.kernels.cpu import available_levels, build, compiler


@pytest.fixture(scope="session")
def kernel_store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """Where the suite keeps compiled kernels."""
    return ArtifactStore(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session", params=["core", pytest.param("all", marks=pytest.mark.full)])
def check_cases(request: pytest.FixtureRequest, kernel_store: ArtifactStore) -> Callable[..., None]:
    """Build cases, run each on 1 and 2 threads, compare with the reference.

    The processor's best ISA level runs every case, the other levels those whose name begins with one of ``core``
    (under ``-m full``: every case as well), because each of them costs about a second of compiling.
    """
    if compiler() is None:
        pytest.skip("needs a C++ compiler")

    def levels_of(case: Case, core: tuple[str, ...]) -> list[str]:
        everywhere = request.param == "all" or case.name.startswith(core)
        return available_levels() if everywhere else available_levels()[:1]

    def check(cases: list[Case], core: tuple[str, ...]) -> None:
        assert any(case.name.startswith(core) for case in cases), "no case runs at every level"
        kernels = {(case.name, isa): case.kernel(isa) for case in cases for isa in levels_of(case, core)}
        assert len({name for name, _ in kernels}) == len(cases), "two cases share a name"
        library = build(list(kernels.values()), kernel_store)
        expected = {case.name: case.expected() for case in cases}
        named = {case.name: case for case in cases}
        for (name, isa), kernel in kernels.items():
            for num_threads in (1, 2):
                actual = named[name].run(library.function_pointer(kernel.symbol), library, num_threads)
                for i, (got, wanted) in enumerate(zip(actual, expected[name], strict=True)):
                    try:
                        assert_close(got, wanted, named[name].rounding)
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {isa}, {num_threads} threads, result {i}: {error}") from error

    return check
