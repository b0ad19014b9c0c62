"""Kernels that are compiled side by side, by processes that may fail, stop or be killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from graphserve.artifacts import ArtifactStore  # noqa: E402
from graphserve.errors import CacheMissError, CompileError  # noqa: E402
from graphserve.kernels.arg_spec import ArgSpec, Call  # noqa: E402
from graphserve.kernels.triton import compile_jobs  # noqa: E402
from graphserve.kernels.triton.compile_jobs import compile_in_processes  # noqa: E402
from graphserve.kernels.triton.compiled import find_compiled, find_or_compile_kernels  # noqa: E402
from graphserve.kernels.triton.kernel import KernelText, TritonKernel  # noqa: E402

TARGET = "cuda:90"


def times(factor: int, expression: str = "{} * tl.load(x_ptr + offset)") -> TritonKernel:
    """out = factor * x over 1024 elements a program."""
    spec = ArgSpec("float32", ("T", 1024))
    text = KernelText(Call(f"times_{factor}", {}, [spec], [spec]))
    text.pointer("x_ptr", 0)
    text.output("out_ptr", 0)
    text.constants(BLOCK=1024)
    body = f"""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, {expression.format(factor)})
    """
    return text.build(body, ("T", 1, 1), num_warps=4)


def broken() -> TritonKernel:
    return times(99, "tl.no_such_function({})")


def test_every_kernel_is_in_the_store_afterwards_and_each_was_counted_once(tmp_path: Path) -> None:
    store, kernels = ArtifactStore(tmp_path), [times(n) for n in range(5)]
    done: list[int] = []
    compile_in_processes(kernels, TARGET, store, 2, lambda: done.append(1))
    assert len(done) == 5 == len(store.built)
    assert all(find_compiled(store, kernel, TARGET) is not None for kernel in kernels)


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_kernel_that_does_not_compile_is_named(num_jobs: int, tmp_path: Path) -> None:
    kernels = [times(1), broken(), times(2)]
    with pytest.raises(CompileError, match=f"{broken().symbol} does not compile for cuda:90: (?s:.*)no_such_function"):
        compile_in_processes(kernels, TARGET, ArtifactStore(tmp_path), num_jobs)


def kill_at_once(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def kill_and_bury(process: subprocess.Popen[bytes]) -> None:
    """Nobody is left to read the first line."""
    process.kill()
    process.wait()


@pytest.mark.parametrize("kill", [kill_at_once, kill_and_bury])
def test_a_worker_that_is_killed_is_an_error_that_says_so(
    kill: Callable[[subprocess.Popen[bytes]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Killed(subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            kill(self)

    monkeypatch.setattr(compile_jobs.subprocess, "Popen", Killed)
    with pytest.raises(CompileError, match=f"the compiler of {times(1).symbol} for cuda:90 ended with status -9"):
        compile_in_processes([times(1)], TARGET, ArtifactStore(tmp_path), 1)
    assert [process.poll() for process in started] == [-9]


def test_a_worker_that_cannot_be_started_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(CompileError, match="no compiler for cuda:90 could be started: .*nowhere"):
        compile_in_processes([times(1)], TARGET, ArtifactStore(tmp_path), 1)


def test_an_interrupt_ends_the_work_after_the_kernels_that_are_being_compiled(tmp_path: Path) -> None:
    store, kernels = ArtifactStore(tmp_path), [times(n) for n in range(40)]

    done: list[int] = []

    def interrupt_once() -> None:
        done.append(1)
        main = threading.main_thread().ident
        if len(done) == 1 and main is not None:
            signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compile_in_processes(kernels, TARGET, store, 1, interrupt_once)
    assert 0 < len(list(store.artifacts("triton"))) == len(done) < 40
    assert not [thread for thread in threading.enumerate() if thread.name == "kernel compiler"]


def test_after_a_stop_no_further_kernel_is_compiled_and_what_was_is_kept(tmp_path: Path) -> None:
    store, kernels = ArtifactStore(tmp_path), [times(n) for n in range(4)]
    done: list[int] = []
    compile_in_processes(kernels, TARGET, store, 1, lambda: done.append(1), is_stopped=lambda: len(done) == 2)
    assert [find_compiled(store, kernel, TARGET) is not None for kernel in kernels] == [True, True, False, False]


def test_a_start_compiles_what_is_missing_side_by_side_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, kernels = ArtifactStore(tmp_path), {kernel.key: kernel for kernel in (times(n) for n in range(4))}
    compile_in_processes([times(0)], TARGET, store, 1)
    given: list[int] = []
    compile_all = compile_jobs.compile_in_processes
    monkeypatch.setattr(
        compile_jobs, "compile_in_processes", lambda k, *rest: (given.append(len(k)), compile_all(k, *rest))
    )
    progress: list[tuple[int, int]] = []
    found = find_or_compile_kernels(kernels, TARGET, store, lambda done, total: progress.append((done, total)))
    assert given == [3] and sorted(progress) == [(n, 4) for n in (1, 2, 3, 4)]
    assert {key: found[key].name for key in kernels} == {key: kernel.symbol for key, kernel in kernels.items()}
    assert find_or_compile_kernels(kernels, TARGET, store) == found and given == [3]


def test_a_store_that_cannot_be_written_makes_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArtifactStore, "is_writable", False)
    monkeypatch.setattr(compile_jobs, "compile_in_processes", lambda *_: pytest.fail("their work would be lost"))
    kernels = {kernel.key: kernel for kernel in (times(1), times(2))}
    assert find_or_compile_kernels(kernels, TARGET, ArtifactStore(tmp_path)).keys() == kernels.keys()


def test_a_strict_store_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_jobs.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    store = ArtifactStore(tmp_path, is_strict=True)
    with pytest.raises(CacheMissError, match=f"kernel {times(1).symbol} for cuda:90 is not in the store"):
        find_or_compile_kernels({k.key: k for k in (times(1), times(2))}, TARGET, store)
    with pytest.raises(CacheMissError):
        compile_in_processes([times(1)], TARGET, store, 1)


def test_a_script_without_a_main_guard_may_compile(tmp_path: Path) -> None:
    """Workers do not import the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        import sys
        sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
        from graphserve.artifacts import ArtifactStore
        from graphserve.kernels.triton.compile_jobs import compile_in_processes
        from tests.kernels.triton.test_compile_jobs import times
        print("once")
        compile_in_processes([times(1), times(2)], {TARGET!r}, ArtifactStore(Path({str(tmp_path / "store")!r})), 2)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n" and len(list(tmp_path.glob("store/triton/*"))) == 2


def test_a_script_that_ends_does_not_wait_for_what_is_compiled_in_its_background(tmp_path: Path) -> None:
    endless = tmp_path / "endless"  # a compiler that takes every kernel and never answers, until its input ends
    endless.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    endless.chmod(0o755)
    script = textwrap.dedent(f"""
        import sys
        from functools import partial
        from pathlib import Path
        from graphserve.artifacts import ArtifactStore
        from graphserve.kernels.triton.compile_jobs import compile_in_processes
        from graphserve.runtime.background_build import BackgroundBuild
        from tests.kernels.triton.test_compile_jobs import times
        sys.executable = {str(endless)!r}
        store = ArtifactStore(Path({str(tmp_path / "store")!r}))
        BackgroundBuild(partial(compile_in_processes, [times(1), times(2)], {TARGET!r}, store, 2))
        """)
    repository = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
