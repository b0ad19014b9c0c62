"""An LLM engine around the fake model, with a small word-level tokenizer made in memory."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from engine.fake_model import VOCAB, FakeRunner
from tokenizers import decoders, models, pre_tokenizers, processors

from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import LLMEngine
from graphserve.models.generation_config import GenerationDefaults
from graphserve.models.tokenizer import Tokenizer
from graphserve.runtime.load import LoadedModel
from graphserve.runtime.memory_plan import plan_memory

BOS, EOS = 0, 1
WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}z{% endif %}"
)


def fake_tokenizer() -> Tokenizer:
    """Ids 2.. are the letters a-z A-T, separated by spaces; a beginning-of-sequence token is added."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Sequence([decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": CHAT_TEMPLATE})


def fake_loaded(
    runner: FakeRunner,
    eos: Sequence[int] = (EOS,),
    sampling: dict[str, float] | None = None,
    max_model_len: int = 64,
    with_tokenizer: bool = True,
    config: EngineConfig | None = None,
) -> LoadedModel:
    runner.plan.model["max_model_len"] = max_model_len
    defaults = GenerationDefaults(tuple(eos), sampling or {})
    return LoadedModel(
        model_runner=runner,  # type: ignore[arg-type]
        tokenizer=fake_tokenizer() if with_tokenizer else None,
        generation_defaults=defaults,
        memory=plan_memory(runner.plan, config or EngineConfig(), free_bytes=1 << 30),
    )


def fake_llm_engine(
    runner: FakeRunner | None = None,
    eos: Sequence[int] = (EOS,),
    sampling: dict[str, float] | None = None,
    max_model_len: int = 64,
    **options: object,
) -> LLMEngine:
    config = EngineConfig.from_kwargs(**{"block_size": 4, "max_num_seqs": 8, **options})
    loaded = fake_loaded(runner or FakeRunner(), eos, sampling, max_model_len, not config.skip_tokenizer_init, config)
    return LLMEngine.from_loaded(config, loaded)


assert len(WORDS) == VOCAB
