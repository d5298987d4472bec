"""Going on with a run: `model_latest.pt` and the `state-<step>.pt` beside it, all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from git_model.checkpoint import (
    LATEST,
    load_part,
    parts_of,
    read_content,
    save_checkpoint,
    saved_parts,
    write_atomically,
)
from git_model.config import Config
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.schema import to_dict

# what may differ when a run goes on; GPUs x batch x accumulation must stay the same ("samples a step")
DATA_MAY_CHANGE = ("dir", "workers", "worker_timeout", "cache", "max_bad")
TRAIN_MAY_CHANGE = (
    *("output_dir", "epochs", "batch_size", "accumulation", "gradient_checkpointing", "compile", "log_every"),
    *("save_every", "validate_every", "validate_samples", "max_bad_steps", "resume", "report_to"),
)
MAY_CHANGE = {f"data.{name}" for name in DATA_MAY_CHANGE} | {f"train.{name}" for name in TRAIN_MAY_CHANGE}


def save_latest(
    folder: Path,
    model: GitModel,
    config: Config,
    state: Mapping[str, Any],
    metrics: Mapping[str, float],
    world: int = 1,
) -> None:
    """Write `state-<step>.pt`, then `model_latest.pt`, then drop the older state.

    Args:
        folder: the run's.
        model: unwrapped.
        config: the run's.
        state: holds `step` and `epoch` and what `training` needs to go on.
        metrics: the last validation's.
        world: number of processes.
    """
    step = int(state["step"])
    write_atomically(folder / f"state-{step:09d}.pt", state)
    where = {"step": step, "epoch": int(state["epoch"]), "world": world}
    save_checkpoint(folder / LATEST, model, config, metrics=metrics, **where)
    for old in folder.glob("state-*.pt"):
        if old.name != f"state-{step:09d}.pt":
            old.unlink(missing_ok=True)


def read_latest(folder: Path, config: Config, world: int = 1) -> dict[str, Any] | None:
    """Return the content of the run in `folder`, None where there is none.

    Args:
        folder: the run's.
        config: of the run that wants to go on from it.
        world: number of processes now.

    Raises:
        UserError: a setting that decides what is learned differs (names old and new values).
    """
    if not (folder / LATEST).is_file():
        return None
    content = read_content(folder / LATEST)
    before, now = flat(content.get("config", {})), flat(to_dict(config))
    before["samples a step"] = content.get("samples_a_step")
    now["samples a step"] = config.train.batch_size * config.train.accumulation * world
    changed = [k for k in now if k not in MAY_CHANGE and k in before and before[k] != now[k]]
    if changed:
        words = "; ".join(f"{k} was {before[k]}, is {now[k]}" for k in changed[:5])
        raise UserError(f"{folder} holds a run with other settings: {words}. --resume no starts anew")
    return content


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested settings as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{where}{key}"
        out |= flat(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return out


def load_latest(folder: Path, content: Mapping[str, Any], model: GitModel) -> dict[str, Any]:
    """Bring `model` and the returned state to where the run in `folder` stopped.

    Raises:
        UserError: a part of the pair is missing or does not fit: never trains on from half a state.
    """
    state_path = folder / f"state-{int(content.get('step', -1)):09d}.pt"
    if not state_path.is_file():
        raise UserError(f"{folder / LATEST} is there but {state_path.name} is not; --resume no starts anew")
    held = parts_of(content["tensors"])
    if held != set(saved_parts(model)):
        raise UserError(f"{folder / LATEST} holds {sorted(held)}, this run trains {saved_parts(model)}; --resume no?")
    for part in held:
        load_part(folder / LATEST, getattr(model, part), part, content["tensors"])
    return read_content(state_path)
