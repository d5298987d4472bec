"""The task that encodes a recipe's pictures before its training, on as many processes or jobs as there are."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import UserError
from git_model.tasks.options import PartOptions
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.datasets.features import FeatureStore
    from git_model.datasets.sources import Source
    from git_model.datasets.vectors import Vectors


log = logging.getLogger(__name__)


def encode_features(
    *,
    config: str | None = None,
    image_encoder_type: str | None = None,
    images: str | None = None,
    out: str | None = None,
    feature_store: str | None = None,
    source: Literal["train", "val"] = "train",
    data_dir: str | None = None,
    share: PartOptions,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    workers: Annotated[int, Range(0, 256)] = 2,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Fill the feature store of a recipe whose encoder is frozen, as train.py would; killed, it goes on.

    image_encoder_type, images: without a recipe: which encoder (its pooled features), and a folder of pictures.
    out: <name>.npy: the features (several tokens averaged), with the records' names in <name>.ids.txt: a source for an
        ensemble. Pictures that cannot be read are left out and told. Written by one process, after all parts.
    feature_store: default: the recipe's (data.feature_store); without a recipe one in this user's cache.
    """
    from git_model.config import Config
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.kept import cache_folder
    from git_model.datasets.sources import build_source
    from git_model.schema import from_dict, read_yaml
    from git_model.tasks.prompt_inputs import check_npy

    if (config is None) == (image_encoder_type is None) or (image_encoder_type is None) != (images is None):
        raise UserError("encode_features needs either config (a recipe), or image_encoder_type and images (a folder)")
    if out is not None:
        check_npy(out)
        refuse_overwriting(out, config)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if share.place()[1] > 1:
            how = "run it once more, on one process, without part and parts"
            raise UserError(f"out is written when all pictures are encoded: {how}")
    if config is not None:
        run = from_dict(Config, read_yaml(Path(config)))
        where = feature_store or run.data.feature_store
    else:
        recipe = {"vision": {"name": image_encoder_type}, "train": {"freeze": ["vision", "auto"]}}
        entry = {"type": "pictures", "images": str(Path(str(images)).resolve())}
        run = from_dict(Config, {**recipe, "data": {"dir": ".", "train": [entry], "val": []}})
        where = feature_store or str(cache_folder() / "features")
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

    if run.vision.name == "small":
        log.warning("'small' is trained from nothing: without a checkpoint its features are those of random weights")
    torch.manual_seed(run.train.seed)  # as train.py does: a small encoder starts from it
    vision = build_vision(run.vision)
    make = training_data if source == "train" else eval_data
    pictures = make(run, records, vision.resolution)
    store = open_store(run, vision, pictures, source, everything=out is not None)
    encode_once(store, run, vision, pictures, torch.device(pick_device(device)), (rank, world))
    if rank > 0 and not share.parts:
        return None
    told: dict[str, Any] = {"feature_store": str(store.folder), "pictures": len(store), "bytes": store.bytes}
    told |= {"part": rank, "parts": world, "files": store.files, "missing": len(store.missing())}
    if out is not None:
        from git_model.datasets.vectors import write_vectors

        found, failed = stored_vectors(store, records)
        write_vectors(Path(out), found)
        told |= {"out": out, "count": len(found.ids), "dim": found.values.shape[1], "failed": failed}
    return told


def stored_vectors(store: FeatureStore, records: Source) -> tuple[Vectors, dict[str, str]]:
    """Return what a store holds as vectors by name, several tokens averaged; and why some records have none."""
    import numpy as np

    from git_model.datasets.files import RecordError, SampleError
    from git_model.datasets.prompt_files import picture_name
    from git_model.datasets.vectors import Vectors

    names, values, failed = [], [], dict[str, str]()
    for record in store.records:
        try:
            sample = records.said(record)
            values.append(store.get(record, sample).astype(np.float32).mean(axis=0))  # (D,)
            names.append(picture_name(sample.key))
        except RecordError as error:
            failed[error.key if isinstance(error, SampleError) else f"record {record}"] = error.reason
    if not names:
        raise UserError(f"none of the {len(store)} pictures could be read, e.g. {next(iter(failed.items()))}")
    return Vectors(tuple(names), np.stack(values)), failed
