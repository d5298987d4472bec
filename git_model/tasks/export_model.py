"""The task that writes a trained model as a folder other programs serve: LLaVA's layout, or our own."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from git_model.errors import UserError
from git_model.saves import sync_folder
from git_model.tasks.options import check_model_path

if TYPE_CHECKING:
    from git_model.checkpoint import Loaded

MARK = "git_model_export"  # the key of config.json by which an export is known


def export(
    *,
    model_path: str,
    out_dir: str,
    format: Literal["auto", "llava", "native"] = "auto",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
) -> dict[str, Any]:
    """Write a checkpoint as a folder of safetensors: 'llava' for transformers and vLLM, 'native' for any other model.

    'auto' takes llava where it says the same as the checkpoint, else native, and tells why. `dtype` auto leaves the
    weights as they are (llava: in the language model's type, float32 where that was trained here).
    """
    check_model_path(model_path)
    _check_out_dir(Path(out_dir), Path(model_path))
    import torch

    kind = None if dtype == "auto" else getattr(torch, dtype)
    loaded, reason = _judged(model_path, format, kind)
    as_llava = format != "native" and not reason
    told = {"format": "llava" if as_llava else "native", "step": loaded.step, "metrics": loaded.metrics}

    def write(folder: Path) -> None:
        if as_llava:
            write_llava(folder, loaded, kind, told)
        else:
            from git_model.models.native import write_native

            write_native(folder, loaded.model, loaded.config, kind, told)

    write_folder(Path(out_dir), write)
    result: dict[str, Any] = {"out_dir": out_dir, "format": told["format"], "dtype": dtype}
    if format == "auto" and reason:
        result["why_not_llava"] = reason
    if loaded.trained_bits < 16:
        result["note"] = (
            f"trained on {loaded.trained_bits} bits, written with the language model's own weights: texts may differ"
        )
    files = sorted(p for p in Path(out_dir).rglob("*") if p.is_file())
    result["files"] = {str(p.relative_to(out_dir)): p.stat().st_size for p in files}
    return result


def whole_model(path: str, dtype: Any = None) -> Loaded:
    """Load a checkpoint with every weight as a plain tensor: the only form that can be written.

    What was trained on 8 or 4 bits gets the language model's own weights back, adapters are merged into them.

    Args:
        path: a checkpoint, or a native folder.
        dtype: of a decoder with adapters merged; None = its own.

    Raises:
        UserError: see `load_checkpoint`.
    """
    from dataclasses import replace

    from git_model.architecture import LoraConfig
    from git_model.checkpoint import load_checkpoint

    loaded = load_checkpoint(path, bits=16)
    if loaded.config.language.lora.rank:
        decoder = loaded.model.language.model
        own = decoder.dtype
        loaded.model.language.merge_adapters()
        decoder.to(dtype or own)
        loaded.config = replace(loaded.config, language=replace(loaded.config.language, lora=LoraConfig()))
    return loaded


def _judged(model_path: str, format: str, dtype: Any) -> tuple[Loaded, str]:
    """Load a model and say why it can be no LLaVA ('' where it can).

    Raises:
        UserError: it can be none and `format` is 'llava': by its config before gigabytes are loaded.
    """
    from git_model.checkpoint import read_content
    from git_model.config import Config
    from git_model.models.llava import config_refusal, model_refusal
    from git_model.schema import from_dict

    def judge(reason: str) -> str:
        if format == "llava" and reason:
            raise UserError(f"'{model_path}' can be no LLaVA: {reason}; or choose format native")
        return reason

    if format == "llava" and Path(model_path).is_file():
        judge(config_refusal(from_dict(Config, read_content(Path(model_path)).get("config", {}))))
    loaded = whole_model(model_path, dtype)
    return loaded, judge(config_refusal(loaded.config) or model_refusal(loaded.model))


def _check_out_dir(out: Path, model_path: Path) -> None:
    """Refuse a folder that holds anything but an older export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out_dir '{out}' is a file; give a folder")
    if out.resolve() == model_path.resolve() or out.resolve() in model_path.resolve().parents:
        raise UserError(f"out_dir '{out}' holds the model to export; give another folder")
    if out.is_dir() and any(out.iterdir()) and not _is_export(out):
        raise UserError(f"out_dir '{out}' is not empty and no export; give a new folder")


def _is_export(folder: Path) -> bool:
    try:
        return MARK in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name, make sure it is on the disk, and rename it; an older one goes last.

    Args:
        out: the final name: absent, empty, or an older export.
        write: fills an empty folder.
    """
    out = out.resolve()  # a link keeps pointing where it did
    out.parent.mkdir(parents=True, exist_ok=True)
    word = uuid.uuid4().hex[:12]
    part, old = out.with_name(f".{out.name}.{word}.part"), out.with_name(f".{out.name}.{word}.old")
    part.mkdir()
    try:
        write(part)
        for path in [*sorted(part.rglob("*")), part]:
            if path.is_dir():
                sync_folder(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if out.is_dir():
            out.rename(old)
        try:
            part.rename(out)
        except OSError:
            if old.is_dir():
                old.rename(out)
            raise
        sync_folder(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_llava(folder: Path, loaded: Loaded, dtype: Any, told: dict[str, Any]) -> None:
    """Write a model as LlavaForConditionalGeneration with its processor into an empty folder.

    Args:
        folder: where.
        loaded: a model that nothing speaks against; see `git_model.models.llava`.
        dtype: of all weights; None = the language model's.
        told: plain values to keep in config.json.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlavaProcessor

    from git_model.models.language import Decoding
    from git_model.models.llava import llava_parts
    from git_model.models.processing import chat_template, image_processor, image_tokenizer

    model = loaded.model
    tokenizer, image_id = image_tokenizer(model.codec)
    config, weights = llava_parts(model, image_id, dtype or model.language.model.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    setattr(config, MARK, told)
    config.save_pretrained(folder)
    images = image_processor(model.vision, loaded.config.data.resize)
    strategy = config.vision_feature_select_strategy
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if strategy == "default" else 0,  # CLIP's class token, which is then left out
        chat_template=chat_template(model.codec),
    )
    images.save_pretrained(folder)  # preprocessor_config.json, which engines read; transformers 5 has one file for both
    processor.save_pretrained(folder)
    _suit_older_loaders(folder)
    GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=model.codec.eos_id,
        pad_token_id=model.codec.pad_id,
        max_new_tokens=Decoding().max_new_tokens,
    ).save_pretrained(folder)


def _suit_older_loaders(folder: Path) -> None:
    """Say it so that transformers 4 reads it, too, which engines may run.

    The tokenizer's class by its older name, one file for each part of the processor, rotary settings where they were.
    """

    def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(content)
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def settings(config: dict[str, Any]) -> None:
        text = config["text_config"]
        for inner in (text, config["vision_config"]):
            inner.pop("_name_or_path", None)  # a place on the machine that trained it
        rope = text.get("rope_parameters") or {}
        if "rope_theta" in rope:
            text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = rope

    change(
        "tokenizer_config.json", lambda c: (c.update(tokenizer_class="PreTrainedTokenizerFast"), c.pop("backend", 0))
    )
    change("processor_config.json", lambda c: c.pop("image_processor", None))  # it is preprocessor_config.json
    change("config.json", settings)
