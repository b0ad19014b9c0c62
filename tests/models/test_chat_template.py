"""Chat templates: where they come from, what they may see, how a refusal reads."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from graphserve.errors import ConfigError, RequestError
from graphserve.models.chat_template import render_chat
from graphserve.models.chat_template_files import read_chat_templates, resolve_chat_template

USER = [{"role": "user", "content": "hello"}]


def render(template: str, messages: Any = USER, **options: Any) -> str:
    return render_chat(template, messages, **options)


def test_blocks_leave_no_blank_lines() -> None:
    template = "{% for message in messages %}\n  {% if true %}\n{{ message.content }}\n  {% endif %}\n{% endfor %}\nend"
    assert render(template) == "hello\nend"


def test_loop_controls_and_generation_blocks_work() -> None:
    template = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(template, [*USER, *USER]) == "hello"


def test_tojson_keeps_html_and_letters() -> None:
    assert render("{{ messages[0] | tojson }}", [{"role": "é", "content": "<b>&'"}]) == (
        '{"role": "é", "content": "<b>&\'"}'
    )


def test_strftime_now_is_the_present() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_variables_reach_the_template_and_default_to_undefined() -> None:
    template = "{{ bos_token }}{{ enable_thinking }}{{ tools }}{{ documents }}{{ add_generation_prompt }}"
    assert render(template, variables={"bos_token": "<s>"}) == "<s>NoneNoneTrue"
    assert render(template, variables={"enable_thinking": False}, tools=[], add_generation_prompt=False) == (
        "False[]NoneFalse"
    )


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_found_under_any_of_its_names(key: str) -> None:
    messages = [{"role": "assistant", "content": "2", key: "easy"}]
    assert render("{{ messages[0].reasoning_content }} {{ messages[0].thinking }}", messages) == "easy easy"


def test_the_final_message_is_left_open() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": "The answer "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(template, messages, **options) == "<user>hello</><assistant>The answer "
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "So"}]}]
    assert render("<{{ messages[0].content[0].text }}>", parts, **options) == "<So"
    assert messages[1]["content"] == "The answer "


REFUSED_CONTINUATIONS = {
    "with a generation prompt": ({"add_generation_prompt": True}, USER, "{{ messages }}", "cannot both be true"),
    "dropped by the template": ({"add_generation_prompt": False}, USER, "nothing", "dropped the last message"),
    "no text": ({"add_generation_prompt": False}, [{"role": "user", "content": None}], "x", "no text content"),
    "no message": ({"add_generation_prompt": False}, [], "x", "no text content"),
}


@pytest.mark.parametrize("case", REFUSED_CONTINUATIONS)
def test_what_cannot_be_continued_is_refused(case: str) -> None:
    options, messages, template, message = REFUSED_CONTINUATIONS[case]
    with pytest.raises(RequestError, match=message) as raised:
        render(template, messages, continue_final_message=True, **options)
    assert raised.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'].missing.deeper }}", "no attribute 'missing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "refused the messages"),
        ("{% for %}", "not valid Jinja"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_failing_template_is_a_request_error(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ tools.__init__.__globals__ }}",
        "{{ '%s' | attr('__class__') }}",
    ],
)
def test_a_template_cannot_change_its_input_or_reach_python(template: str) -> None:
    try:
        text = render(template, tools=[{}])
    except RequestError:
        return
    assert text == ""  # an attribute that the sandbox hides renders as undefined


@pytest.mark.parametrize("value", [object(), {1, 2}, Path("x"), print, b"bytes"])
def test_values_that_are_not_json_are_refused_by_place(value: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.content is a \w+; allowed: str") as raised:
        render("{{ messages }}", [{"role": "user", "content": value}])
    assert raised.value.param == "messages"


def test_a_message_that_is_not_an_object_is_refused() -> None:
    with pytest.raises(RequestError, match="each message must be an object with role and content, found 'hello'"):
        render("{{ messages }}", ["hello"])


def test_files_win_over_the_tokenizer_config(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path, {}) == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert read_chat_templates(tmp_path, {}) == {"default": "legacy"}
    stored = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read_chat_templates(tmp_path, {"chat_template": stored}) == {"default": "a", "tool_use": "b"}
    assert read_chat_templates(tmp_path, {"chat_template": "text"}) == {"default": "text"}
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert read_chat_templates(tmp_path, {"chat_template": "text"}) == {"default": "file", "rag": "rag"}


def test_an_option_names_a_file_or_is_the_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert resolve_chat_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"
    assert resolve_chat_template("{{ bos_token }}") == "{{ bos_token }}"
    with pytest.raises(ConfigError, match=r"chat_template='no\.jinja' is neither an existing file nor Jinja text"):
        resolve_chat_template("no.jinja")
