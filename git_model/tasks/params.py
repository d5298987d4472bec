"""The safe reader of ``-p``: YAML text -> raw values -> the types a task's signature asks for.

YAML is read as a stream of events and never constructed: nothing a text says can name a Python
object, and every limit is checked while reading. A value stays raw text until the schema says what
it is, so ``no``, ``0123``, ``1e-5`` and ``12:30:45`` mean what the task wants, not what YAML guesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

import yaml

from git_model.errors import UserError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_KEYS = 256
MAX_VALUES = 2048
SHOWN = 80  # characters of a value that a message repeats

# control characters, byte-order marks, lone surrogates, and the marks that reorder text on a screen
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
# A quoted YAML scalar, or a shell's line continuation outside of one. A quote opens only where a value may
# start ("what's" opens none); a backslash that ends a plain value (C:\data\) is its own. `*+`: linear time.
_CONTINUATION = re.compile(
    r"""(?<![^\s{\[,:])(?:"(?:[^"\\]|\\.)*+"|'(?:[^']|'')*+')|(?<=[\s{\[,\]}"'])\\[ \t]*(?:\r\n|\n|\r)""", re.DOTALL
)
_NULLS = frozenset({"", "~", "null", "Null", "NULL", "None"})
_EXAMPLE = "-p expects a mapping with 'type', such as \"{'type': 'evaluate', ...}\""


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as it was typed: its text, and whether it stood there without quotes."""

    text: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        """Whether this is an unquoted null, in YAML's or in Python's spelling."""
        return self.plain and self.text in _NULLS


Node: TypeAlias = Union[Scalar, "list[Node]", "dict[str, Node]"]


def escape(text: str) -> str:
    """Return `text` on one line: what a terminal would obey (newlines, escapes) becomes ``\\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: Node) -> str:
    """Return a value for a message: as it was typed, on one line, at most 80 characters."""
    if isinstance(value, Scalar):
        text = value.text[:SHOWN]  # cut first: the text may be 64 KiB
        text = (text or "nothing") if value.plain else repr(text)
    elif isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value[:9])}]"
    else:
        text = f"{{{', '.join(f'{key[:SHOWN]}: {show(item)}' for key, item in list(value.items())[:9])}}}"
    text = escape(text)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def parse_params(text: str, task_types: Iterable[str] = ()) -> dict[str, Node]:
    """Read the text behind ``-p`` into raw values.

    Args:
        text: a YAML mapping, flow or block; a shell's backslash-newlines may be left in it.
        task_types: the names allowed for 'type', for messages only.

    Raises:
        UserError: no mapping with a 'type', bad YAML, a tag, an alias, a key given twice, a
            forbidden character, or more than 64 KiB, 16 levels, 256 keys or 2048 values.
    """
    names = ", ".join(task_types)
    expected = _EXAMPLE + (f"; 'type' is one of: {names}" if names else "")
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UserError(f"-p is longer than {MAX_BYTES} bytes")
    _check_characters(text)
    if text.lstrip().startswith("{"):  # in block style a line's end means something
        text = _CONTINUATION.sub(lambda m: "" if m[0][0] == "\\" else m[0], text)
    root = _build(_events(text))
    if not isinstance(root, dict):
        raise UserError(f"{expected}; got {'nothing' if root is None else show(root)}")
    if "type" not in root:
        raise UserError(f"{expected}; got only: {show([Scalar(key) for key in root])}")
    return root


def _check_characters(text: str) -> None:
    found = _FORBIDDEN.search(text)
    if found:
        raise UserError(f"-p holds the character U+{ord(found[0]):04X}, which is not allowed")


def _events(text: str) -> Iterator[yaml.Event]:
    """Yield YAML's events lazily, so that a refusal ends the reading there."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # same events, the C one is 20 times faster
    try:
        yield from yaml.parse(text, Loader=loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" is a ValueError of chr()
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"-p is not valid YAML{place}: {escape(problem)[:SHOWN]}") from error


@dataclass(slots=True)
class _Open:
    """A list or mapping being read, and the key that waits for its value."""

    node: Any  # dict[str, Node] or list[Node]
    key: str | None = None


def _build(events: Iterator[yaml.Event]) -> Node | None:
    """Turn events into nodes with a stack of its own: no depth can exhaust Python's."""
    root: Node | None = None
    stack: list[_Open] = []
    num_keys = num_values = 0
    for event in events:
        _check_event(event, root)
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        if stack and stack[-1].key is None and isinstance(stack[-1].node, dict):
            stack[-1].key = _read_key(event, stack[-1].node)
            num_keys += 1
            if num_keys > MAX_KEYS:
                raise UserError(f"-p has more than {MAX_KEYS} keys")
            continue
        num_values += 1
        if num_values > MAX_VALUES:
            raise UserError(f"-p has more than {MAX_VALUES} values")
        node = _new_node(event)
        if not stack:
            root = node
        elif isinstance(stack[-1].node, list):
            stack[-1].node.append(node)
        else:
            stack[-1].node[stack[-1].key] = node
            stack[-1].key = None
        if not isinstance(node, Scalar):
            stack.append(_Open(node))
            if len(stack) > MAX_DEPTH:
                raise UserError(f"-p is nested deeper than {MAX_DEPTH} levels")
    return root


def _check_event(event: yaml.Event, root: Node | None) -> None:
    """Refuse what gives YAML its power over the reader, whatever it stands on."""
    if isinstance(event, yaml.DocumentStartEvent):
        if root is not None:
            raise UserError("-p expects one mapping, got several YAML documents")
        if event.version or event.tags:
            raise UserError("-p: YAML directives (%YAML, %TAG) are not allowed")
    if getattr(event, "anchor", None) is not None:  # an AliasEvent has one, too
        sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
        raise UserError(f"-p: anchors and aliases not allowed, got {show(Scalar(sign + event.anchor))}")
    if getattr(event, "tag", None) is not None:
        raise UserError(f"-p: tags not allowed, got {show(Scalar(event.tag))}")


def _new_node(event: yaml.NodeEvent) -> Node:
    if isinstance(event, yaml.ScalarEvent):
        _check_characters(event.value)  # again: "\0" in double quotes
        return Scalar(event.value, plain=event.style in (None, ""))
    return {} if isinstance(event, yaml.MappingStartEvent) else []


def _read_key(event: yaml.NodeEvent, known: Mapping[str, Node]) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise UserError("-p: a key must be text, got a list or a mapping")
    _check_characters(event.value)
    if event.value == "<<":
        raise UserError("-p: merge keys (<<) not allowed")
    if event.value in known:
        raise UserError(f"-p has the key '{show(Scalar(event.value))}' twice")
    return event.value
