import subprocess
import sys

import pytest

from graphserve.config import EngineConfig
from graphserve.errors import ConfigError


def test_defaults():
    config = EngineConfig.from_kwargs()
    assert (config.model, config.dtype, config.device, config.block_size, config.max_logprobs) == (
        "demo",
        "auto",
        "auto",
        16,
        20,
    )
    assert config.token_budget(512) == 2048


def test_unknown_names_are_refused_with_the_closest_one():
    with pytest.raises(ConfigError, match=r"max_num_seq=3: did you mean max_num_seqs\?"):
        EngineConfig.from_kwargs(max_num_seq=3)
    with pytest.raises(ConfigError, match=r"zzz=3: allowed are model, tokenizer"):
        EngineConfig.from_kwargs(zzz=3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_num_seqs", 0, ">= 1"),
        ("max_num_seqs", "4", "int"),
        ("block_size", 0, ">= 1"),
        ("num_gpu_blocks_override", 1, ">= 2"),
        ("gpu_memory_utilization", 0.0, "(0, 1]"),
        ("gpu_memory_utilization", 1.5, "(0, 1]"),
        ("dtype", "int8", "bfloat16"),
        ("device", "tpu", "cuda"),
        ("load_format", "pt", "safetensors"),
        ("max_logprobs", -2, ">= -1"),
        ("cudagraph_capture_sizes", [8, 0], ">= 1"),
        ("max_num_batched_tokens", 8, "lower max_num_seqs to at most 8"),
        ("trust_remote_code", True, "never run"),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs(**{name: value})
    assert name in str(caught.value)
    assert allowed in str(caught.value) or name in ("dtype", "device", "load_format")


def test_the_budget_of_unchunked_prefill_holds_the_longest_prompt():
    assert EngineConfig.from_kwargs(enable_chunked_prefill=False).token_budget(9000) == 9000
    with pytest.raises(ConfigError, match="max_num_batched_tokens=100 is less than max_model_len=9000"):
        EngineConfig.from_kwargs(enable_chunked_prefill=False, max_num_batched_tokens=100).token_budget(9000)


def test_options_survive_as_plain_data():
    config = EngineConfig.from_kwargs(model="m", served_model_name=["a", "b"], override_generation_config={"top_k": 3})
    assert EngineConfig.from_kwargs(**config.to_kwargs()) == config


def test_the_package_and_its_options_import_no_torch():
    code = (
        "import sys, graphserve, graphserve.config, graphserve.engine.engine_core;"
        "from graphserve import SamplingParams;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_of_the_package_is_refused():
    import graphserve

    with pytest.raises(AttributeError, match="no attribute 'LLMM'; it has: LLM, "):
        _ = graphserve.LLMM
    assert set(graphserve.__all__) <= set(dir(graphserve))
    assert all(getattr(graphserve, name) is not None for name in graphserve.__all__)
