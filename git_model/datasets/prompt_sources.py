"""Pictures and the prompts they were made of: a CSV beside a folder, and DiffusionDB as its authors publish it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from git_model.batch import Sample, Target
from git_model.datasets.asking import FolderRows
from git_model.datasets.files import SampleError
from git_model.datasets.prompt_files import (
    ENDINGS,
    PromptRows,
    picture_name,
    read_csv,
    read_metadata,
    read_names,
    release,
)
from git_model.datasets.tsv_sources import existing_file
from git_model.errors import UserError


class PromptRecords:
    """Pictures with their prompts; what the sources below share. A record's key is its name without the ending.

    Args:
        rows: names and prompts.
        images: folder of the pictures.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, rows: PromptRows, images: Path) -> None:
        if not images.is_dir():
            raise UserError(f"no image folder at {images}")
        release()
        self.rows, self.images = rows, images

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sample = self.said(index)
        return replace(sample, images=(_read_first(self.places(index), sample.key),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        name, prompt = self.rows.names[index].as_py(), self.rows.prompts[index].as_py().strip()
        key = picture_name(name)
        if "\0" in name or not (parts := PurePosixPath(name).parts) or {"/", "..", "//"} & set(parts):
            raise SampleError(key, "bad_name")  # no file of the folder
        if not prompt:
            raise SampleError(key, "no_prompt")
        return Sample(key, (), (Target(prompt),))

    def places(self, index: int) -> Iterator[Path]:
        """Yield where a record's picture may be."""
        yield self.images / self.rows.names[index].as_py()

    def texts(self) -> Iterator[str]:
        """Yield every prompt."""
        return filter(None, (prompt.strip() for _, prompt in self.rows.pairs()))


class PromptPictures(PromptRecords):
    """A CSV of names and prompts, and a folder of pictures.

    Args:
        dir: where relative names start.
        prompts: the CSV; its columns are `prompt` and one of ID_COLUMNS (Kaggle's imgId, DiffusionDB's image).
        images: folder of the pictures: `<name>` as the CSV has it, or `<name>.png` (.jpg, .jpeg, .webp) where it leaves
            the ending out.
    """

    def __init__(self, dir: Path, prompts: str, images: str) -> None:
        super().__init__(read_csv(existing_file(dir / prompts, "prompt CSV")), dir / images)

    def places(self, index: int) -> Iterator[Path]:
        """Yield where a record's picture may be."""
        path = self.images / self.rows.names[index].as_py()
        yield path
        if path.suffix.lower() not in ENDINGS:
            yield from (path.with_name(path.name + ending) for ending in ENDINGS)


class DiffusionDb(PromptRecords):
    """DiffusionDB: `metadata.parquet`, and pictures in `part-000001/<image_name>` as they are published, or flat.

    Args:
        dir: where relative names start.
        metadata: the parquet file.
        images: folder of the parts, or of the pictures.
        nsfw: records whose `image_nsfw` or `prompt_nsfw` is above this, or is not told, are left out. Scores are
            likelihoods from 0 to 1, the picture's by LAION's detector, the prompt's by Detoxify; a picture that Stable
            Diffusion has blurred already has 2 (README of poloclub/diffusiondb). 1 leaves out the blurred ones, 2 none.
        ids: names to keep: a text file with one a line, or a CSV such as `split_prompts` writes; with or without
            endings. None = all.
    """

    def __init__(self, dir: Path, metadata: str, images: str, nsfw: float = 1.0, ids: str | None = None) -> None:
        path = existing_file(dir / metadata, "DiffusionDB metadata")
        kept = read_names(existing_file(dir / ids, "names")) if ids is not None else None
        super().__init__(read_metadata(path, nsfw, kept), dir / images)

    def places(self, index: int) -> Iterator[Path]:
        """Yield where a record's picture may be."""
        name = self.rows.names[index].as_py()
        if self.rows.parts is not None and (part := int(self.rows.parts[index])) >= 0:
            yield self.images / f"part-{part:06d}" / name
        yield self.images / name


class PictureFolder:
    """A folder of pictures of which nothing is said: for features of them.

    Args:
        dir: where relative names start.
        images: the folder; pictures below it count, too. A record's key is the picture's name from there.
    """

    def __init__(self, dir: Path, images: str) -> None:
        self.files = list(FolderRows(dir / images, bytes).files.items())

    def identity(self) -> str:
        """Return a hash of names, sizes and times: features of other pictures under the same names are others."""
        digest = hashlib.sha256()
        for name, path in self.files:
            status = path.stat()
            digest.update(f"{name}|{status.st_size}|{status.st_mtime_ns};".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        name, path = self.files[index]
        return Sample(name, (_read_first([path], name),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        return Sample(self.files[index][0], ())

    def texts(self) -> Iterator[str]:
        """Yield nothing."""
        return iter(())


def _read_first(paths: Iterable[Path], key: str) -> bytes:
    """Return the first file that is there."""
    reason = "missing"
    for path in paths:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except OSError as error:
            reason = f"unreadable: {error.strerror}"
    raise SampleError(key, reason)
