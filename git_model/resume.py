"""Going on with a run: the newest save that verifies, all of it or nothing.

A save (saves.py) holds `model.pt`, which is also published as `model_latest.pt`, and `state.pt`: optimiser, schedule,
position, counts. Random numbers need no saving: they are functions of seed, epoch, step and sample.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from git_model.checkpoint import FORMAT, LATEST, model_file, read_content, sealed
from git_model.config import Config
from git_model.errors import UserError
from git_model.models.parts import PartedModel
from git_model.saves import Saves, publish
from git_model.schema import to_dict
from git_model.weights import load_part, parts_of, saved_parts, sources_of

log = logging.getLogger(__name__)

MODEL, STATE = "model.pt", "state.pt"

# what may differ when a run goes on; GPUs x batch x accumulation must stay the same ("samples a step")
DATA_MAY_CHANGE = ("dir", "workers", "worker_timeout", "cache", "max_bad", "feature_store")
TRAIN_MAY_CHANGE = (
    *("output_dir", "epochs", "batch_size", "accumulation", "gradient_checkpointing", "compile", "fsdp", "log_every"),
    *("save_every", "validate_every", "validate_samples", "max_bad_steps", "resume", "report_to", "init_from"),
    *("keep", "require_exact", "stop_before_end"),
)
MAY_CHANGE = {f"data.{name}" for name in DATA_MAY_CHANGE} | {f"train.{name}" for name in TRAIN_MAY_CHANGE}


def save(
    saves: Saves,
    model: PartedModel,
    config: Config,
    state: Mapping[str, Any],
    metrics: Mapping[str, float],
    world: int = 1,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a save and publish its model as `model_latest.pt`.

    Args:
        saves: of the run.
        model: unwrapped.
        config: the run's.
        state: holds `step` and `epoch` and what `training` needs to go on.
        metrics: the last validation's.
        world: number of processes.
        tensors: `held_tensors` of the model, where they were gathered before.
    """
    step = int(state["step"])
    where: dict[str, Any] = {"step": step, "epoch": int(state["epoch"]), "world": world, "tensors": tensors}
    files = {
        MODEL: model_file(model, config, metrics=metrics, **where),
        STATE: sealed({"format": FORMAT, "fingerprint": fingerprint(world), **state}),
    }
    publish(saves.write(step, files) / MODEL, saves.folder / LATEST)


def newest(saves: Saves) -> Path | None:
    """Return the newest save that verifies, its model published: a kill may have come between the two.

    Raises:
        UserError: there are saves, and none verifies.
    """
    found = saves.newest()
    latest = saves.folder / LATEST
    if found is not None and not (latest.exists() and latest.samefile(found / MODEL)):
        publish(found / MODEL, latest)
    return found


def read_model(found: Path, config: Config, world: int = 1) -> dict[str, Any]:
    """Return the model file of a save.

    Args:
        found: a save that verifies.
        config: of the run that wants to go on from it.
        world: number of processes now.

    Raises:
        UserError: a setting that decides what is learned differs (names old and new values).
    """
    content = read_content(found / MODEL)
    # what an older save does not know yet was as the default is now
    before, now = flat(to_dict(Config())) | flat(content.get("config", {})), flat(to_dict(config))
    before["samples a step"] = content.get("samples_a_step")
    now["samples a step"] = config.train.batch_size * config.train.accumulation * world
    before["the order of sources"] = list(sources_of(content.get("config", {})))
    now["the order of sources"] = list(config.regressor.sources)
    changed = [k for k in before | now if k not in MAY_CHANGE and before.get(k) != now.get(k)]
    if changed:
        words = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in changed[:5])
        raise UserError(f"{found.parent} holds a run with other settings: {words}. --resume no starts anew")
    return content


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested settings as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{where}{key}"
        out |= flat(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return out


def load(found: Path, content: Mapping[str, Any], model: PartedModel, *, exact: bool, world: int = 1) -> dict[str, Any]:
    """Bring `model` and the returned state to where a save was written.

    Args:
        found: the save.
        content: of its model file.
        model: is filled.
        exact: whether a changed machine is an error.
        world: number of processes now.

    Raises:
        UserError: the save does not fit the model, or `exact` and the machine computes otherwise.
    """
    held = parts_of(content["tensors"])
    if not held >= set(saved_parts(model)):  # more: frozen parts that --init_from brought
        raise UserError(f"{found} holds {sorted(held)}, this run trains {saved_parts(model)}; --resume no?")
    for part in held:
        load_part(found / MODEL, model, part, content["tensors"])
    state = read_content(found / STATE)
    before, now = state["fingerprint"], fingerprint(world)
    if changed := [f"{k} was {before.get(k)}, is {now[k]}" for k in now if before.get(k) != now[k]]:
        told = f"{found}: going on is not exact to the bit, {'; '.join(changed)}"
        if exact:
            raise UserError(f"{told} (--require_exact)")
        log.warning("%s", told)
    return state


def fingerprint(world: int) -> dict[str, Any]:
    """Return what decides the last bits of a step, apart from settings and data."""
    import transformers

    used = {name: version(name) for name in ("bitsandbytes", "peft") if name in sys.modules}
    return {
        **used,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": world,
    }
