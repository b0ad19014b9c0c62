"""What the compile cache survives: kills, damaged files, a full disk, a read-only store, eight processes at once.

    python -m benchmarks.cache_faults [--kills 100] [--corruptions 300] [--processes 8] [--parts kills,corruptions,...]
        [--out FILE]

Every start answers a prompt with the embedded model, and its text is compared with that of an undisturbed start. Python
finds the bytecode of every module, as it does in an installation. The last stdout line is one JSON document; ``--out``
stores it, and keeps the parts of that file which this run leaves out. Exit status 1 if a start failed or answered
otherwise, a damaged file was not named and put into quarantine, or several processes took the CPU time of two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

PROMPT, NUM_TOKENS = "Once upon a time", 8
MODES = ("truncate", "flip", "zero", "foreign", "empty", "remove")
KINDS = ("plan", "weights", "cpp")  # what a start of the embedded model stores
MAX_RATIO = 2  # CPU time of several processes on one cold store, in that of one
PARTS = ("kills", "corruptions", "full_disk", "read_only", "processes")


def command(*options: str) -> list[str]:
    """One start of the command line with an answer."""
    return [
        sys.executable, "-m", "graphserve", "generate", "--prompt", PROMPT, "--max-tokens", str(NUM_TOKENS), *options,
    ]  # fmt: skip


def environment(cache: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "GRAPHSERVE_CACHE": str(cache), "OMP_NUM_THREADS": "1", **extra}


def keep_bytecode(folder: Path) -> None:
    """Let every process that is started from here on keep compiled modules in ``folder``."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def start(cache: Path, prefix: tuple[str, ...] = (), **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *command()], env=environment(cache, **extra), capture_output=True, text=True)


def damage(path: Path, mode: str, chance: random.Random) -> None:
    """Spoil one file; the old inode is left alone, since a process may have it mapped."""
    data = bytearray(path.read_bytes())
    if mode == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif mode == "truncate":
        del data[chance.randrange(len(data)) :]
    elif mode == "zero":
        data = bytearray(len(data))
    elif mode == "foreign":
        data = bytearray(chance.randbytes(len(data)))
    elif mode == "empty":
        data = bytearray()
    path.unlink()
    if mode != "remove":
        path.write_bytes(data)


