"""The task that encodes a recipe's pictures before its training, on as many processes or jobs as there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from git_model.errors import UserError
from git_model.tasks.options import PartOptions
from git_model.tasks.values import Range


def encode_features(
    *,
    config: str,
    feature_store: str | None = None,
    source: Literal["train", "val"] = "train",
    data_dir: str | None = None,
    share: PartOptions,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    workers: Annotated[int, Range(0, 256)] = 2,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Fill the feature store of a recipe whose encoder is frozen, as train.py would; killed, it goes on."""
    from git_model.config import Config
    from git_model.datasets.sources import build_source
    from git_model.schema import from_dict, read_yaml

    run = from_dict(Config, read_yaml(Path(config)))
    where = feature_store or run.data.feature_store
    if where is None:
        raise UserError("feature_store is neither given nor in the recipe (data.feature_store)")
    data = replace(run.data, feature_store=where, dir=data_dir or run.data.dir, workers=workers)
    run = replace(run, data=data, train=replace(run.train, batch_size=batch_size))
    (rank, world), records = share.place(), build_source(getattr(data, source), data.dir)

    import torch

    from git_model.encoding import encode_once, open_store
    from git_model.models.vision import build_vision
    from git_model.tasks.opening import pick_device
    from git_model.training import training_data
    from git_model.validation import eval_data

    torch.manual_seed(run.train.seed)  # as train.py does: a small encoder starts from it
    vision = build_vision(run.vision)
    make = training_data if source == "train" else eval_data
    pictures = make(run, records, vision.resolution)
    store = open_store(run, vision, pictures, source)
    encode_once(store, run, vision, pictures, torch.device(pick_device(device)), (rank, world))
    if rank > 0 and not share.parts:
        return None
    told = {"feature_store": str(store.folder), "pictures": len(store), "bytes": store.bytes}
    return {**told, "part": rank, "parts": world, "files": store.files, "missing": len(store.missing())}
