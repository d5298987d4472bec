"""Whether texts keep what their pictures show: each picture's text has to find the picture's captions, and back."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import UserError
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.models.text import SentenceEncoder

SHOWN = 30  # pictures on the page, of hits and of misses each


def evaluate_retrieval(
    *,
    label_file: str,
    paragraph_tsv: str | None = None,
    references: Literal["first", "joined"] | None = None,
    text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
    outfile: str | None = None,
    image_tsv: str | None = None,
    subset: bool = False,
    baselines: bool = False,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Find captions by each picture's text and texts by each caption: recall at 1, 5, 10, both ways, and median ranks.

    paragraph_tsv: a text for each picture, as captions are written (TSV or COCO's JSON).
    references: in its place, from the label file itself: each picture's first caption, which has to find the others,
        or all of them joined, which is the most a text can do.
    label_file: captions, TSV or COCO's JSON.
    text_encoder: sentence-transformers' id or folder.
    image_tsv: pictures for the page of hits and misses.
    subset: score only the images that have a text, where the label file has more.
    baselines: also the score of joined captions, and of texts dealt out to the wrong pictures.
    """
    if (paragraph_tsv is None) == (references is None):
        raise UserError("give one of paragraph_tsv and references ('first' or 'joined')")
    from git_model.datasets.annotations import read_references, read_results
    from git_model.datasets.files import write_all
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device
    from git_model.tasks.report import write_retrieval_page
    from git_model.tasks.score import out_file

    out = out_file(outfile, paragraph_tsv or label_file, label_file, image_tsv, ending=".retrieval.json")
    if out.suffix != ".json":
        raise UserError(f"outfile is '{out}'; its name must end in .json (the page goes beside it)")
    if image_tsv is not None and not Path(image_tsv).is_file():
        raise UserError(f"no TSV file '{image_tsv}'")
    labels = {str(key): list(texts) for key, texts in read_references(label_file).items()}
    if empty := [key for key, texts in labels.items() if not texts]:
        raise UserError(f"{label_file}: image '{empty[0]}' has no caption")
    if references is None:
        said = {str(key): text for key, text in read_results(str(paragraph_tsv)).items()}
    elif references == "joined":
        said = {key: joined(texts) for key, texts in labels.items()}
    else:
        if short := [key for key, texts in labels.items() if len(texts) < 2]:
            raise UserError(f"references 'first' needs two captions a picture; image '{short[0]}' has one")
        said, labels = (
            {key: texts[0] for key, texts in labels.items()},
            {key: texts[1:] for key, texts in labels.items()},
        )
    if subset:
        labels = {key: texts for key, texts in labels.items() if key in said}
    check_images(said, labels)
    where = pick_device(device)
    judge = Judge(SentenceEncoder(text_encoder, where), labels, batch_size, where)
    found = judge.scores(said)
    written: dict[str, Any] = {**found, "text_encoder": text_encoder}
    if baselines:
        written["joined_captions"] = judge.scores({key: joined(texts) for key, texts in labels.items()})
        written["wrong_pictures"] = judge.scores(dealt_out(said, judge.keys))
    write_all([(out, [json.dumps(written, indent=1).encode()])])
    page = write_retrieval_page(out.with_suffix(".html"), judge.examples(said, SHOWN), found, image_tsv)
    return {**written, "outfile": str(out), "page": str(page)}


class Judge:
    """Captions as vectors, by which texts are judged.

    Args:
        encoder: of both sides.
        labels: image -> captions.
        batch_size: texts encoded together.
        device: where the vectors are multiplied.
    """

    def __init__(
        self, encoder: SentenceEncoder, labels: Mapping[str, Sequence[str]], batch_size: int = 64, device: str = "cpu"
    ) -> None:
        self.encoder, self.batch_size, self.device = encoder, batch_size, device
        self.keys = list(labels)
        self.captions = [text for texts in labels.values() for text in texts]  # (M,)
        self.image_of = [i for i, texts in enumerate(labels.values()) for _ in texts]  # (M,)
        self.vectors = encoder(self.captions, batch_size, progress=True)  # (M,F)

    def scores(self, said: Mapping[str, str]) -> dict[str, float]:
        """Return the figures of a text for each picture; see `Ranks.figures`."""
        from git_model.metrics.retrieval import ranks

        return ranks(self._encoded(said), self.vectors, self.image_of, self.device).figures()

    def examples(self, said: Mapping[str, str], most: int) -> list[dict[str, Any]]:
        """Return pictures whose text finds none of their captions at once, then some whose text does: `most` of each.

        Each has `key`, `text`, `found` (captions with whether they are its own), `rank` (from 1).
        """
        from git_model.metrics.retrieval import nearest, ranks

        vectors = self._encoded(said)
        rank = ranks(vectors, self.vectors, self.image_of, self.device).image_to_text  # (N,)
        missed = sorted((i for i in range(len(rank)) if rank[i] > 0), key=lambda i: -rank[i])[:most]
        chosen = [*missed, *[i for i in range(len(rank)) if rank[i] == 0][:most]]
        if not chosen:
            return []
        numbers, _ = nearest(vectors[chosen], self.vectors, 5, self.device)  # (n,5)
        return [
            {
                "key": self.keys[i],
                "text": said[self.keys[i]],
                "rank": int(rank[i]) + 1,
                "found": [(self.captions[m], self.image_of[m] == i) for m in row],
            }
            for i, row in zip(chosen, numbers.tolist(), strict=True)
        ]

    def _encoded(self, said: Mapping[str, str]) -> Any:
        return self.encoder([said[key] for key in self.keys], self.batch_size)  # (N,F)


def joined(texts: Sequence[str]) -> str:
    """Return captions as one paragraph."""
    return " ".join(text.strip().rstrip(".") + "." for text in texts)


def dealt_out(said: Mapping[str, str], keys: Sequence[str]) -> dict[str, str]:
    """Return the texts, each at another picture than its own; the same way every time."""
    order = list(keys)
    random.Random(0).shuffle(order)
    return {order[i]: said[order[i - 1]] for i in range(len(order))}


def check_images(said: Mapping[str, str], labels: Mapping[str, Sequence[str]]) -> None:
    """Say which images are on one side only; raises UserError."""
    if not labels:
        raise UserError("there is no image with a text and captions")
    for missing, where in ((labels.keys() - said.keys(), "no text"), (said.keys() - labels.keys(), "no caption")):
        if missing:
            some = ", ".join(sorted(missing)[:3])
            advice = "; 'subset' scores only the images with a text" if where == "no text" else ""
            raise UserError(f"{len(missing)} images have {where}, such as {some}{advice}")
