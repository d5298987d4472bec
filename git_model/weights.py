"""Which weights are whose: what a checkpoint holds of a model, what is fetched again by name, and how to tell it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.models.language import LanguageModel
from git_model.models.parts import PartedModel
from git_model.models.regressor import EnsembleRegressor
from git_model.models.vision import VisionEncoder

log = logging.getLogger(__name__)


def saved_parts(model: PartedModel) -> tuple[str, ...]:
    """Return the parts a checkpoint holds: all but frozen ones whose weights their name brings back."""

    def comes_back(part: nn.Module) -> bool:
        if isinstance(part, LanguageModel):
            return part.name != "small"
        return isinstance(part, VisionEncoder) and part.pretrained

    return tuple(
        p for p in model.parts if not (p in model.frozen and comes_back(getattr(model, p)) and p not in model.brought)
    )


def parts_of(tensors: Iterable[str]) -> set[str]:
    """Return the parts that tensor names such as `mapper.net.0.weight` belong to."""
    return {name.split(".")[0] for name in tensors}


def fetched_parts(model: PartedModel) -> tuple[str, ...]:
    """Return the parts that are fetched again by name: frozen ones, and a language model under adapters."""
    kept = saved_parts(model)
    return tuple(part for part in model.parts if part not in kept or adapters_of(getattr(model, part)))


def identify(model: PartedModel) -> dict[str, str]:
    """Note the fingerprints of what is fetched again, before a forward pass or an engine changes its form."""
    model.fingerprints = {part: fingerprint(getattr(model, part)) for part in fetched_parts(model)}
    return model.fingerprints


def part_tensors(model: PartedModel, part: str) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a part: all of it, or the adapters on a language model alone."""
    module: nn.Module = getattr(model, part)
    return adapters_of(module) or module.state_dict()


def adapters_of(part: nn.Module) -> dict[str, Tensor]:
    """Return the adapters on a language model; nothing of other parts."""
    return part.adapters() if isinstance(part, LanguageModel) else {}


def held_tensors(model: PartedModel) -> dict[str, Tensor]:
    """Return all that a checkpoint holds, on the CPU, by `part.name`; of a sharded model every process has to ask."""
    held: dict[str, Tensor] = {}
    # in this order: a part's state_dict() shards again what a validation left whole, which adapters alone would not
    for part in saved_parts(model):
        held |= {f"{part}.{name}": whole(t.detach()).cpu() for name, t in part_tensors(model, part).items()}
    return held


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is without sharding; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def base_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Return what tells a frozen part from others: its weights without adapters, and without quantised ones.

    The bytes of quantised weights depend on the machine, and asking bitsandbytes for them may change them.
    """
    if isinstance(part, LanguageModel) and (part.compute is not None or part.adapters()):
        plain = {n.replace(".base_layer", ""): p for n, p in part.named_parameters() if ".lora_" not in n}
        return {name: p for name, p in plain.items() if part.compute is None or type(p) is nn.Parameter}
    return part.state_dict()


def fingerprint(part: nn.Module) -> str:
    """Return a hash of a part's names, shapes, types and up to 4,096 evenly spaced numbers of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(part).items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def load_part(path: Path, model: PartedModel, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill a part with its tensors, all of them and nothing else (of adapted language models: the adapters).

    Raises:
        UserError: names up to five missing, unexpected or misshapen tensors.
    """
    own = {name[len(part) + 1 :]: t for name, t in tensors.items() if name.startswith(part + ".")}
    wanted = part_tensors(model, part)
    wrong = [f"{part}.{n} missing" for n in wanted if n not in own]
    wrong += [f"{part}.{n} unexpected" for n in own if n not in wanted]
    wrong += [
        f"{part}.{n} is {tuple(t.shape)}, expected {tuple(wanted[n].shape)}"
        for n, t in own.items()
        if n in wanted and t.shape != wanted[n].shape
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit its architecture ({len(wrong)} tensors): {'; '.join(wrong[:5])}", EXIT_NO_CHECKPOINT
        )
    getattr(model, part).load_state_dict(own, strict=False)  # checked above
    if not adapters_of(getattr(model, part)):
        model.brought.add(part)


def sources_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return names and widths of an ensemble's sources, in order, of a checkpoint's config; {} where it is none."""
    return config.get("regressor", {}).get("sources", {})


def start_from(path: Path, content: Mapping[str, Any], model: PartedModel) -> None:
    """Give a new run's model the weights of a checkpoint: the parts that it holds.

    Args:
        path: of the checkpoint, for messages.
        content: what is in it.
        model: of the same architecture.

    Raises:
        UserError: it holds no weights, or weights of another architecture (names up to five tensors).
    """
    tensors = content.get("tensors")
    if not isinstance(tensors, Mapping) or not (held := parts_of(tensors) & set(model.parts)):
        raise UserError(f"--init_from {path} holds no weights of {', '.join(model.parts)}", EXIT_NO_CHECKPOINT)
    if isinstance(model, EnsembleRegressor) and list(sources_of(content["config"])) != list(model.widths):
        told = f"{list(sources_of(content['config']))}, this run's are {list(model.widths)}"
        raise UserError(f"--init_from {path} has the sources {told}, in this order", EXIT_NO_CHECKPOINT)
    for part in held:
        load_part(path, model, part, tensors)
    identify(model)
    log.info("started from the %s weights of %s", ", ".join(sorted(held)), path)
