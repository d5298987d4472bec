"""Plain values (YAML, flags, checkpoints) into annotated dataclasses and back, with errors that teach."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from git_model.errors import UserError, nearest

T = TypeVar("T")


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Read a nested mapping into the dataclass `cls`.

    Args:
        cls: a frozen dataclass of this module.
        values: nested mapping; missing keys take their defaults.
        where: dotted path for messages.

    Raises:
        UserError: unknown key (with the nearest name), wrong type, value outside its list.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the config'} must be a mapping, got {_show(values)}")
    hints = typing.get_type_hints(cls)
    read = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"unknown key '{path}'{nearest(str(key), hints)}; one of: {', '.join(hints)}")
        read[key] = convert(value, hints[key], path)
    return cls(**read)


def convert(value: Any, hint: Any, where: str) -> Any:
    """Turn a YAML value or a flag's text into the annotated type, or say what was wanted.

    Raises:
        UserError: names the key, the value and the wanted type.
    """
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        return convert(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{where} must be a list, got {_show(value)}")
        return tuple(convert(v.strip() if isinstance(v, str) else v, args[0], where) for v in items if v != "")
    if origin is not None:  # Mapping[str, Any]: a source; its keys are checked by the source itself
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping such as {{type: tsv, ...}}, got {_show(value)}")
        return dict(value)
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is bool:
        return value if isinstance(value, bool) else read_bool(value, where)
    if hint is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            _refuse(value, where, "a text")
        return str(value)
    wanted = "a whole number" if hint is int else "a finite number"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _refuse(value, where, wanted)
    try:
        number = hint(value.strip() if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        _refuse(value, where, wanted)
    if not math.isfinite(number) or float(value) != number:
        _refuse(value, where, wanted)
    return number


def read_bool(value: Any, where: str) -> bool:
    """Read True/False in the spellings people type (true, yes, 1...).

    Raises:
        UserError: names the key and the value.
    """
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(value).strip().lower()
    if text not in known:
        _refuse(value, where, "True or False")
    return known[text]


def _refuse(value: Any, where: str, wanted: str) -> typing.NoReturn:
    raise UserError(f"{where} must be {wanted}, got {_show(value)}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain nested dicts, lists and scalars: what YAML and checkpoints hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def read_value(text: str, where: str) -> Any:
    """Read what stands behind a key: a list or mapping as in a recipe, else the text itself.

    Raises:
        UserError: a bracket that is no YAML.
    """
    import yaml

    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe file.

    Raises:
        UserError: missing file, bad YAML, or no mapping in it.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must hold a mapping with: vision, mapper, language, data, train")
    return values
