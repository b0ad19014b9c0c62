"""The memory plan against what is then used: a 0.5B shape with random weights, on a CPU or a GPU.

    python -m benchmarks.memory_plan              # about two minutes
    python -m benchmarks.memory_plan --dtype float32 --json benchmarks/results/memory_plan.json
    python -m benchmarks.memory_plan --device cuda

On a CPU one process compiles the model into a cache. Another one loads it, touches every block of the KV pool, runs the
largest step that its limits allow, and compares what it has taken since before loading with the plan's sum. On a CPU
that is its private memory, and they may differ by 5 % or 32 MB; on a GPU what the driver reports as no longer free, and
they may differ by 3 %. No other process may use the GPU meanwhile. The last line of stdout is JSON; exit code 1 when
they differ by more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "eos_token_id": 151645,
}  # fmt: skip
LIMITS: dict[str, dict[str, Any]] = {
    "cpu": {"max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 2048},
    "cuda": {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192},
}
# Share of the plan, and bytes; the larger of the two.
ALLOWED: dict[str, tuple[float, float]] = {"cpu": (0.05, 32e6), "cuda": (0.03, 0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=list(LIMITS))
    parser.add_argument("--json", type=Path, help="also written here")
    parser.add_argument("--phase", choices=["compile", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(measure(args.model, args.device) if args.phase == "measure" else compile_only(args.model)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, args.dtype)
        environment = os.environ | {"GRAPHSERVE_CACHE": str(Path(folder) / "cache")}
        # Compiling takes host memory, which is what counts on a CPU.
        for phase in ("compile", "measure") if args.device == "cpu" else ("measure",):
            command = [sys.executable, "-m", "benchmarks.memory_plan", "--phase", phase, "--model", str(model)]
            command += ["--device", args.device]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
    result = {"device": args.device, "dtype": args.dtype, "limits": LIMITS[args.device], **result}
    difference = abs(result["used_bytes"] - result["planned_bytes"])
    result["difference"] = round(difference / result["planned_bytes"], 4)
    share, num_bytes = ALLOWED[args.device]
    result["holds"] = difference <= max(share * result["planned_bytes"], num_bytes)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["holds"] else 1


def write_model(folder: Path, dtype: str) -> None:
    """A checkpoint of the shape with small random weights; no tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        scale = 0.02 if parameter.dim() > 1 else 1.0
        tensors[name] = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def engine_options(model: str, device: str) -> Any:
    from graphserve.config import EngineConfig

    return EngineConfig.from_kwargs(model=model, device=device, skip_tokenizer_init=True, **LIMITS[device])


def compile_only(model: str) -> dict[str, Any]:
    from graphserve.runtime.load import load_model

    loaded = load_model(engine_options(model, "cpu"))
    loaded.model_runner.allocate_kv_cache(2, 16)
    loaded.model_runner.close()
    return {}


def measure(model: str, device: str) -> dict[str, Any]:
    """Load, touch, step, and compare. Modules, thread pools and library handles are there before the first reading."""
    import torch

    from graphserve import LLMEngine, SamplingParams
    from graphserve.runtime.load import load_model

    torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
    used_bytes = private_bytes if device == "cpu" else used_on_gpu
    before = used_bytes()
    config = engine_options(model, device)
    limits = LIMITS[device]
    loaded = load_model(config)
    engine = LLMEngine.from_loaded(config, loaded)
    if device == "cpu":  # a GPU's pool is in memory from the beginning
        cache = loaded.model_runner.kv_cache
        assert cache is not None
        for keys, values in cache.layers:
            keys.fill_(0.5)
            values.fill_(0.5)
    length = limits["max_num_batched_tokens"] // limits["max_num_seqs"]
    for request in range(limits["max_num_seqs"]):
        prompt = [(request * 977 + i * 31) % CONFIG["vocab_size"] for i in range(length)]
        params = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, ignore_eos=True, seed=request)
        engine.add_request(str(request), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        engine.step()
    gc.collect()
    used = used_bytes() - before
    memory = loaded.memory
    return {
        "planned_bytes": memory.total_bytes,
        "used_bytes": used,
        "weight_bytes": memory.weight_bytes,
        "kv_bytes": memory.kv_bytes,
        "workspace_bytes": memory.workspace_bytes,
        "graph_bytes": memory.graph_bytes,
        "captured_graph_bytes": engine.stats().graph_bytes,
    }


def used_on_gpu() -> int:
    """Memory of the GPU that is not free, whoever has it."""
    import torch

    torch.cuda.synchronize()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def private_bytes() -> int:
    """Memory of this process that no other one shares, and no file backs."""
    total = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    sys.exit(main())
