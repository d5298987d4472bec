"""Encode once: a frozen encoder's features of a run's pictures, kept in a FeatureStore that later epochs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from git_model.architecture import DTYPES
from git_model.cluster import StopRequest
from git_model.config import Config
from git_model.datasets.features import FeatureStore, chosen, fill
from git_model.datasets.loader import ImageTextDataset
from git_model.errors import Preempted, UserError
from git_model.models.vision import VisionEncoder
from git_model.weights import fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator


def use_features(
    config: Config,
    vision: VisionEncoder,
    train: ImageTextDataset,
    val: ImageTextDataset,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Let the data sets of a run give features instead of pictures; all processes share the work of making them.

    Raises:
        Preempted: one of them was asked to stop; what is encoded stays.
        UserError: no room for the features, or not all of them in one folder.
    """
    device, place = accelerator.device, (accelerator.process_index, accelerator.num_processes)
    asked_of = tuple(chosen(len(val), config.train.validate_samples))
    for data, entries, records in ((train, config.data.train, range(len(train))), (val, config.data.val, asked_of)):
        store = open_store(config, vision, data, entries, records)
        encode_once(store, config, vision, data, device, place, lambda: stop.asked)
        asked = torch.tensor(float(stop.asked), device=device)
        if float(accelerator.reduce(asked, "sum")):  # here all wait for the others' shares
            told = f"stopped by {stop.why or 'another process'} while pictures were encoded"
            raise Preempted(f"{told}; start it again: what is there stays")
        if missing := store.missing():
            told = "is the folder shared by all machines?"
            raise UserError(f"{len(missing)} of {store.files} files are not in {store.folder}: {told}")
        data.store = store


def open_store(
    config: Config,
    vision: VisionEncoder,
    data: ImageTextDataset,
    entries: Sequence[Mapping[str, Any]],
    records: Sequence[int],
) -> FeatureStore:
    """Return the store of some records' features, named by all that they depend on.

    Args:
        config: says where, in which type of number, in which precision.
        vision: the encoder with its weights.
        data: the pictures, with the transform that the encoder gets them by.
        entries: what the recipe says of the data set.
        records: which of its records.
    """
    assert config.data.feature_store is not None
    identity = {
        "encoder": vision.name,
        "weights": fingerprint(vision),
        "features": vision.features,
        "layers": list(config.vision.layers),
        "precision": config.train.precision,
        "resolution": data.transform.resolution,
        "resize": data.transform.resize,
        "decode": data.transform.decode,
        "data": [dict(entry) for entry in entries],
    }
    shape, folder = (vision.num_tokens, vision.dim), Path(config.data.feature_store)
    return FeatureStore(folder, identity, records, shape, config.data.feature_type)


def encode_once(
    store: FeatureStore,
    config: Config,
    vision: VisionEncoder,
    data: ImageTextDataset,
    device: torch.device,
    place: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write this process's share of what a store lacks; return whether it is whole (not where `stop` said so).

    Args:
        store: of `data`.
        config: for precision, size of batches, number of workers.
        vision: the encoder; it comes back to where it was.
        data: the pictures.
        device: to encode on.
        place: number of this process, and of all.
        stop: asked after each file.
    """
    before, half = next(vision.parameters()).device, config.train.precision != "fp32"
    dtype = getattr(torch, DTYPES[config.train.precision])

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=half):
            return vision(vision.normalise(images.to(device)))  # (I,N,D)

    store.announce()
    training = vision.training
    vision.to(device).eval()
    try:
        options = {"batch_size": config.train.batch_size, "workers": config.data.workers, "stop": stop}
        return fill(store, data, encode, rank=place[0], world=place[1], **options)
    finally:
        vision.to(before).train(training)
