"""Decode throughput on the CPU beside ``transformers`` generate, in one run.

    python -m benchmarks.cpu_decode MODEL_DIR [--streams 1,8,32] [--prompt-len 64] [--new-tokens 128] [--rounds 3]

Both decode the same prompts greedily in the checkpoint's dtype. A round times each side once for every stream count,
the two interleaved; the first token (prefill) is timed apart and subtracted. Before timing, the first ``--check``
tokens of both are compared: in float32 they must agree for every stream, in bfloat16 the agreement is printed
(roundings come in another order). The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import graphserve
from graphserve import LLM, SamplingParams


def prompts_of(vocab: int, count: int, length: int) -> list[list[int]]:
    """Random but fixed token ids of the part of the vocabulary that was trained."""
    generator = torch.Generator().manual_seed(0)
    high = min(vocab, 500)
    return [[1, *torch.randint(14, high, (length - 1,), generator=generator).tolist()] for _ in range(count)]


class Ours:
    def __init__(self, path: str, max_streams: int, max_len: int) -> None:
        self.llm = LLM(model=path, max_num_seqs=max_streams, max_model_len=max_len, skip_tokenizer_init=True)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


class Theirs:
    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
                max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        return [row[len(p) :] for row, p in zip(out.tolist(), prompts, strict=True)]


def seconds_of(side: Any, prompts: list[list[int]], new_tokens: int) -> float:
    start = time.perf_counter()
    side.generate(prompts, new_tokens)
    return time.perf_counter() - start


def decode_rate(side: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens a second after the first token, over all streams."""
    first = seconds_of(side, prompts, 1)
    whole = seconds_of(side, prompts, new_tokens)
    return len(prompts) * (new_tokens - 1) / (whole - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=16)
    args = parser.parse_args()
    streams = [int(s) for s in args.streams.split(",")]
    ours = Ours(args.model, max(streams), args.prompt_len + args.new_tokens + 1)
    theirs = Theirs(args.model)
    vocab = theirs.model.config.vocab_size
    for count in streams:
        prompts = prompts_of(vocab, count, args.prompt_len)
        a, b = ours.generate(prompts, args.check), theirs.generate(prompts, args.check)
        equal = sum(x == y for x, y in zip(a, b, strict=True))
        print(f"{count} streams: {equal} of {count} agree on the first {args.check} tokens")
        if theirs.model.dtype == torch.float32 and equal != count:
            raise SystemExit("tokens differ from transformers in float32: nothing is timed")
    rows = []
    for count in streams:
        prompts = prompts_of(vocab, count, args.prompt_len)
        pairs = [
            (decode_rate(ours, prompts, args.new_tokens), decode_rate(theirs, prompts, args.new_tokens))
            for _ in range(args.rounds)
        ]
        mine, other = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratios = [a / b for a, b in pairs]
        row = {
            "streams": count,
            "graphserve_tokens_per_s": round(mine, 1),
            "transformers_tokens_per_s": round(other, 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
        }
        rows.append(row)
        print(row, flush=True)
    print(
        json.dumps(
            {
                "benchmark": "cpu_decode",
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "versions": {
                    "graphserve": graphserve.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "dtype": str(theirs.model.dtype),
                "prompt_len": args.prompt_len,
                "new_tokens": args.new_tokens,
                "rounds": args.rounds,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
