"""Command-line flags made from the fields of a msgspec struct: one source for names, types, defaults and help.

``max_num_seqs: int = 64`` becomes ``--max-num-seqs N``; a bool becomes ``--flag`` and ``--no-flag``; a ``Literal``
becomes a choice; a list repeats its flag; a dict takes JSON. Help texts are the struct's ``Attributes:`` section. A
flag that is not given leaves no trace in the namespace, so that defaults stay where they are defined.
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec


def add_struct_options(
    parser: argparse._ActionsContainer, kind: type[msgspec.Struct], names: Iterable[str] | None = None
) -> None:
    """Add a flag for each of the struct's fields, or for those in ``names``."""
    hints = get_type_hints(kind)
    help_of = attribute_help(kind)
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    for name in names if names is not None else kind.__struct_fields__:
        text = help_of.get(name, "").replace("%", "%%")
        default = defaults[name]
        if default not in (msgspec.NODEFAULT, None, ""):
            text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        if "list[" in str(hints[name]):
            text += "; may be repeated"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **_argument(hints[name], name))


def given_options(options: argparse.Namespace, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The struct's fields that were given on the command line."""
    return {name: value for name, value in vars(options).items() if name in kind.__struct_fields__}


def attribute_help(kind: type) -> dict[str, str]:
    """Field → text, from the ``Attributes:`` section of a Google docstring."""
    lines = (kind.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    texts: dict[str, str] = {}
    indent, name = None, ""
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        indent = depth if indent is None else indent
        if depth < indent:
            break  # the next section
        match = re.match(r"(\w+): (.*)", line.strip()) if depth == indent else None
        if match:
            name = match[1]
            texts[name] = match[2]
        else:
            texts[name] += " " + line.strip()
    return {name: re.sub(r"``|:class:`|`", "", text).rstrip(".") for name, text in texts.items()}


def _argument(hint: Any, name: str) -> dict[str, Any]:
    """``add_argument`` keywords for a field's type."""
    choices = [part for part in _members(hint) if part is not type(None)]
    if choices == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    lists = [part for part in choices if get_origin(part) is list]
    if lists:
        # one word a flag: a flag that takes several would swallow the MODEL behind it
        return {"action": "append", "type": get_args(lists[0])[0], "metavar": name.split("_")[-1].upper()}
    kind = choices[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is dict:
        return {"type": json_object, "metavar": "JSON"}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, name.split("_")[-1].upper())}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def json_object(text: str) -> dict[str, Any]:
    """A flag's value as a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
