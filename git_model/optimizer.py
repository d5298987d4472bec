"""What is stepped, how far and by which rule: parameter groups, AdamW or Muon, the learning rate's schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from git_model.config import TrainConfig
from git_model.errors import UserError
from git_model.models.language import LanguageModel
from git_model.models.parts import PartedModel
from git_model.muon import Muon

log = logging.getLogger(__name__)

BLOCK = re.compile(r"(?:^|\.)(layers?|blocks|resblocks|stages)\.?(\d+)(?:\.(\d+)(?=\.))?")
TABLE = re.compile(r"(position|embed|constant|query|token)\w*$")  # parameters that are lists of vectors


def parameter_groups(model: PartedModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimiser's groups: a learning rate per part or layer of the encoder, weight decay on matrices only.

    `muon` marks what Muon is for: matrices and convolutions that turn features into features; not tables of tokens
    and positions, not the vocabulary projection.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(language := getattr(model, "language", None), LanguageModel):
        tables |= {id(head.weight) for head in [language.model.get_output_embeddings()] if head is not None}
    tables |= {id(p) for name, p in model.named_parameters() if TABLE.search(name)}
    groups = []
    for part in model.parts:
        own = getattr(config, f"lr_{part}", None)
        rate = config.lr if own is None else own
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        slower = layer_factors(model.get_submodule("vision"), config.layer_decay) if part == "vision" else {}
        kinds: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for p in trained:
            matrix, factor = p.ndim >= 2, slower.get(p, 1.0)
            muon = matrix and config.optimizer == "muon" and id(p) not in tables
            kinds.setdefault((matrix, muon, factor), []).append(p)
        for (decayed, muon, factor), chosen in kinds.items():
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": chosen, "lr": rate * factor, "weight_decay": decay, "part": part, "muon": muon})
    if not groups:
        raise UserError(f"--freeze {','.join(config.freeze)} leaves nothing to train")
    return groups


def layer_factors(encoder: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return by how much slower each parameter of an image encoder learns: 1 above its last layer, decay a layer below.

    Layers are numbered parts of a stack (`layers.3`, `stages.1.layers.0`, `layer2.1`), in the order in which they come;
    what comes before the first is the lowest, what comes after the last, and a projection, the highest. What is
    numbered inside of a layer (the convolutions of a ResNet's block) is of that layer.
    """
    if decay == 1:
        return {}
    named = list(encoder.named_parameters())
    found = [_layer_of(name) for name, _ in named]
    order = {layer: number for number, layer in enumerate(dict.fromkeys(layer for layer in found if layer), 1)}
    factors, level = {}, 0
    for (name, parameter), layer in zip(named, found, strict=True):
        if layer:
            level = order[layer]
        top = name.endswith(".proj") or (not layer and level > 0)
        factors[parameter] = 1.0 if top else decay ** (len(order) + 1 - order.get(layer, 0))
    return factors


def _layer_of(name: str) -> tuple[int, ...]:
    """Return the numbers of a parameter's layer; () where it is in none."""
    numbers: tuple[int, ...] = ()
    for word, *inside in BLOCK.findall(name):
        if not numbers or (len(numbers) == 1 and word in ("layers", "blocks")):
            numbers += tuple(int(n) for n in inside if n)
    return numbers


def build_optimizer(model: PartedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW, or Muon for the matrices with AdamW for the rest.

    Args:
        model: not yet wrapped; sharded already where it is to be.
        config: of the training.
    """
    groups = parameter_groups(model, config)
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw":
        # one pass over a parameter and its moments instead of ten; torch has it for neither shards nor other devices
        fused = not config.fsdp and all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)
    return Muon(groups, lr=config.lr, betas=betas)


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step: linear warm-up, then the schedule to 0."""
    warmup = min(config.warmup, total_steps - 1) if total_steps > 1 else 0
    if warmup < config.warmup:
        log.warning("warm-up of %d steps is longer than the run of %d; using %d", config.warmup, total_steps, warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if config.schedule == "constant" else 1.0 - done

    return factor