def kills(warm: Path, scratch: Path, expected: str, count: int) -> dict[str, Any]:
    """Starts on a store that lacks something, killed at any moment; each is followed by a start that must succeed."""
    chance = random.Random(1)
    restarts: Counter[str] = Counter()
    store = scratch / "kills"
    shutil.copytree(warm, store)
    for number in range(count):
        artifacts = sorted(path.parent for kind in KINDS for path in (store / kind).glob("*/manifest.json"))
        for folder in chance.sample(artifacts, min(2, len(artifacts))):
            shutil.rmtree(folder)
        victim = subprocess.Popen(
            command(), env=environment(store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        time.sleep(chance.uniform(0.5, 6.0))
        os.killpg(victim.pid, 9)
        victim.wait()
        result = start(store)
        is_right = result.returncode == 0 and result.stdout == expected
        restarts["right" if is_right else "wrong"] += 1
        if not is_right:
            sys.stdout.write(f"kill {number}: status {result.returncode}\n{result.stderr}\n")
    return {"starts": count, "right": restarts["right"]}


def corruptions(warm: Path, scratch: Path, count: int) -> dict[str, Any]:
    """One damaged file a start; a start is a load and an answer in this process, so that torch is imported once."""
    import logging

    from graphserve import LLM, SamplingParams

    class Caught(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    def answer(store: Path) -> list[int]:
        with LLM(compile_cache=str(store)) as llm:
            params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
            return list(llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids)

    messages: list[str] = []
    logging.getLogger("graphserve").addHandler(Caught())
    store = scratch / "corruptions"
    shutil.copytree(warm, store)
    expected = answer(store)
    chance = random.Random(2)
    results: Counter[str] = Counter()
    for number in range(count):
        files = sorted(path for kind in KINDS for path in (store / kind).glob("*/*"))
        path, mode = chance.choice(files), MODES[number % len(MODES)]
        damage(path, mode, chance)
        messages.clear()
        try:
            found = answer(store)
        except Exception as error:  # every kind of failure is counted, none ends the run
            results["failed start"] += 1
            sys.stdout.write(f"{mode} {path.name}: {type(error).__name__}: {error}\n")
            continue
        results["right" if found == expected else "wrong result"] += 1
        named = any("damaged" in message and path.name in message for message in messages)
        results["named"] += named
        if not named:
            sys.stdout.write(f"{mode} {path.name} was not named: {messages}\n")
    in_quarantine = len(list((store / "quarantine").glob("*")))
    return {"starts": count, "modes": MODES, **dict(results), "in_quarantine": in_quarantine}


def full_disk(scratch: Path, expected: str, num_starts: int) -> dict[str, Any]:
    """Cold starts on a file system of 300 KiB (needs the right to mount)."""
    right = 0
    for number in range(num_starts):
        point = scratch / f"full{number}"
        point.mkdir()
        size = 100 + 50 * number  # KiB: full at another artifact each time
        script = f'mount -t tmpfs -o size={size}k none {point} && exec "$@"'
        result = start(point, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
        if "unshare" in result.stderr or "mount" in result.stderr:
            return {"not_run": "mounting is not allowed here"}
        right += result.returncode == 0 and result.stdout == expected
        if result.returncode != 0:
            sys.stdout.write(result.stderr)
    return {"starts": num_starts, "right": right}


def read_only(warm: Path, scratch: Path, expected: str) -> dict[str, Any]:
    """Starts on stores that cannot be written: a complete one, and an empty one."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        prefix = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
    right = 0
    for name in ("complete", "empty"):
        store = scratch / f"read_only_{name}"
        shutil.copytree(warm, store) if name == "complete" else store.mkdir()
        for path in [store, *store.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        result = start(store, prefix)
        right += result.returncode == 0 and result.stdout == expected
        for path in [store, *store.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    return {"starts": 2, "right": right}


def processes(scratch: Path, expected: str, count: int) -> dict[str, Any]:
    """CPU seconds of one cold start, and of several at once on one cold store."""
    seconds: dict[int, float] = {}
    right = 0
    for number in (1, count):
        store = scratch / f"processes{number}"
        store.mkdir()
        before = cpu_of_children()
        running = [
            subprocess.Popen(
                command(), env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(number)
        ]
        right += sum(process.communicate()[0] == expected for process in running)
        seconds[number] = cpu_of_children() - before
    return {
        "starts": 1 + count,
        "right": right,
        "cpu_s_of_one": round(seconds[1], 1),
        "cpu_s_of_all": round(seconds[count], 1),
        "ratio": round(seconds[count] / seconds[1], 2),
    }


def cpu_of_children() -> float:
    """CPU seconds of every process that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def has_failed(part: dict[str, Any]) -> bool:
    """Whether a part shows something that a cache must not do."""
    counts = [part[name] for name in ("right", "named", "in_quarantine") if name in part]
    return any(count != part["starts"] for count in counts) or part.get("ratio", 0) >= MAX_RATIO


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=300)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--full-disk", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parts = args.parts.split(",")
    stored = json.loads(args.out.read_text())["parts"] if args.out is not None and args.out.is_file() else {}
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="graphserve-faults-") as folder:
        scratch = Path(folder)
        keep_bytecode(scratch / "bytecode")
        warm = scratch / "warm"
        first = start(warm)
        assert first.returncode == 0, first.stderr
        expected = first.stdout
        todo = {
            "kills": lambda: kills(warm, scratch, expected, args.kills),
            "corruptions": lambda: corruptions(warm, scratch, args.corruptions),
            "full_disk": lambda: full_disk(scratch, expected, args.full_disk),
            "read_only": lambda: read_only(warm, scratch, expected),
            "processes": lambda: processes(scratch, expected, args.processes),
        }
        for name in parts:
            found[name] = todo[name]()
            sys.stdout.write(f"{name}: {found[name]}\n")
            sys.stdout.flush()
            found[name] |= facts | {"load": round(os.getloadavg()[0], 1)}
    document = {
        "benchmark": "cache_faults",
        "command": "python -m benchmarks.cache_faults --parts PART",
        "parts": stored | found,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    return 1 if any(map(has_failed, found.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
