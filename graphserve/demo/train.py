"""Train the demo model: ``python -m graphserve.demo.train TINYSTORIES.json --output FOLDER``.

The text is a JSON list of real stories (the TinyStories slice) plus stories, chats and answers that
:mod:`graphserve.demo.corpus` writes. The tokenizer is trained on the same text. Every draw is seeded: the
same data, seed, steps and library versions give the same text in the same order.

The optimizer is AdamW with a warmup and cosine schedule; weight decay acts on matrices only.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from graphserve.demo import demo_path, questions, stories
from graphserve.demo.corpus import (
    END_OF_TEXT,
    PAD,
    TURN_END,
    TURN_START,
    VOCAB_SIZE,
    chat_prompt,
    documents,
    tidy,
    train_tokenizer,
)

logger = logging.getLogger(__name__)

MAX_POSITIONS = 1024
TOKENS_PER_STEP = 2048
HELD_OUT_STORIES = 25
IGNORED = -100  # the target that cross_entropy leaves out


def model_config(vocab: Tokenizer) -> LlamaConfig:
    """Return the shape of the demo model: 2.7 M parameters, grouped-query attention, head size 64, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,  # 1 / sqrt(hidden_size): with the usual 0.02 attention starts too flat and learns late
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab.token_to_id(END_OF_TEXT),
        pad_token_id=vocab.token_to_id(PAD),
    )


class Packer:
    """Packs documents into rows of a fixed length. Invariant: every row starts at the start of a document."""

    def __init__(self, source: Iterator[str], tokenizer: Tokenizer) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._pad = tokenizer.encode(PAD).ids[0]
        self._waiting: list[list[int]] = []

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return token ids and next-token targets, both [rows, length] int64; padding has target ``IGNORED``."""
        packed = torch.full((rows, length + 1), self._pad)
        for row in packed:
            free = length + 1
            while True:
                while len(self._waiting) < 64:
                    self._waiting.append(self._tokenizer.encode(next(self._source)).ids)
                fitting = next((i for i, ids in enumerate(self._waiting) if len(ids) <= free), None)
                if fitting is None and free == length + 1:
                    self._waiting[0] = self._waiting[0][: length + 1]  # longer than any row: its end is dropped
                    fitting = 0
                if fitting is None:
                    break
                ids = self._waiting.pop(fitting)
                row[length + 1 - free : length + 1 - free + len(ids)] = torch.tensor(ids)
                free -= len(ids)
        targets = packed[:, 1:].clone()
        targets[targets == self._pad] = IGNORED
        return packed[:, :-1].contiguous(), targets


def loss_of(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats per token of ids [B, L] int64 against targets [B, L]."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def story_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return the mean negative log-likelihood in nats per token over whole stories, each read alone, in fp32."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text + END_OF_TEXT).ids[:MAX_POSITIONS]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, max_tokens: int = 300) -> tuple[str, bool]:
    """Continue a prompt greedily. Returns the text and whether the model stopped by itself."""
    prompt_ids = tokenizer.encode(prompt).ids
    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)]
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends
    )
    new = output[0, len(prompt_ids) :].tolist()
    return tokenizer.decode(new), bool(new) and new[-1] in ends


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: list[str]) -> dict[str, object]:
    """Measure the loss on stories never trained on and the answers to questions never trained on."""
    right, wrong = 0, []
    asked = questions.held_out_questions()
    for question, expected in asked:
        text, _ = answer(model, tokenizer, chat_prompt(question), max_tokens=80)
        right += text == expected
        if text != expected:
            wrong.append({"question": question, "answer": text, "expected": expected})
    return {
        "held_out_story_loss": round(story_loss(model, tokenizer, held_out), 4),
        "held_out_questions": len(asked),
        "held_out_questions_right": right,
        "held_out_questions_wrong": wrong,
        "held_out_requests": [
            {"request": request, "answer": text, "stopped": stopped}
            for request in stories.HELD_OUT_REQUESTS
            for text, stopped in [answer(model, tokenizer, chat_prompt(request))]
        ],
    }


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face model folder with bf16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    end, turn_end, pad = (tokenizer.token_to_id(text) for text in (END_OF_TEXT, TURN_END, PAD))
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(eos_token_id=[end, turn_end], pad_token_id=pad, do_sample=False)
    copy.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    if folder.resolve() != demo_path():
        shutil.copy(demo_path() / "chat_template.jinja", folder)


def train(args: argparse.Namespace) -> None:
    """Train, save after every ``--save-every`` steps and write ``training.json`` with the losses."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    real = [tidy(story) for story in json.loads(args.data.read_text())]
    rng.shuffle(real)
    held_out, real = real[:HELD_OUT_STORIES], real[HELD_OUT_STORIES:]
    tokenizer = train_tokenizer(real, random.Random(args.seed))
    model = LlamaForCausalLM(model_config(tokenizer))
    packer = Packer(documents(real, rng), tokenizer)

    decayed = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=args.warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps - args.warmup, eta_min=args.lr * 0.01),
        ],
        milestones=[args.warmup],
    )
    start, curve, recent = time.perf_counter(), [], []
    for step in range(1, args.steps + 1):
        # Every eighth step uses the longest rows, so that all positions are trained. The others are short: few
        # documents share a row, so that the names of one story seldom stand in the sight of another.
        length = MAX_POSITIONS if step % 8 == 0 else MAX_POSITIONS // 3
        loss = loss_of(model, *packer.batch(TOKENS_PER_STEP // length, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % args.save_every == 0 or step == args.steps:
            model.eval()
            point = {
                "step": step,
                "minutes": round((time.perf_counter() - start) / 60, 2),
                "cpu_minutes": round(time.process_time() / 60, 2),
                "train_loss": round(sum(recent) / len(recent), 4),
                "held_out_story_loss": round(story_loss(model, tokenizer, held_out), 4),
            }
            recent.clear()
            curve.append(point)
            logger.info("%s", json.dumps(point))
            save(model, tokenizer, args.output)
            model.train()
    model.eval()
    rounded = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)  # what the file holds: bf16 values
    report = {
        "seed": args.seed,
        "steps": args.steps,
        "tokens": args.steps * TOKENS_PER_STEP,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        **evaluate(rounded, tokenizer, held_out),
        "curve": curve,
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    logger.info("trained %d steps in %.1f minutes", args.steps, (time.perf_counter() - start) / 60)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON list of stories")
    parser.add_argument("--output", type=Path, default=demo_path(), help="folder to write (default: the demo folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps of 2048 tokens")
    parser.add_argument("--warmup", type=int, default=50, help="steps in which the learning rate rises")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saved checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
