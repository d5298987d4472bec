"""Vectors of prompts: of texts, of pictures by a regressor or a bank of prompts, of several sources by an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.values import Range

if TYPE_CHECKING:
    import numpy as np

    from git_model.datasets.asking import AskRow
    from git_model.datasets.vectors import Vectors

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


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
    suffix: str = "",
    text_encoder: str = ENCODER,
    max_bad: Annotated[float, Range(0, 1)] = 0.0,
    workers: Annotated[int, Range(0, 256)] = 2,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Write vectors of prompts by name: <name>.npy and <name>.ids.txt. They come from one of:

    prompts: texts: a CSV (imgId or image, prompt), captions (TSV, COCO's JSON); text_encoder makes the vectors.
    images: pictures: a folder, or an image TSV; by a regressor (model_path: train.py --regressor head), or by the
        `nearest` prompts of a bank (make_prompt_bank), weighted by their distance.
    vectors: files of several sources, {clip: clip.npy, caption: caption.npy}; by an ensemble (model_path: train.py
        --regressor ensemble), in which a source may lack some names; of one source, also by a bank.
    published: model_path is a checkpoint of the published ensemble, which does not fuse; the log says what is wrong.
    suffix: put behind every text, such as ', fine details, masterpiece'.
    max_bad: share of the pictures that may be unreadable; they are left out and told.
    """
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.vectors import write_vectors

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
    inputs = [prompts, model_path, *(vectors or {}).values()]
    check_npy(out, *inputs)
    if model_path is not None and not Path(model_path).is_file():
        raise UserError(f"no checkpoint at {model_path}")
    refuse_overwriting(out, *inputs)
    failed: dict[str, str] = {}
    if prompts is not None:
        found = embed_texts(prompts, suffix, text_encoder, batch_size, device)
    elif images is not None:
        make = Looked(model_path, bank, nearest, device)
        found, failed = of_pictures(images, make.prepare, make, workers, batch_size, max_bad)
    elif bank is not None:
        found = by_bank(dict(vectors or {}), bank, nearest)
    else:
        found = fused(dict(vectors or {}), str(model_path), published, batch_size, device)
    write_vectors(Path(out), found)
    told: dict[str, Any] = {"out": out, "count": len(found.ids), "dim": found.values.shape[1]}
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
    out_dir: a folder; memory stays flat, however many prompts there are.
    towers: model of pictures and texts, whose text tower makes what a picture is compared with.
    """
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


def embed_texts(prompts: str, suffix: str, text_encoder: str, batch_size: int, device: str) -> Vectors:
    """Return the vectors of a file's texts by name; raises UserError."""
    from git_model.datasets.vectors import Vectors
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    texts = read_texts(prompts)
    encoder = SentenceEncoder(text_encoder, pick_device(device))
    return Vectors(tuple(texts), encoder([text + suffix for text in texts.values()], batch_size, progress=True))


class Looked:
    """What a regressor, or a bank of prompts, makes of pictures: vectors of their prompts."""

    def __init__(self, model_path: str | None, bank: str | None, nearest: int, device: str) -> None:
        from git_model.datasets.images import Transform, decode_image
        from git_model.tasks.opening import pick_device

        self.device, self.nearest = pick_device(device), nearest
        self.model: Any = None
        if model_path is not None:
            from git_model.checkpoint import load_regressor
            from git_model.models.regressor import PromptRegressor

            model, config = load_regressor(model_path)
            if not isinstance(model, PromptRegressor):
                raise UserError(f"{model_path} is an ensemble of {', '.join(model.widths)}: give vectors, not images")
            self.model = model.to(self.device)
            self.prepare: Callable[[bytes], Any] = Transform(model.vision.resolution, config.data.resize)
        else:
            from git_model.datasets.neighbours import PromptBank
            from git_model.models.phrases import TwoTowers

            self.bank = PromptBank(str(bank))
            self.towers = TwoTowers(self.bank.keys_of, self.device)
            self.prepare = decode_image

    def __call__(self, pictures: list[Any]) -> np.ndarray:
        """Return (n,F) float32."""
        if self.model is None:
            return self.bank.regress(self.towers.pictures(pictures), self.nearest)
        import torch

        with torch.inference_mode():
            return self.model.vectors(torch.stack(pictures).to(self.device)).float().cpu().numpy()


