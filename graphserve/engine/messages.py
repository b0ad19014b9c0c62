"""What the API process and the engine process say to each other, and how it is framed on their socketpair.

A frame is a little-endian 32-bit length and one msgpack message, typed by its tag. Nothing is ever unpickled, and the
socket has no name or port that a third process could open.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from graphserve.outputs import PositionLogprobs
from graphserve.progress import PhaseEvent
from graphserve.sampling_params import SamplingParams

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 2**20


class StartEngine(msgspec.Struct, tag=True):
    """First message: load this configuration (fields of ``EngineConfig``)."""

    config: dict[str, Any]


class AddRequest(msgspec.Struct, tag=True):
    """Begin a request. ``prompt`` is the text that ``prompt_token_ids`` came from, if it came from text."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None


class AbortRequests(msgspec.Struct, tag=True):
    """End these requests without further output; unknown and finished ids are ignored."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag=True):
    """Give all memory back and exit with status 0."""


ToEngine = StartEngine | AddRequest | AbortRequests | Shutdown


class ConvertedTokenizer(msgspec.Struct, frozen=True):
    """A tokenizer that transformers made: what the tokenizers library reads, and what a ``Tokenizer`` holds besides."""

    json: str
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


class TokenizerSource(msgspec.Struct, frozen=True, tag=True):
    """What the API process makes its own tokenizer of, which never takes transformers. Sent once, before EngineReady.

    A folder with ``tokenizer.json`` is named before the engine loads anything, so that both processes read it
    meanwhile. A converted tokenizer comes when the engine has it. Neither: the engine runs without a tokenizer.
    """

    folder: str | None = None
    converted: ConvertedTokenizer | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the loaded model that the API process needs. ``max_logprobs``: -1 for no limit."""

    model: str
    served_model_names: list[str]
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    vocab_size: int
    num_blocks: int
    block_size: int
    default_sampling_params: dict[str, Any]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine. Counters (``*_total``) only grow within one engine process."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_in_use: int = 0
    num_blocks: int = 0
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_steps_total: int = 0
    num_sync_steps_total: int = 0
    num_variant_steps_total: dict[str, int] = {}
    num_eager_steps_total: int = 0
    num_graphs: int = 0
    graph_bytes: int = 0

    def plus_counters(self, other: EngineStats) -> EngineStats:
        """The sums of both sides' counters, with gauges at zero."""
        sums: dict[str, Any] = {}
        for name in self.__struct_fields__:
            if name.endswith("_total"):
                ours, others = getattr(self, name), getattr(other, name)
                if isinstance(ours, dict):
                    sums[name] = {key: ours.get(key, 0) + others.get(key, 0) for key in {**ours, **others}}
                else:
                    sums[name] = ours + others
        return EngineStats(**sums)


class OutputDelta(msgspec.Struct, array_like=True):
    """What one step added to choice ``index`` of a request: a ``RequestOutput`` without what the caller knows already.

    Mutable, because deltas that wait together are merged. ``prompt_logprobs`` comes once, with the first delta.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None

    def merge(self, later: OutputDelta) -> None:
        """Append a later delta of the same choice."""
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)


class Progressed(msgspec.Struct, tag=True):
    """A phase of loading or compiling changed."""

    event: PhaseEvent


class EngineReady(msgspec.Struct, tag=True):
    """The engine takes requests from now on."""

    info: EngineInfo
    stats: EngineStats


class EngineFailed(msgspec.Struct, tag=True):
    """Last message of a process that could not start or whose loop broke.

    ``kind`` is the class name within ``graphserve.errors``, or another exception's name; ``traceback`` is for the log.
    """

    kind: str
    message: str
    traceback: str


class StepOutputs(msgspec.Struct, tag=True):
    """The outputs of one step (none after an abort between steps) and the stats after it."""

    deltas: list[OutputDelta]
    stats: EngineStats


class RequestEnded(msgspec.Struct, tag=True):
    """A request ended with an error of its own. ``is_client_error`` tells a 400 from a 500."""

    request_id: str
    message: str
    param: str | None
    is_client_error: bool


FromEngine = Progressed | TokenizerSource | EngineReady | EngineFailed | StepOutputs | RequestEnded

MessageT = TypeVar("MessageT")


class MessageSocket(Generic[MessageT]):
    """Blocking ends of the socketpair: :meth:`send` from any thread, :meth:`receive` from one."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        self._sock = sock
        self._decoder = decoder
        self._send_lock = threading.Lock()

    def send(self, message: object) -> None:
        """Write one frame; blocks while the other side does not read."""
        data = encode_frame(message)
        with self._send_lock:
            self._sock.sendall(data)

    def receive(self) -> MessageT | None:
        """The next message, or None when the other side is gone."""
        header = self._read(HEADER.size)
        if header is None:
            return None
        payload = self._read(frame_length(header))
        return None if payload is None else self._decoder.decode(payload)

    def close(self) -> None:
        self._sock.close()

    def _read(self, num_bytes: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < num_bytes:
            try:
                part = self._sock.recv(min(num_bytes - len(parts), 2**20))
            except ConnectionError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)


def encode_frame(message: object) -> bytes:
    """Length and payload of one message.

    Raises:
        ValueError: the message is larger than a frame may be.
    """
    payload = msgspec.msgpack.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload)) + payload


def frame_length(header: bytes) -> int:
    """Payload length from a frame's header.

    Raises:
        ValueError: the length exceeds the limit: the stream is out of step.
    """
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return int(length)
