"""Encode once: a frozen encoder's features of a run's pictures, kept in a FeatureStore that later epochs read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from git_model.architecture import DTYPES
from git_model.batch import BadSample
from git_model.cluster import StopRequest, note_stop
from git_model.config import Config
from git_model.datasets.features import FeatureStore, chosen, stamp
from git_model.datasets.files import RecordError
from git_model.datasets.loader import ImageTextDataset, outlive_first_sigterm
from git_model.datasets.prompt_sources import PictureFolder
from git_model.errors import Preempted, UserError
from git_model.models.git import GitModel
from git_model.models.regressor import PromptRegressor
from git_model.models.vision import VisionEncoder
from git_model.weights import fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def use_features(
    config: Config,
    model: GitModel | PromptRegressor,
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
    vision, model.reads_features = model.vision, True
    device, place = accelerator.device, (accelerator.process_index, accelerator.num_processes)
    for source, data in (("train", train), ("val", val)):
        store = open_store(config, vision, data, source)
        encode_once(store, config, vision, data, device, place, lambda: stop.asked)
        asked = torch.tensor(float(stop.asked), device=device)
        if float(accelerator.reduce(asked, "sum")):  # here all wait for the others' shares
            if accelerator.is_main_process:
                note_stop(len(store.missing()) - store.files)  # which changes while there is progress
            told = f"stopped by {stop.why or 'another process'} while pictures were encoded"
            raise Preempted(f"{told}; start it again: what is there stays")
        if missing := store.missing():
            told = "is the folder shared by all machines?"
            raise UserError(f"{len(missing)} of {store.files} files are not in {store.folder}: {told}")
        data.store, data.cache = store, None


def open_store(
    config: Config,
    vision: VisionEncoder,
    data: ImageTextDataset,
    source: str,
    everything: bool = False,
) -> FeatureStore:
    """Return the store of a run's features, named by all that they depend on.

    Args:
        config: says where, in which type of number, in which precision.
        vision: the encoder with its weights.
        data: the pictures, with the transform that the encoder gets them by.
        source: 'train', of which all records are stored, or 'val': those that validations look at.
        everything: all of 'val', too.
    """
    assert config.data.feature_store is not None
    every = range(len(data))
    records = every if source == "train" or everything else tuple(chosen(len(data), config.train.validate_samples))
    identity = {
        "encoder": vision.name,
        "weights": fingerprint(vision),
        "features": vision.features,
        "layers": [*config.vision.layers, *([] if config.vision.join == "concat" else [config.vision.join])],
        "precision": config.train.precision,
        "resolution": data.transform.resolution,
        "resize": data.transform.resize,
        "decode": data.transform.decode,
        "data": [dict(entry) for entry in getattr(config.data, source)],
    }
    if isinstance(data.source, PictureFolder):
        identity["pictures"] = data.source.identity()
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
        stop: asked after each batch.
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


def fill(
    store: FeatureStore,
    data: ImageTextDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 32,
    workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Encode this process's share of what a store lacks; a progress bar on the first.

    Args:
        store: of `data`; announced.
        data: the pictures as they are encoded.
        encode: (I,3,H,W) uint8 -> (I,N,D).
        rank: of this process; files are dealt out by number.
        world: number of processes.
        batch_size: pictures at a time.
        workers: processes that read pictures.
        stop: asked after each batch; a file that was begun is begun again next time.

    Returns:
        whether this share is whole; False where `stop` said so.
    """
    from tqdm import tqdm

    numbers = [number for number in store.missing() if number % world == rank]
    stream, errors, lost = _pictures(store, data, numbers, workers), [], Counter[str]()
    total = sum(len(store.members(number)) for number in numbers)
    with tqdm(total=total, unit="image", desc="encoding pictures once", disable=rank > 0 or not total) as bar:
        for number in numbers:
            count = len(store.members(number))
            features = np.zeros((count, *store.shape), np.float32)
            stamps, reasons, waiting = [], {}, []
            for place, record in enumerate(store.members(number)):
                item = next(stream)
                stamps.append(_stamp_of(data, record))
                if isinstance(item, BadSample):
                    reasons[place] = item.reason
                elif len(item.images) != 1:
                    raise UserError(f"a feature store holds one picture a record; '{item.key}' has {len(item.images)}")
                else:
                    waiting.append((place, item.images[0].clone()))
                if len(waiting) == batch_size:
                    _encode(waiting, encode, features)
                    if stop():
                        return False
                bar.update()
            _encode(waiting, encode, features)
            errors.append(store.write(number, features, stamps, reasons))
            lost.update(reasons.values())
            if stop():
                return False
    if errors and rank == 0:
        log.info("%s features: root mean square error %.2e of theirs", store.kind, max(errors))
    if lost:
        told = ", ".join(f"{reason} x{number}" for reason, number in lost.most_common())
        log.warning(
            "%d pictures could not be used (%s); to try them again, remove %s", lost.total(), told, store.folder
        )
    return True


def _pictures(store: FeatureStore, data: ImageTextDataset, numbers: Sequence[int], workers: int) -> Iterator[Any]:
    """Yield the records of some files, decoded by worker processes."""
    order = [(0, record) for number in numbers for record in store.members(number)]
    options: dict[str, Any] = {"collate_fn": _as_it_is, "worker_init_fn": outlive_first_sigterm if workers else None}
    return iter(DataLoader(data, sampler=order, batch_size=None, num_workers=workers, **options))  # type: ignore[arg-type]


def _stamp_of(data: ImageTextDataset, record: int) -> int:
    try:
        return stamp(data.source.said(record))
    except RecordError:
        return 0  # nobody will get as far as asking for its features


def _encode(waiting: list[tuple[int, Any]], encode: Callable[[Any], Any], features: np.ndarray) -> None:
    """Put the features of the waiting pictures in their places."""
    if waiting:
        places = [place for place, _ in waiting]
        features[places] = encode(torch.stack([picture for _, picture in waiting])).float().cpu().numpy()
        waiting.clear()


def _as_it_is(item: Any) -> Any:
    return item
