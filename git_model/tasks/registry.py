"""What a user may ask for: public names of tasks, and the one way they are called."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from git_model.errors import UserError, nearest
from git_model.tasks.caption import caption_image
from git_model.tasks.data import make_shapes, prepare_coco, prepare_tsv, prepare_vqa
from git_model.tasks.evaluate import evaluate
from git_model.tasks.export import convert_coco_to_tsv_format, convert_tsv_to_coco_format, convert_tsv_to_vqa_json
from git_model.tasks.params import Scalar, convert, show, to_node, wanted
from git_model.tasks.score import evaluate_on_coco_caption, evaluate_on_vqa
from git_model.tasks.tsv import caption_tsv

Task = Callable[..., Any]

# The names are the original's where it had one. A task is a function of keyword-only, annotated
# arguments that imports its heavy modules inside; its signature is the schema of its keys.
TASKS: dict[str, Task] = {
    "test_git_inference_single_image": caption_image,
    "test_git_inference_single_tsv": caption_tsv,
    "evaluate_on_coco_caption": evaluate_on_coco_caption,
    "evaluate_on_vqa": evaluate_on_vqa,
    "convert_tsv_to_vqa_json": convert_tsv_to_vqa_json,
    "convert_tsv_to_coco_format": convert_tsv_to_coco_format,
    "convert_coco_to_tsv_format": convert_coco_to_tsv_format,
    "evaluate": evaluate,
    "make_shapes": make_shapes,
    "prepare_coco": prepare_coco,
    "prepare_vqa": prepare_vqa,
    "prepare_tsv": prepare_tsv,
}


def run(params: Mapping[str, Any], tasks: Mapping[str, Task] = TASKS) -> Any:
    """Call the task that ``params['type']`` names, with the other keys as its arguments.

    Args:
        params: what `parse_params` returned, or plain Python values.
        tasks: the table of tasks.

    Raises:
        UserError: unknown type; unknown, missing or mistyped key.
    """
    task, arguments = resolve(params, tasks)
    return task(**arguments)


def resolve(params: Mapping[str, Any], tasks: Mapping[str, Task] = TASKS) -> tuple[Task, dict[str, Any]]:
    """Return the task and its checked arguments, without calling it."""
    name = to_node(params.get("type"))
    if not isinstance(name, Scalar) or name.is_null or name.text not in tasks:
        near = nearest(name.text[:80], tasks) if isinstance(name, Scalar) else ""
        raise UserError(f"unknown type '{show(name)}'{near}; one of: {', '.join(tasks)}")
    task = tasks[name.text]
    hints = typing.get_type_hints(task, include_extras=True)
    allowed = inspect.signature(task).parameters
    arguments = {}
    for key, value in params.items():
        if key == "type":
            continue
        if key not in allowed:
            shown = show(Scalar(key))
            raise UserError(
                f"unknown key '{shown}' for {name.text}{nearest(key[:80], allowed)}; one of: {', '.join(allowed)}"
            )
        arguments[key] = convert(to_node(value), hints[key], key)
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in arguments]
    if missing:
        keys = f"keys {', '.join(missing)}" if len(missing) > 1 else f"key {missing[0]}"
        raise UserError(f"{name.text} needs the {keys}; all its keys: {', '.join(allowed)}")
    return task, arguments


def describe(tasks: Mapping[str, Task] = TASKS) -> str:
    """Return the help text: each type, what it does, and its keys with types and defaults."""
    lines = []
    for name, task in tasks.items():
        summary = (inspect.getdoc(task) or "").partition("\n\n")[0].replace("\n", " ")
        lines += [f"'type': '{name}'", *([f"    {summary}"] if summary else [])]
        hints = typing.get_type_hints(task, include_extras=True)
        for key, parameter in inspect.signature(task).parameters.items():
            default = "required" if parameter.default is parameter.empty else _show_default(parameter.default)
            lines.append(f"      {key:<20} {wanted(hints[key])} [{default}]")
        lines.append("")
    return "\n".join(lines)


def _show_default(value: Any) -> str:
    return "null" if value is None else repr(value)