def of_pictures(
    images: str,
    prepare: Callable[[bytes], Any],
    make: Callable[[list[Any]], np.ndarray],
    workers: int,
    batch_size: int,
    max_bad: float,
) -> tuple[Vectors, dict[str, str]]:
    """Return the vectors of the pictures of a folder or a TSV by name, and why others have none.

    Raises:
        UserError: no such folder or file, or more unusable pictures than `max_bad` (exit code 3).
    """
    import numpy as np
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from git_model.datasets.asking import AskRows, FolderRows
    from git_model.datasets.prompt_files import picture_name
    from git_model.datasets.vectors import Vectors

    rows: Any = AskRows(Path(images), None, prepare) if images.endswith(".tsv") else FolderRows(Path(images), prepare)
    names, found, failed = [], [], dict[str, str]()
    loader = DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=_listed)
    with tqdm(total=len(rows), unit="image", desc="looking at pictures") as bar:
        for some in loader:
            good: list[AskRow] = [row for row in some if not row.error]
            failed |= {row.key: row.error for row in some if row.error}
            if good:
                found.append(make([row.picture for row in good]))
                names += [picture_name(row.key) for row in good]
            bar.update(len(some))
    if len(failed) > max_bad * len(rows) or not found:
        first, why = next(iter(failed.items()))
        told = f"{len(failed)} of {len(rows)} pictures are unusable, more than max_bad {max_bad:g}"
        raise UserError(f"{told}; such as {first}: {why}", EXIT_TOO_MANY_BAD)
    return Vectors(tuple(names), np.concatenate(found)), failed


def _listed(rows: list[AskRow]) -> list[AskRow]:
    return rows


def by_bank(vectors: dict[str, str], bank: str, nearest: int) -> Vectors:
    """Return what a bank says of the vectors of pictures; raises UserError."""
    from git_model.datasets.neighbours import PromptBank
    from git_model.datasets.vectors import Vectors, read_vectors

    if len(vectors) != 1:
        raise UserError(f"a bank is asked with one source's vectors, got {', '.join(vectors)}")
    given = read_vectors(Path(next(iter(vectors.values()))))
    return Vectors(given.ids, PromptBank(bank).regress(given.values, nearest))


def fused(vectors: dict[str, str], model_path: str, published: bool, batch_size: int, device: str) -> Vectors:
    """Return what an ensemble makes of its sources, joined by name; raises UserError."""
    import numpy as np
    import torch

    from git_model.checkpoint import load_regressor, read_content
    from git_model.datasets.vectors import Vectors, read_vectors
    from git_model.models.regressor import EnsembleRegressor, load_published
    from git_model.tasks.opening import pick_device

    place = pick_device(device)
    given = {name: read_vectors(Path(path)) for name, path in vectors.items()}
    if published:
        content = read_content(Path(model_path))
        old = load_published(content.get("state_dict", content)).to(place)
        widths, batch_size = old.widths, 1  # its answers depend on the other rows of a batch

        def answer(some: list[Any], _missing: Any) -> Any:
            return old(some)
    else:
        model, _ = load_regressor(model_path)
        if not isinstance(model, EnsembleRegressor):
            raise UserError(f"{model_path} looks at pictures: give images, not vectors")
        widths, answer = model.widths, model.to(place).vectors
    own = {name: source.values.shape[1] for name, source in given.items()}
    if own.keys() != widths.keys() or any(own[name] != widths[name] for name in own):
        raise UserError(f"vectors of {own}; {model_path} wants {dict(widths)}")
    ids = sorted(set().union(*(source.ids for source in given.values())))
    arrays, missing = [], np.zeros((len(ids), len(widths)), bool)
    for number, name in enumerate(widths):
        rows = {key: row for row, key in enumerate(given[name].ids)}
        there = np.array([rows.get(key, -1) for key in ids])
        missing[:, number] = there < 0
        arrays.append(torch.from_numpy(given[name].values[there]))  # what stands for a missing one does not matter
    if published and missing.any():
        key = ids[int(missing.any(1).argmax())]
        raise UserError(f"the published ensemble needs every source; '{key}' lacks one")
    found = []
    with torch.inference_mode():
        for start in range(0, len(ids), batch_size):
            some = [array[start : start + batch_size].to(place) for array in arrays]
            lacking = torch.from_numpy(missing[start : start + batch_size]).to(place)
            found.append(answer(some, lacking).float().cpu().numpy())
    return Vectors(tuple(ids), np.concatenate(found))


def check_npy(out: str, *inputs: str | None) -> None:
    """Raise UserError where `out` is no name for vectors."""
    if Path(out).suffix != ".npy":
        raise UserError(f"out is '{out}'; files of vectors end in .npy")


def read_texts(path: str) -> dict[str, str]:
    """Return texts by name: prompts of a CSV, captions of a TSV or COCO's JSON; raises UserError."""
    from git_model.datasets.annotations import read_results
    from git_model.datasets.prompt_files import picture_name, read_prompts

    if path.endswith(".csv"):
        return read_prompts(Path(path))
    return {picture_name(str(key)): text for key, text in read_results(path).items()}
