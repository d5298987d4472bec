"""The page's tab of paragraphs: a picture's text with its regions, and pictures of a folder found by a text.

What is shown as HTML is put together here, and every text in it is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from git_model.errors import ImageError, UserError
from git_model.tasks.guard import Sandbox
from git_model.tasks.levels import spelt
from git_model.tasks.session import opened, without_folders

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.models.text import SentenceEncoder
    from git_model.tasks.teller import Teller, Told

log = logging.getLogger(__name__)

MARKED = 32  # regions that light up
FOUND = 6  # pictures that a text finds
THUMB = 256  # pixels
CSS = (
    ".told svg { width: 100%; height: auto; max-height: 70vh; } .told rect { fill: none; stroke: transparent; "
    "stroke-width: 3px; vector-effect: non-scaling-stroke; }"
    ".told mark { background: #eef1f6; color: inherit; border-radius: 3px; padding: 0 .15em; cursor: default; }"
    ".told mark:hover, .told mark:focus { background: #ffd9a8; outline: none; }"
    ".found { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }"
    ".found img { width: 100%; height: auto; } .found p { margin: .2rem 0; font-size: .85rem; }"
    # one rule each: Gradio takes a selector apart at every comma
    + "".join(
        f".told:has(.s{i}:{when}) .r{i} {{ stroke: #e6194b; }}" for i in range(MARKED) for when in ("hover", "focus")
    )
)


@dataclass(frozen=True)
class Finder:
    """Pictures with their texts, found by other texts.

    Args:
        encoder: of all texts.
        keys: names of the pictures.
        texts: of the pictures.
        thumbs: the pictures, small, as JPEG files.
        vectors: (N,F) of the texts.
    """

    encoder: SentenceEncoder
    keys: Sequence[str]
    texts: Sequence[str]
    thumbs: Sequence[bytes]
    vectors: np.ndarray

    @classmethod
    def of_folder(cls, folder: Path, said: Path, encoder: SentenceEncoder) -> Finder:
        """Return a folder's pictures with what image_to_paragraph wrote of them; those without a text are left out.

        Args:
            folder: of pictures.
            said: the TSV.
            encoder: of texts.

        Raises:
            UserError: the TSV tells of none of the pictures.
        """
        from git_model.datasets.annotations import read_results
        from git_model.datasets.asking import FolderRows
        from git_model.datasets.images import decode_image

        texts = {str(key): text for key, text in read_results(str(said)).items() if text}
        rows = FolderRows(folder, decode_image)
        thumbs: dict[str, bytes] = {}
        for number, key in enumerate(rows.keys):
            row = rows[number] if key in texts else None
            if row is not None and not row.error:
                thumbs[key] = _thumb(row.picture)
        if not thumbs:
            raise UserError(f"{said} tells of no picture in {folder}")
        found = [texts[key] for key in thumbs]
        return cls(encoder, list(thumbs), found, list(thumbs.values()), encoder(found))

    def find(self, text: str) -> list[int]:
        """Return the numbers of the pictures whose texts are nearest, best first."""
        from git_model.metrics.retrieval import nearest

        return nearest(self.encoder([text]), self.vectors, FOUND)[0][0].tolist()


class ParagraphTab:
    """The tab's parts.

    Args:
        teller: the models.
        finder: of a folder's pictures; None = there is none.
        sandbox: where uploads are decoded.
        count: called before each answer, with the request; may raise UserError.
        model: Gradio's settings of events that use the model.
    """

    def __init__(
        self,
        teller: Teller,
        finder: Finder | None,
        sandbox: Sandbox,
        count: Callable[[gr.Request], None],
        model: dict[str, Any],
    ) -> None:
        self.teller, self.finder, self.sandbox, self.count = teller, finder, sandbox, count
        gr.Markdown("A picture becomes a paragraph; point at a thing in the text to see where it is.")
        upload = gr.UploadButton("Upload a picture", file_types=["image"], type="binary", elem_id="tell")
        message = gr.Textbox("Upload a picture.", label="Message", interactive=False, elem_id="tell_message")
        shown = gr.HTML(elem_id="told")
        text = gr.Textbox(label="Paragraph", lines=4, interactive=False, buttons=["copy"], elem_id="paragraph")
        with gr.Accordion("All that is known as JSON", open=False):
            record = gr.Textbox(label="JSON", lines=6, interactive=False, buttons=["copy"], elem_id="levels")
        seen = [shown, text, record, message, upload]
        upload.upload(self._told, [upload], seen, api_visibility="private", **model)
        if finder is not None:
            gr.Markdown(f"Find one of {len(finder.keys)} pictures by a text.")
            asked = gr.Textbox(label="Text (Enter searches)", max_length=4096, elem_id="wanted")
            gallery = gr.HTML(elem_id="gallery")
            text.change(_as_it_is, [text], [asked], api_visibility="private")
            asked.submit(self._found, [asked], [gallery], api_visibility="private", **model)

    def _told(self, file: bytes | None, request: gr.Request) -> list[Any]:
        from git_model.datasets.images import decode_image

        try:
            self.count(request)
            if not file:
                raise UserError("there is no picture; upload one")
            known = opened(file, self.sandbox)
            told = self.teller.told(self.sandbox(decode_image, file))
        except (UserError, ImageError) as error:
            return ["", "", "", without_folders(str(error)), gr.update(value=None)]
        except Exception:
            log.exception("a request failed")
            return ["", "", "", "This failed; the server's log says why.", gr.update(value=None)]
        record = without_folders(json.dumps(told.record(), ensure_ascii=False, indent=1))
        return [highlighted(known.shown, told), told.paragraph.text, record, "", gr.update(value=None)]

    def _found(self, text: str, request: gr.Request) -> str:
        assert self.finder is not None
        try:
            self.count(request)
        except UserError as error:
            return f"<p>{html.escape(str(error))}</p>"
        if not text.strip():
            return ""
        cards = []
        for number in self.finder.find(text):
            key, said = html.escape(self.finder.keys[number]), html.escape(self.finder.texts[number])
            data = base64.b64encode(self.finder.thumbs[number]).decode()
            cards.append(
                f"<div><img alt='{key}' src='data:image/jpeg;base64,{data}'><p><b>{key}</b></p><p>{said}</p></div>"
            )
        return f"<div class='found'>{''.join(cards)}</div>"


def highlighted(shown: Image, told: Told) -> str:
    """Return HTML of a picture and its paragraph, in which a region's words light up its box."""
    width, height = told.levels.size
    file = io.BytesIO()
    shown.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    things = told.levels.regions[:MARKED]
    boxes = "".join(
        f"<rect class='r{i}' x='{t.box[0]:g}' y='{t.box[1]:g}' width='{t.box[2] - t.box[0]:g}' "
        f"height='{t.box[3] - t.box[1]:g}'/>"
        for i, t in enumerate(things)
    )
    picture = f"<image href='data:image/png;base64,{data}' width='{width}' height='{height}'/>"
    text = marked(told.paragraph.text, [spelt(thing.text) for thing in things])
    return f"<div class='told'><svg viewBox='0 0 {width} {height}'>{picture}{boxes}</svg><p>{text}</p></div>"


def marked(paragraph: str, names: Sequence[str]) -> str:
    """Return a paragraph as HTML in which the first place of each name is marked s0, s1, ...; names may be alike."""
    places: dict[tuple[int, int], list[int]] = {}
    for number, name in enumerate(names):
        if name and (found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", paragraph, re.IGNORECASE)):
            places.setdefault(found.span(), []).append(number)
    parts, end = [], 0
    for (start, stop), numbers in sorted(places.items()):
        if start < end:  # within another one's words
            continue
        classes = " ".join(f"s{number}" for number in numbers)
        parts += [html.escape(paragraph[end:start])]
        parts += [f"<mark class='{classes}' tabindex='0'>{html.escape(paragraph[start:stop])}</mark>"]
        end = stop
    return "".join([*parts, html.escape(paragraph[end:])])


def _thumb(picture: Image) -> bytes:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMB, THUMB))
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def _as_it_is(text: str) -> str:
    return text
