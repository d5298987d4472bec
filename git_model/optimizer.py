"""What is stepped, how far and by which rule: parameter groups, AdamW or Muon, the learning rate's schedule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from git_model.architecture import PARTS
from git_model.config import TrainConfig
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.muon import Muon

log = logging.getLogger(__name__)

TABLE = re.compile(r"(position|embed|constant|query|token)\w*$")  # parameters that are lists of vectors


def parameter_groups(model: GitModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimiser's groups: a learning rate per part, weight decay on matrices only.

    `muon` marks what Muon is for: matrices and convolutions that turn features into features; not tables of tokens
    and positions, not the vocabulary projection.
    """
    decoder = model.language.model
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(head.weight) for head in [decoder.get_output_embeddings()] if head is not None}
    tables |= {id(p) for name, p in model.named_parameters() if TABLE.search(name)}
    groups = []
    for part in PARTS:
        own = getattr(config, f"lr_{part}")
        rate = config.lr if own is None else own
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in trained:
            matrix = p.ndim >= 2
            kinds.setdefault((matrix, matrix and config.optimizer == "muon" and id(p) not in tables), []).append(p)
        for (decayed, muon), chosen in kinds.items():
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "part": part, "muon": muon})
    if not groups:
        raise UserError(f"--freeze {','.join(config.freeze)} leaves nothing to train")
    return groups


def build_optimizer(model: GitModel, config: TrainConfig) -> torch.optim.Optimizer:
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
