"""What was typed becomes what a task's signature asks for, or an error that names the key, and what is wanted."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

from git_model.errors import UserError, nearest
from git_model.tasks.params import SHOWN, Node, Scalar, show

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds, both allowed, of a number: ``beams: Annotated[int, Range(1, 100)]``."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"from {self.low:.12g} to {self.high:.12g}"


def to_node(value: Any) -> Node:
    """Turn a plain Python value (a call from Python, not from a shell) into a raw one."""
    if isinstance(value, Scalar):
        return value
    if isinstance(value, str | PurePath):
        return Scalar(str(value), plain=False)
    if isinstance(value, Mapping):
        return {str(key): to_node(item) for key, item in value.items()}
    return [to_node(v) for v in value] if isinstance(value, list | tuple) else Scalar(str(value))


def wanted(annotation: Any) -> str:
    """Return what an annotation asks for, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return " ".join([wanted(args[0]), *(str(a) for a in args[1:] if isinstance(a, Range))])
    if origin is Literal:
        return f"one of: {', '.join(str(a) for a in args)}"
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(a) for a in args)
    if origin is tuple and args[-1] is not ...:
        return f"a list of {len(args)} ({', '.join(wanted(a) for a in args)})"
    if origin in (list, tuple):
        return f"a list ({wanted(args[0])} each)"
    if origin is dict:
        return f"a mapping (name: {wanted(args[1])})"
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
    return words.get(annotation, "null")


def convert(value: Node, annotation: Any, where: str) -> Any:
    """Turn a raw value into the annotated type.

    Args:
        value: what was typed.
        annotation: str, bool, int, float, None, Literal, list, tuple, dict by names, unions of them, or
            ``Annotated[number, Range(low, high)]``.
        where: the key, for the message.

    Raises:
        UserError: names the key, what was got and what is wanted.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    refusal = UserError(f"{where} must be {wanted(annotation)}, got {show(value)}")
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where, refusal)
    if origin in (list, tuple):
        items = value if isinstance(value, list) else None
        each = args if origin is tuple and args[-1] is not ... else args[:1] * len(items or ())
        if items is None or len(items) != len(each):
            raise refusal
        return origin(convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(items, each, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise refusal
        return {name: convert(item, args[1], f"{where}.{name}") for name, item in value.items()}
    if not isinstance(value, Scalar):
        raise refusal
    if origin is Literal:
        for choice in args:
            if value.text == str(choice):
                return choice
        raise UserError(f"{refusal}{nearest(value.text[:SHOWN], [str(a) for a in args])}")
    number = _convert_scalar(value, args[0] if origin is Annotated else annotation, refusal)
    if origin is Annotated and not all(a.low <= number <= a.high for a in args[1:] if isinstance(a, Range)):
        raise refusal
    return number


def _convert_union(value: Node, members: tuple[Any, ...], where: str, refusal: UserError) -> Any:
    if isinstance(value, Scalar) and value.is_null and type(None) in members:
        return None
    for member in members:
        if member is type(None):
            continue
        try:
            return convert(value, member, where)
        except UserError as error:
            # the error inside a list or mapping names the item, which is closer than the union's
            kinds = (list, tuple) if isinstance(value, list) else (dict,) if isinstance(value, dict) else ()
            if typing.get_origin(member) in kinds:
                refusal = error
    raise refusal


def _convert_scalar(value: Scalar, annotation: Any, refusal: UserError) -> Any:
    if value.is_null and annotation is type(None):
        return None
    if value.is_null and value.text:
        raise UserError(f"{refusal} (quote it if the word is meant)" if annotation is str else str(refusal))
    if annotation is str:
        return value.text
    if annotation is bool and value.text.lower() in _BOOLS:
        return _BOOLS[value.text.lower()]
    if annotation is int and _INT.fullmatch(value.text):
        return int(value.text)
    if annotation is float and _FLOAT.fullmatch(value.text) and math.isfinite(float(value.text)):
        return float(value.text)
    raise refusal
