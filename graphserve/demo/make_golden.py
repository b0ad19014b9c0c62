"""Write ``golden.json``: what transformers computes with the demo model, in fp32 and greedily.

``python -m graphserve.demo.make_golden [FOLDER]``. Every case is generated alone, without padding. A case whose two
best tokens come closer than :data:`SMALLEST_MARGIN` at any step is refused, because rounding could swap them: choose
another prompt then.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from graphserve.demo import demo_path

logger = logging.getLogger(__name__)

SMALLEST_MARGIN = 1e-3  # nats; fp32 kernels that add in another order differ by about 1e-5
TOP = 5
TOP_STEPS = 16
RAW_PROMPTS = (
    ("Once upon a time", 400),
    ("Once upon a time, there was a little girl named Lily.", 96),
    ("One day, a small bird", 96),
    ("Tom and his dog went to the park.", 96),
    ("The sun was", 64),
    ('"Mom, can I have a cookie?" said Tim.', 96),
)
CHATS = (
    "Tell me a story.",
    "Tell me a story about a brave little robot.",
    "What is graphserve?",
    "What is a KV cache?",
    "How can I start the server?",
    "Please explain continuous batching to me.",
    "What is 3 plus 4?",
    "Hello!",
)


class Oracle:
    """Greedy decoding with transformers, one prompt at a time, with the log-probability of every token."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ends = GenerationConfig.from_pretrained(folder).eos_token_id

    @torch.no_grad()
    def prompt_logprobs(self, prompt_ids: list[int]) -> list[float | None]:
        """Return the log-probability in nats of each prompt token given those before it; None for the first."""
        logprobs = self.model(torch.tensor([prompt_ids])).logits[0].log_softmax(-1)
        known = logprobs[:-1].gather(1, torch.tensor(prompt_ids[1:])[:, None])[:, 0]
        return [None, *(round(value, 5) for value in known.tolist())]

    @torch.no_grad()
    def continue_greedily(self, prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
        """Continue ``prompt_ids`` until an end token, which is part of ``token_ids``, or for ``max_tokens``.

        Raises:
            ValueError: two best tokens are closer than ``SMALLEST_MARGIN``.
        """
        ids = torch.tensor([prompt_ids])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        token_ids = output.sequences[0, len(prompt_ids) :].tolist()
        logprobs = torch.stack(output.logits)[:, 0].float().log_softmax(-1)  # [steps, vocabulary]
        values, best = logprobs.topk(TOP)
        margin = (values[:, 0] - values[:, 1]).min().item()
        if margin < SMALLEST_MARGIN:
            text = self.tokenizer.decode(prompt_ids)
            raise ValueError(f"prompt {text!r} has margin {margin:.2g}, at least {SMALLEST_MARGIN} is needed")
        stopped = token_ids[-1] in self.ends
        return {
            "prompt_token_ids": prompt_ids,
            "token_ids": token_ids,
            "finish_reason": "stop" if stopped else "length",
            "text": self.tokenizer.decode(token_ids, skip_special_tokens=True),
            "logprobs": [round(value, 5) for value in values[:, 0].tolist()],
            "min_margin": round(margin, 5),
            "top5": [
                [[token, round(value, 5)] for token, value in zip(row_best, row_values, strict=True)]
                for row_best, row_values in zip(best[:TOP_STEPS].tolist(), values[:TOP_STEPS].tolist(), strict=True)
            ],
        }


def make_golden(folder: Path) -> dict[str, Any]:
    """Return the golden record of the checkpoint in ``folder``."""
    oracle = Oracle(folder)
    cases = []
    for prompt, max_tokens in RAW_PROMPTS:
        prompt_ids = oracle.tokenizer(prompt)["input_ids"]
        result = oracle.continue_greedily(prompt_ids, max_tokens)
        result["full_text"] = prompt + result.pop("text")
        cases.append({"prompt": prompt, "prompt_logprobs": oracle.prompt_logprobs(prompt_ids), **result})
    chat = []
    for question in CHATS:
        messages = [{"role": "user", "content": question}]
        encoded = oracle.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        chat.append({"user": question, **oracle.continue_greedily(encoded["input_ids"], 400)})
    return {
        "model": "demo",
        "dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "eos": oracle.ends,
        "cases": cases,
        "chat": chat,
    }


def main() -> None:
    """Read the command line and write ``golden.json`` beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=demo_path(), help="checkpoint (default: the demo)")
    folder = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    golden = make_golden(folder)
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    logger.info("wrote %d raw and %d chat cases", len(golden["cases"]), len(golden["chat"]))


if __name__ == "__main__":
    main()
