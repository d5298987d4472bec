"""LoRA (arXiv 2106.09685) through peft: adapters put into a decoder, found again, and merged into it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from git_model.architecture import LoraConfig
from git_model.errors import UserError, nearest

ALL = "all-linear"


def add_adapters(model: Any, config: LoraConfig, targets: Sequence[str]) -> None:
    """Put adapters into a Hugging Face decoder, in place; they alone are trained, in float32.

    Args:
        model: with its weights.
        config: how large, how strong.
        targets: see `chosen_targets`.
    """
    from peft import LoraConfig as PeftConfig
    from peft import TaskType, inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[bad-argument-type]  # peft's scaling takes any number
        lora_dropout=config.dropout,
        target_modules=ALL if ALL in targets else list(targets),
        task_type=TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():  # GPT-2's layers are transposed: peft sees it, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        inject_adapter_in_model(settings, model)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()


def chosen_targets(model: Any, config: LoraConfig) -> tuple[str, ...]:
    """Return the names of the layers that get adapters; a decoder without weights will do, before gigabytes are read.

    Raises:
        UserError: a target that is no layer of this decoder.
    """
    targets, linear = config.targets or usual_targets(model), layer_names(model)
    if wrong := [name for name in targets if name not in linear and name != ALL]:
        told = f"--lora_targets '{wrong[0]}'{nearest(wrong[0], linear)}: this decoder's layers are"
        raise UserError(f"{told} {', '.join(sorted(linear))}; or {ALL}")
    return targets


def usual_targets(model: Any) -> tuple[str, ...]:
    """Return the layers that peft adapts in this family, queries and values mostly; all where it knows none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model.config.model_type)
    return tuple(known) if isinstance(known, list) else (ALL,)


def layer_names(model: Any) -> set[str]:
    """Return the last names of a decoder's linear layers, without its vocabulary projection."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, *(type(m) for m in model.modules() if type(m).__name__ == "Conv1D"))
    return {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' parameters by name; none where there are no adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights it stands beside, in float32, and take it out.

    In half precision most of what an adapter learned would be lost in the rounding: who wants it, rounds the sum.

    Raises:
        ValueError: an adapter holds values that are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.get_base_layer().float()
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
