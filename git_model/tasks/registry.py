"""What a user may ask for: public names of tasks, and the one way they are called."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from git_model.errors import UserError, nearest
from git_model.tasks.caption import caption_image
from git_model.tasks.data import make_shapes, prepare_coco, prepare_tsv, prepare_vqa
from git_model.tasks.demo import demo
from git_model.tasks.dense import dense_caption, dense_caption_tsv
from git_model.tasks.evaluate import evaluate
from git_model.tasks.export import convert_coco_to_tsv_format, convert_tsv_to_coco_format, convert_tsv_to_vqa_json
from git_model.tasks.export_model import export
from git_model.tasks.features import encode_features
from git_model.tasks.paragraph import image_to_paragraph
from git_model.tasks.params import Scalar, show
from git_model.tasks.prompt import embed_prompt, make_prompt_bank
from git_model.tasks.prompt_split import split_prompts
from git_model.tasks.recover import image_to_prompt
from git_model.tasks.retrieval import evaluate_retrieval
from git_model.tasks.score import evaluate_on_coco_caption, evaluate_on_vqa
from git_model.tasks.submission import (
    evaluate_on_prompt_similarity,
    fit_weights,
    score_submission,
    write_submission,
)
from git_model.tasks.tsv import caption_tsv, merge_tsv_parts
from git_model.tasks.values import convert, to_node, wanted

Task = Callable[..., Any]

# The names are the original's where it had one. A task is a function of keyword-only, annotated
# arguments that imports its heavy modules inside; its signature is the schema of its keys
# (an argument that is a dataclass of options.py stands for its fields).
TASKS: dict[str, Task] = {
    "test_git_inference_single_image": caption_image,
    "test_git_inference_single_tsv": caption_tsv,
    "merge_tsv_parts": merge_tsv_parts,
    "evaluate_on_coco_caption": evaluate_on_coco_caption,
    "evaluate_on_vqa": evaluate_on_vqa,
    "convert_tsv_to_vqa_json": convert_tsv_to_vqa_json,
    "convert_tsv_to_coco_format": convert_tsv_to_coco_format,
    "convert_coco_to_tsv_format": convert_coco_to_tsv_format,
    "evaluate": evaluate,
    "export": export,
    "make_shapes": make_shapes,
    "prepare_coco": prepare_coco,
    "prepare_vqa": prepare_vqa,
    "prepare_tsv": prepare_tsv,
    "encode_features": encode_features,
    "dense_caption": dense_caption,
    "dense_caption_tsv": dense_caption_tsv,
    "image_to_paragraph": image_to_paragraph,
    "evaluate_retrieval": evaluate_retrieval,
    "image_to_prompt": image_to_prompt,
    "embed_prompt": embed_prompt,
    "make_prompt_bank": make_prompt_bank,
    "evaluate_on_prompt_similarity": evaluate_on_prompt_similarity,
    "fit_weights": fit_weights,
    "write_submission": write_submission,
    "score_submission": score_submission,
    "split_prompts": split_prompts,
    "demo": demo,
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
        raise UserError(f"unknown type {_quoted(show(name))}{near}; one of: {', '.join(tasks)}")
    task = tasks[name.text]
    allowed = keys_of(task)
    groups: dict[str | None, dict[str, Any]] = {key.group: {} for key in allowed.values()}
    for key, value in params.items():
        if key == "type":
            continue
        if key not in allowed:
            shown = show(Scalar(key))
            raise UserError(
                f"unknown key '{shown}' for {name.text}{nearest(key[:80], allowed)}; one of: {', '.join(allowed)}"
            )
        groups[allowed[key].group][key] = convert(to_node(value), allowed[key].annotation, key)
    missing = [name for name, key in allowed.items() if key.required and name not in groups[key.group]]
    if missing:
        keys = f"keys {', '.join(missing)}" if len(missing) > 1 else f"key {missing[0]}"
        raise UserError(f"{name.text} needs the {keys}; all its keys: {', '.join(allowed)}")
    arguments = groups.pop(None, {})
    hints = typing.get_type_hints(task)
    return task, arguments | {group: hints[group](**given) for group, given in groups.items() if group}


@dataclass(frozen=True)
class Key:
    """One key of `-p`: an argument of the task, or a field of an argument that is a group of options."""

    annotation: Any
    default: Any
    group: str | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default in (inspect.Parameter.empty, MISSING)


def keys_of(task: Task) -> dict[str, Key]:
    """Return a task's keys by name, in the order of its signature."""
    hints = typing.get_type_hints(task, include_extras=True)
    keys: dict[str, Key] = {}
    for name, parameter in inspect.signature(task).parameters.items():
        if is_dataclass(hints[name]):
            inner = typing.get_type_hints(hints[name], include_extras=True)
            keys |= {f.name: Key(inner[f.name], f.default, name) for f in fields(hints[name])}
        else:
            keys[name] = Key(hints[name], parameter.default)
    return keys


def _quoted(text: str) -> str:
    return text if text[:1] in "'\"" else f"'{text}'"


def describe(tasks: Mapping[str, Task] = TASKS) -> str:
    """Return the help text: each type, what it does, and its keys with types and defaults."""
    lines = []
    for name, task in tasks.items():
        told = [f"    {line}" for line in (inspect.getdoc(task) or "").splitlines() if line]
        lines += [f"'type': '{name}'", *told]
        for shown, key in keys_of(task).items():
            default = "required" if key.required else _show_default(key.default)
            lines.append(f"      {shown:<20} {wanted(key.annotation)} [{default}]")
        lines.append("")
    return "\n".join(lines)


def _show_default(value: Any) -> str:
    return "null" if value is None else repr(value)
