"""Offline use: many prompts in, all answers out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from graphserve.config import EngineConfig
from graphserve.engine.input_processor import Prompt
from graphserve.engine.llm_engine import LLMEngine
from graphserve.errors import ConfigError, EngineDeadError, RequestError
from graphserve.outputs import RequestOutput
from graphserve.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from graphserve.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


class LLM:
    """A loaded model.

        with LLM("demo") as llm:
            for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)

    Leaving the ``with``, or :meth:`close`, gives weights, KV cache and buffers back.

    Args:
        model: local folder, hub id, or ``"demo"``.
        options: any field of :class:`~graphserve.config.EngineConfig`.

    Raises:
        ConfigError: an option's name or value is not allowed.
        GraphserveError: the model cannot be loaded or compiled.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self._engine: LLMEngine | None = LLMEngine.from_config(EngineConfig.from_kwargs(model=model, **options))
        self._request_numbers = itertools.count()

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> LLM:
        """Use an engine that exists already; :meth:`close` closes it."""
        llm = cls.__new__(cls)
        llm._engine = engine
        llm._request_numbers = itertools.count()
        return llm

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine underneath.

        Raises:
            EngineDeadError: the LLM is closed.
        """
        if self._engine is None:
            raise EngineDeadError("this LLM is closed: make a new one")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: text, token ids, a dict with ``prompt`` or ``prompt_token_ids``, or a list of those.
            sampling_params: one for all, or one a prompt; None takes the model's defaults.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One finished output a prompt, in the order of the prompts. A request that failed while it ran has
            ``error`` set and the finish reason "error"; the others are not affected.

        Raises:
            RequestError: a prompt or a parameter is not allowed; nothing was computed.
            EngineDeadError: the engine stopped.
        """
        prompt_list = _as_prompt_list(prompts)
        return self._run(prompt_list, self._params_list(sampling_params, len(prompt_list)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Args:
            messages: one conversation (a list of dicts with ``role`` and ``content``) or a list of them.
            sampling_params: as in :meth:`generate`.
            chat_template: Jinja text (or the name of one of the model's) instead of the model's default.
            add_generation_prompt: open the assistant's turn at the end.
            continue_final_message: let the model go on with the last message instead.
            tools: JSON schemas of tools, for templates that know them.
            chat_template_kwargs: further variables of the template.

        Returns:
            As :meth:`generate`; ``prompt`` is the rendered conversation.
        """
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = []
        for conversation in _as_conversations(messages):
            text = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            # The template has written the special tokens itself.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self._run(prompts, self._params_list(sampling_params, len(prompts)), use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the LLM was made with ``skip_tokenizer_init=True``.
        """
        tokenizer = self.llm_engine.tokenizer
        if tokenizer is None:
            raise ConfigError("this LLM has no tokenizer: make it without skip_tokenizer_init=True")
        return tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters used where none are given; changing the copy changes nothing else."""
        return self.llm_engine.default_sampling_params()

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back until :meth:`wake_up`. See :meth:`LLMEngine.sleep`."""
        self.llm_engine.sleep(level)

    def wake_up(self) -> None:
        """Take memory and weights back. See :meth:`LLMEngine.wake_up`."""
        self.llm_engine.wake_up()

    def is_sleeping(self) -> bool:
        """Whether the model sleeps; requests are then refused."""
        return self.llm_engine.is_sleeping()

    def close(self) -> None:
        """Give all memory back. May be called more than once."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * num_prompts
        if len(params) != num_prompts:
            raise RequestError(
                f"{len(params)} sampling_params for {num_prompts} prompts: give one for all, or one each",
                param="sampling_params",
            )
        return list(params)

    def _run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        engine = self.llm_engine
        if engine.has_unfinished_requests():
            raise RequestError("the engine of this LLM has requests from add_request: run them to their end first")
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, one in zip(prompts, params, strict=True):
                request_id = str(next(self._request_numbers))
                engine.add_request(request_id, prompt, one.clone(output_kind=RequestOutputKind.FINAL_ONLY))
                ids.append(request_id)
            with tqdm(total=len(ids), desc="Generated", unit="prompt", disable=not use_tqdm) as bar:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        done[output.request_id] = output
                        bar.update()
                        if output.error is not None:
                            logger.error("request %s failed: %s", output.request_id, output.error)
        except BaseException:
            engine.abort(*ids)
            raise
        return [done[request_id] for request_id in ids]


def _as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several. A sequence whose items are integers is one prompt of ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and not isinstance(items[0], (str, Mapping)) and not isinstance(items[0], Iterable):
        return [items]
    return items


def _as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    if not messages:
        raise RequestError("messages is empty: give at least one message", param="messages")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]
