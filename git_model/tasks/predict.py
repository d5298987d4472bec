"""Where vectors of prompts come from: texts, pictures by a regressor or a bank, several sources by an ensemble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.prompt_inputs import read_texts, unique

if TYPE_CHECKING:
    import numpy as np

    from git_model.datasets.asking import AskRow
    from git_model.datasets.vectors import Vectors


def embed_texts(
    prompts: str, suffix: str, text_encoder: str, batch_size: int, device: str, max_bad: float
) -> tuple[Vectors, dict[str, str]]:
    """Return the vectors of a file's texts by name, and why others have none.

    Raises:
        UserError: what cannot be read; more captions that are none than `max_bad` (exit code 3).
    """
    from git_model.datasets.vectors import Vectors
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    failed: dict[str, str] = {}
    texts = read_texts(prompts, failed)
    check_failed(failed, len(texts) + len(failed), max_bad, "captions")
    encoder = SentenceEncoder(text_encoder, pick_device(device))
    values = encoder([text + suffix for text in texts.values()], batch_size, progress=True)
    return Vectors(tuple(texts), values), failed


def check_failed(failed: dict[str, str], count: int, max_bad: float, what: str) -> None:
    """Raise UserError (exit code 3) where more of `count` have failed than may, or all."""
    if len(failed) > max_bad * count or len(failed) == count:
        first, why = next(iter(failed.items()))
        told = f"{len(failed)} of {count} {what} are unusable, more than max_bad {max_bad:g}"
        raise UserError(f"{told}; such as {first}: {why}", EXIT_TOO_MANY_BAD)


class Looked:
    """What a regressor, or a bank of prompts, makes of pictures: vectors of their prompts."""

    def __init__(
        self, model_path: str | None, bank: str | None, nearest: int, device: str, towers: str | None = None
    ) -> None:
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
            from git_model.tasks.bank import open_bank

            self.bank, self.towers = open_bank(str(bank), towers, self.device)
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
    from tqdm import tqdm

    from git_model.datasets.asking import AskRows, FolderRows
    from git_model.datasets.prompt_files import picture_name
    from git_model.datasets.vectors import Vectors
    from git_model.tasks.tsv import chunks

    rows: Any = AskRows(Path(images), None, prepare) if images.endswith(".tsv") else FolderRows(Path(images), prepare)
    if isinstance(rows, FolderRows):
        unique([picture_name(key) for key in rows.keys])
    names, found, failed = [], [], dict[str, str]()
    with tqdm(total=len(rows), unit="image", desc="looking at pictures") as bar:
        for some in chunks(rows, range(len(rows)), workers, batch_size):
            good: list[AskRow] = [row for row in some if not row.error]
            failed |= {row.key: row.error for row in some if row.error}
            if good:
                found.append(make([row.picture for row in good]))
                names += [picture_name(row.key) for row in good]
            bar.update(len(some))
    check_failed(failed, len(rows), max_bad, "pictures")
    return Vectors(tuple(names), np.concatenate(found)), failed


def by_bank(vectors: dict[str, str], bank: str, nearest: int) -> Vectors:
    """Return what a bank says of the vectors of pictures; raises UserError."""
    from git_model.datasets.neighbours import PromptBank
    from git_model.datasets.vectors import Vectors, read_vectors

    if len(vectors) != 1:
        raise UserError(f"a bank is asked with one source's vectors, got {', '.join(vectors)}")
    given = read_vectors(Path(next(iter(vectors.values()))))
    return Vectors(given.ids, PromptBank(bank).regress(given.values, nearest))


def fused(
    vectors: dict[str, str], model_path: str, published: bool, batch_size: int, device: str
) -> tuple[Vectors, dict[str, int]]:
    """Return what an ensemble makes of its sources, joined by name, and how many names each lacks; raises UserError."""
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
        there = given[name].rows(ids)
        missing[:, number] = there < 0
        arrays.append(torch.from_numpy(given[name].values[there]))  # what stands for a missing one does not matter
    lacks = {name: int(missing[:, number].sum()) for number, name in enumerate(widths)}
    for name, source in given.items():
        others = set().union(*(other.ids for other in given.values() if other is not source))
        if others and others.isdisjoint(source.ids):
            raise UserError(f"no name of '{vectors[name]}' ({source.ids[0]}, ...) is one of another source's")
    if published and missing.any():
        key = ids[int(missing.any(1).argmax())]
        raise UserError(f"the published ensemble needs every source; '{key}' lacks one")
    found = []
    with torch.inference_mode():
        for start in range(0, len(ids), batch_size):
            some = [array[start : start + batch_size].to(place) for array in arrays]
            lacking = torch.from_numpy(missing[start : start + batch_size]).to(place)
            found.append(answer(some, lacking).float().cpu().numpy())
    return Vectors(tuple(ids), np.concatenate(found)), lacks
