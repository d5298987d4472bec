"""Prompts to train on and prompts to be judged by, none of the one kind near one of the other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

from git_model.errors import UserError
from git_model.tasks.prompt_inputs import ENCODER
from git_model.tasks.values import Range

HEADER = ("image", "prompt")
ROWS = 65536  # written at a time


def split_prompts(
    *,
    prompts: str,
    out_dir: str,
    share: Annotated[float, Range(0, 0.9)] = 0.1,
    near: Annotated[float, Range(0, 1)] | None = 0.9,
    seed: int = 0,
    text_encoder: str = ENCODER,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Split pictures by their prompts: <out_dir>/train.csv and val.csv (image, prompt), no prompt or near one in both.

    prompts: CSV (imgId or image, prompt), or DiffusionDB's metadata (.parquet).
    share: of the rows that go into val.csv, at most.
    near: prompts whose vectors' cosine is above this stay together, and those joined by others between them; null = the
        same text only (case and white space apart), which needs no encoder. The time grows with the square of the
        number of prompts.
    text_encoder: sentence-transformers' id or folder.
    """
    import numpy as np

    from git_model.datasets.files import refuse_overwriting, write_all
    from git_model.datasets.groups import plain_text, prompt_groups, split_groups
    from git_model.datasets.prompt_files import read_rows

    folder = Path(out_dir)
    files = [folder / "train.csv", folder / "val.csv"]
    for file in files:
        refuse_overwriting(file, prompts)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir is '{out_dir}', which is a file; a folder is wanted")
    rows = read_rows(Path(prompts))
    texts = [prompt for _, prompt in rows.pairs()]
    distinct = sorted(set(texts))  # in this order: rows in another one are encoded alike
    place = {text: number for number, text in enumerate(distinct)}
    vectors = None
    if near is not None:
        from git_model.models.text import SentenceEncoder
        from git_model.tasks.opening import pick_device

        vectors = SentenceEncoder(text_encoder, pick_device(device))(distinct, batch_size, progress=True)  # (n,F)
    groups = prompt_groups(distinct, vectors, 1.0 if near is None else near)  # (n,)
    labels = groups[[place[text] for text in texts]]  # (N,)
    held_out = split_groups(labels, share, seed)  # (N,)
    folder.mkdir(parents=True, exist_ok=True)
    sides = (~held_out, held_out)
    write_all((file, _csv(compress(rows.pairs(), side.tolist()))) for file, side in zip(files, sides, strict=True))
    sizes = np.unique(labels, return_counts=True)[1]  # (G,)
    return {
        "rows": len(rows),
        "texts": len({plain_text(text) for text in distinct}),
        "groups": len(sizes),
        "train": int(sides[0].sum()),
        "val": int(sides[1].sum()),
        "largest_group": int(sizes.max()),
    }


def _csv(pairs: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """Yield a CSV's bytes, many rows at a time."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEADER)
    for number, pair in enumerate(pairs, 1):
        rows.writerow(pair)
        if number % ROWS == 0:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()
