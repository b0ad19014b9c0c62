"""Where chat templates come from: a checkpoint's files, or an option. Finding one needs no Jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphserve.errors import ConfigError


def read_chat_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint by name; ``"default"`` is the one used unless tools are given and it has
    ``"tool_use"``. Files (``chat_template.jinja``, ``additional_chat_templates/``) win over tokenizer_config.json."""
    templates: dict[str, str] = {}
    if (path := model_dir / "chat_template.jinja").is_file():
        templates["default"] = path.read_text(encoding="utf-8")
    for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if templates:
        return templates
    stored = tokenizer_config.get("chat_template")
    if stored is None and (path := model_dir / "chat_template.json").is_file():
        stored = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, list):
        return {entry["name"]: entry["template"] for entry in stored}
    return dict(stored or {})


def resolve_chat_template(value: str) -> str:
    """An option's value (a file or Jinja text) as Jinja text.

    Raises:
        ConfigError: it is neither.
    """
    if "{" not in value:
        path = Path(value).expanduser()
        if path.is_file():
            return path.read_text(encoding="utf-8")
        raise ConfigError(
            f"chat_template={value!r} is neither an existing file nor Jinja text (which has a {{ in it): give one"
        )
    return value
