"""The demo model inside a Llama of any larger shape, which computes the same function: its text can be checked there.

Exact but for rounding. Hidden size: zero-padded and rotated by a Hadamard matrix with random signs, norm weights folded
into the matrices behind them. Heads: rotary pair ``i`` moves to the pair of the same frequency, values are rotated too;
further heads and neurons are random and nobody reads them. Further layers add nothing. Further tokens have the logits
of the padding token, which are low. The larger shape's epsilon must be :func:`embedded_eps`, its rotary base the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig

from graphserve.demo import demo_path

PAD_TOKEN = 3


def demo_config() -> PretrainedConfig:
    """Of the model that is embedded."""
    return AutoConfig.from_pretrained(demo_path())


def embedded_eps(hidden_size: int) -> float:
    """The epsilon of a larger shape's norms: the mean of squares is over more values, of which no more are not zero."""
    small = demo_config()
    return float(small.rms_norm_eps * small.hidden_size / hidden_size)


def embedded_parameters(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of a Llama of the given config, whose head is untied.

    Args:
        config: sizes are multiples of the demo's; hidden size and head size are powers of two.
    """
    small = demo_config()
    assert config.rms_norm_eps == embedded_eps(config.hidden_size), "the epsilon is not that of the embedded model"
    source = {name: w.to(device, torch.float32) for name, w in load_file(demo_path() / "model.safetensors").items()}
    maker = _Embedding(small, config, device)
    for name, weight in maker.parameters(source):
        yield name, weight.to(dtype)


class _Embedding:
    def __init__(self, small: PretrainedConfig, large: PretrainedConfig, device: torch.device) -> None:
        self._small, self._large, self._device = small, large, device
        self._generator = torch.Generator(device).manual_seed(0)
        self._hidden = self._rotation(large.hidden_size)[: small.hidden_size]  # [d, D]
        self._values = self._rotation(large.head_dim)[:, : small.head_dim]  # [H, h]
        shrink = math.sqrt(small.hidden_size / large.hidden_size)
        self._norm = torch.full((large.hidden_size,), shrink, device=device)

    def parameters(self, source: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        small, large = self._small, self._large
        embedding = source["model.embed_tokens.weight"]
        more = large.vocab_size - small.vocab_size
        extra = self._random(more, small.hidden_size, float(embedding.std()))
        yield "model.embed_tokens.weight", torch.cat([embedding, extra]) @ self._hidden
        head = torch.cat([embedding, embedding[PAD_TOKEN].expand(more, -1)])
        yield "lm_head.weight", self._reader(head, source["model.norm.weight"])
        yield "model.norm.weight", self._norm
        places = [round(i * (large.num_hidden_layers - 1) / (small.num_hidden_layers - 1))
                  for i in range(small.num_hidden_layers)]  # fmt: skip
        for layer in range(large.num_hidden_layers):
            here = {}
            if layer in places:
                prefix = f"model.layers.{places.index(layer)}."
                here = {n.removeprefix(prefix): w for n, w in source.items() if n.startswith(prefix)}
            for name, weight in self._layer(here):
                yield f"model.layers.{layer}.{name}", weight

    def _layer(self, here: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """A layer of the demo model, or one that adds nothing."""
        large = self._large
        hidden, inner = large.hidden_size, large.intermediate_size
        yield "input_layernorm.weight", self._norm
        yield "post_attention_layernorm.weight", self._norm
        heads, kv_heads = large.num_attention_heads, large.num_key_value_heads
        matrices = {f"{n}_proj": self._random(count * large.head_dim, hidden)
                    for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))}  # fmt: skip
        matrices["o_proj"] = torch.zeros(hidden, heads * large.head_dim, device=self._device)
        gate, up = self._random(inner, hidden), self._random(inner, hidden)
        down = torch.zeros(hidden, inner, device=self._device)
        if here:
            self._write_attention(matrices, here)
            used = self._small.intermediate_size
            norm = here["post_attention_layernorm.weight"]
            gate[:used] = self._reader(here["mlp.gate_proj.weight"], norm)
            up[:used] = self._reader(here["mlp.up_proj.weight"], norm)
            down[:, :used] = self._hidden.T @ here["mlp.down_proj.weight"]
        yield from ((f"self_attn.{name}.weight", matrix) for name, matrix in matrices.items())
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", down

    def _write_attention(self, matrices: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> None:
        small, large = self._small, self._large
        size, more = small.head_dim, large.head_dim
        half = torch.arange(size // 2, device=self._device) * (more // size)
        rotary = torch.cat([half, half + more // 2])  # where each dimension goes
        norm = here["input_layernorm.weight"]
        q, k, v = (self._reader(here[f"self_attn.{n}_proj.weight"], norm) for n in "qkv")
        o = self._hidden.T @ here["self_attn.o_proj.weight"]
        for head in range(small.num_key_value_heads):
            old, new = slice(head * size, (head + 1) * size), slice(head * more, (head + 1) * more)
            matrices["k_proj"][new] = 0
            matrices["k_proj"][head * more + rotary] = k[old]
            matrices["v_proj"][new] = self._values @ v[old]
        group = small.num_attention_heads // small.num_key_value_heads
        wide_group = large.num_attention_heads // large.num_key_value_heads
        for head in range(small.num_attention_heads):
            place = head // group * wide_group + head % group  # beside the same keys
            old, new = slice(head * size, (head + 1) * size), slice(place * more, (place + 1) * more)
            matrices["q_proj"][new] = 0
            matrices["q_proj"][place * more + rotary] = q[old] * math.sqrt(more / size)
            matrices["o_proj"][:, new] = o[:, old] @ self._values.T

    def _reader(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """A matrix that reads normed hidden states: ``[n, d]`` to ``[n, D]``."""
        return (weight * norm) @ self._hidden

    def _random(self, rows: int, columns: int, deviation: float | None = None) -> torch.Tensor:
        values = torch.randn(rows, columns, device=self._device, generator=self._generator)
        return values * (columns**-0.5 if deviation is None else deviation)

    def _rotation(self, size: int) -> torch.Tensor:
        """An orthogonal matrix without zeros: Sylvester's Hadamard matrix, its columns with random signs."""
        assert size & (size - 1) == 0, f"{size} is no power of two"
        matrix = torch.ones(1, 1, device=self._device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs = torch.randint(0, 2, (size,), device=self._device, generator=self._generator) * 2.0 - 1.0
        return matrix * signs * size**-0.5
