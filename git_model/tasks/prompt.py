"""Vectors of prompts: of texts, of pictures by a regressor or a bank of prompts, of several sources by an ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.errors import UserError
from git_model.tasks.prompt_inputs import ENCODER, check_npy, check_there, read_texts
from git_model.tasks.values import Range

if TYPE_CHECKING:
    import numpy as np


def embed_prompt(
    *,
    out: str,
    prompts: str | None = None,
    images: str | None = None,
    vectors: dict[str, str] | None = None,
    model_path: str | None = None,
    published: bool = False,
    bank: str | None = None,
    nearest: Annotated[int, Range(1, 1000000)] = 100,
    towers: str | None = None,
    suffix: str = "",
    text_encoder: str = ENCODER,
    max_bad: Annotated[float, Range(0, 1)] = 0.0,
    workers: Annotated[int, Range(0, 256)] = 2,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Write vectors of prompts by name: <name>.npy and <name>.ids.txt. They come from one of:

    prompts: texts: a CSV (imgId or image, prompt), DiffusionDB's metadata (.parquet), captions (TSV, COCO's JSON);
        text_encoder makes the vectors. Captions that say why there is none are left out and told.
    images: pictures: a folder, or an image TSV; by a regressor (model_path: train.py --regressor head), or by the
        `nearest` prompts of a bank (make_prompt_bank), weighted by their distance (towers: where the model that made
        the bank is now).
    vectors: files of several sources, {clip: clip.npy, caption: caption.npy}; by an ensemble (model_path: train.py
        --regressor ensemble), in which a source may lack some names; of one source, also by a bank.
    published: model_path is a checkpoint of the published ensemble, which does not fuse; the log says what is wrong.
    suffix: put behind every text, such as ', fine details, masterpiece'.
    max_bad: share of the pictures, or of the captions, that may be unusable; they are left out and told.
    """
    from git_model.datasets.files import refuse_overwriting

    given = [name for name, value in (("prompts", prompts), ("images", images), ("vectors", vectors)) if value]
    if len(given) != 1:
        raise UserError(f"embed_prompt needs one of prompts, images and vectors, got {' and '.join(given) or 'none'}")
    if prompts is not None and (model_path or bank):
        raise UserError("model_path and bank are for images and vectors; texts need text_encoder alone")
    if prompts is None and (model_path is None) == (bank is None):
        raise UserError(f"{given[0]} need either model_path (a regressor) or bank (of prompts)")
    if published and (vectors is None or model_path is None):
        raise UserError("published is for vectors and model_path")
    if suffix and prompts is None:
        raise UserError("suffix is for texts; name them in prompts")
    if towers is not None and (bank is None or images is None):
        raise UserError("towers is for images and a bank")
    inputs = [prompts, model_path, *(vectors or {}).values()]
    refuse_overwriting(out, *inputs)
    check_npy(out)
    check_there(*inputs, bank=bank)
    if images is not None and not Path(images).exists():
        raise UserError(f"no folder or image TSV at '{images}'")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    from git_model.datasets.vectors import write_vectors
    from git_model.tasks.predict import Looked, by_bank, embed_texts, fused, of_pictures

    failed: dict[str, str] = {}
    told: dict[str, Any] = {"out": out}
    if prompts is not None:
        found, failed = embed_texts(prompts, suffix, text_encoder, batch_size, device, max_bad)
    elif images is not None:
        make = Looked(model_path, bank, nearest, device, towers)
        found, failed = of_pictures(images, make.prepare, make, workers, batch_size, max_bad)
    elif bank is not None:
        found = by_bank(dict(vectors or {}), bank, nearest)
    else:
        found, missing = fused(dict(vectors or {}), str(model_path), published, batch_size, device)
        told["missing"] = missing
    write_vectors(Path(out), found)
    told |= {"count": len(found.ids), "dim": found.values.shape[1]}
    return told | ({"failed": failed} if failed else {})


def make_prompt_bank(
    *,
    prompts: str,
    out_dir: str,
    towers: str = "ViT-L/14",
    text_encoder: str = ENCODER,
    shard: Annotated[int, Range(1, 10000000)] = 65536,
    batch_size: Annotated[int, Range(1, 65536)] = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Write a bank of prompts for `embed_prompt` and `image_to_prompt`: each as a picture's neighbour, and as a text.

    prompts: CSV (imgId or image, prompt), captions (TSV, COCO's JSON) or DiffusionDB's metadata (.parquet); the same
        text is taken once.
    out_dir: a folder; memory holds the texts and a shard.
    towers: model of pictures and texts, whose text tower makes what a picture is compared with.
    """
    check_there(prompts)
    if (Path(out_dir) / "BANK.json").exists():
        raise UserError(f"'{out_dir}' holds a bank of prompts already: remove it, or write elsewhere")
    towers = str(Path(towers).resolve()) if Path(towers).is_dir() else towers
    from git_model.datasets.neighbours import write_bank
    from git_model.datasets.prompt_files import read_rows
    from git_model.models.phrases import TwoTowers
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    large = prompts.endswith((".csv", ".parquet"))
    pairs = read_rows(Path(prompts)).pairs() if large else read_texts(prompts).items()
    texts = list(dict.fromkeys(text for _, text in pairs if text.strip()))
    if not texts:
        raise UserError(f"'{prompts}' holds no prompt")
    place = pick_device(device)
    encoder, both = SentenceEncoder(text_encoder, place), TwoTowers(towers, place)

    def shards() -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        from tqdm import tqdm

        for start in tqdm(range(0, len(texts), shard), unit="shard", desc="encoding prompts"):
            some = texts[start : start + shard]
            yield both.texts(some, batch_size), encoder(some, batch_size), some

    write_bank(out_dir, shards(), towers, text_encoder)
    return {"out_dir": out_dir, "prompts": len(texts), "shards": -(-len(texts) // shard)}
