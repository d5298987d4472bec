"""The page itself, made of Gradio's parts. Texts of visitors and of the model go into text fields, not into HTML."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.data_classes import Base64ImageData
from PIL import Image
from starlette.middleware import Middleware

from git_model.errors import ImageError, UserError
from git_model.tasks.guard import LOOPBACK, Guard, Pace, Sandbox
from git_model.tasks.paragraph_tab import CSS as TOLD_CSS
from git_model.tasks.paragraph_tab import Finder, ParagraphTab
from git_model.tasks.session import MAX_UPLOAD, MODES, Picture, Session, without_folders
from git_model.tasks.speaker import MAX_PROMPT, Settings, Speaker
from git_model.tasks.teller import Teller

log = logging.getLogger(__name__)

UPLOADS = 2  # for each answer that an address may get
SESSIONS = 32  # whose pictures are kept; the longest unused are forgotten first
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
CSS = """
.gradio-container { max-width: 56rem !important; margin: 0 auto !important; overflow-wrap: anywhere; }
#picture img { cursor: crosshair; max-height: 75vh; }
#examples .grid-wrap { min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
"""
HELP = "Click at a corner of a box in the picture, then at the opposite one."
NO_BOXES = "This model was trained without boxes (--region): it tells of whole pictures, clicks are off."


class Page:
    """A model's web page.

    Args:
        speaker: the model.
        examples: pictures to begin with.
        max_beams: the most a visitor may ask for.
        max_new_tokens: likewise.
        per_minute: answers that one address gets; 0 = as many as it asks for.
        teller: writes paragraphs, in a tab of its own; None = there is none.
        finder: of a folder's pictures, in the same tab.
    """

    def __init__(
        self,
        speaker: Speaker,
        examples: Sequence[Picture],
        max_beams: int,
        max_new_tokens: int,
        per_minute: int = 0,
        teller: Teller | None = None,
        finder: Finder | None = None,
    ) -> None:
        self.limits, self.pace, self.sandbox = (max_beams, max_new_tokens), Pace(per_minute), Sandbox()
        self.speaker, self.examples = replace(speaker, run=self.sandbox), examples
        with gr.Blocks(title="Captions of pictures", analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            if teller is None:
                self._ask_tab()
                return
            with gr.Tab("Ask"):
                self._ask_tab()
            with gr.Tab("Paragraph"):
                ParagraphTab(teller, finder, self.sandbox, self._count, MODEL)

    def _ask_tab(self) -> None:
        self._lay_out()
        self._connect()

    def launch(self, host: str, port: int, share: bool, max_waiting: int) -> str:
        """Start to answer, in threads, and return the address.

        Args:
            host: whom to listen to.
            port: a free one.
            share: open a public tunnel, too.
            max_waiting: requests that may wait.
        """
        checks: dict[str, Any] = {"names": () if share or host not in LOOPBACK else LOOPBACK, "same_site": not share}
        checks |= {"uploads": Pace(UPLOADS * self.pace.most), "folder": os.environ.get("GRADIO_TEMP_DIR")}
        plain = gr.themes.Default(font=[gr.themes.Font("sans-serif")], font_mono=[gr.themes.Font("monospace")])
        self.blocks.queue(default_concurrency_limit=1, max_size=max_waiting, api_open=False)
        _, local, public = self.blocks.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, inbrowser=False,
            max_file_size=MAX_UPLOAD, allowed_paths=[], state_session_capacity=SESSIONS, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, show_error=False, footer_links=[], theme=plain,
            css=CSS + TOLD_CSS, app_kwargs={"middleware": [Middleware(Guard, **checks)]},
        )  # fmt: skip
        return public or local

    def close(self) -> None:
        """Stop answering."""
        self.blocks.close(verbose=False)
        self.sandbox.close()

    def _lay_out(self) -> None:
        boxes = self.speaker.reads_boxes
        self.session = gr.State(Session(), time_to_live=3600)
        gr.Markdown("## Captions of pictures\n\n" + (HELP if boxes else NO_BOXES))
        self.mode = gr.Radio(list(MODES), value=MODES[0], label="Mode", elem_id="mode")
        self.upload = gr.UploadButton(
            "Upload a picture", file_types=["image"], file_count="multiple", type="binary", elem_id="upload"
        )
        self.message = gr.Textbox(Session().message, label="Message", interactive=False, elem_id="message")
        self.gallery = gr.Gallery(
            [example.shown for example in self.examples], label="Examples", visible=bool(self.examples),
            columns=4, fit_columns=False, height="auto", object_fit="contain", allow_preview=False, buttons=[],
            interactive=False, elem_id="examples",
        )  # fmt: skip
        self.picker = gr.Radio([], label="Picture", visible=False, elem_id="picker", type="index")
        self.picture = gr.Image(label="Picture", interactive=False, buttons=[], elem_id="picture")
        self.picture.postprocess = inline  # type: ignore[method-assign] # a class of its own would be written a .pyi
        with gr.Row():
            names = ("left", "top", "right", "bottom")
            self.corners = [
                gr.Number(-1, label=name, min_width=60, interactive=boxes, elem_id=name, minimum=-1) for name in names
            ]
        self.prompt = gr.Textbox(label="Prompt (empty: a caption)", max_length=MAX_PROMPT, elem_id="prompt")
        self.describe = gr.Button("Describe", variant="primary", elem_id="describe")
        self.dialogue = gr.Textbox(label="Dialogue", lines=4, interactive=False, visible=False, elem_id="dialogue")
        self.question = gr.Textbox(
            label="Question (Enter asks)", max_length=MAX_PROMPT, visible=False, elem_id="question"
        )
        self.answer = gr.Textbox(label="Answer", lines=2, interactive=False, buttons=["copy"], elem_id="answer")
        self.restart = gr.Button("Restart", elem_id="restart")
        with gr.Accordion("Settings", open=False):
            beams, tokens = self.limits
            self.controls = [
                gr.Slider(1, max(beams, 2), 1, step=1, label="Beams", interactive=beams > 1, elem_id="beams"),
                gr.Checkbox(False, label="Sample", elem_id="sample"),
                gr.Slider(0.1, 2, 1, step=0.1, label="Temperature (of sampling)", elem_id="temperature"),
                gr.Slider(1, max(tokens, 2), min(40, tokens), step=1, label="New tokens", elem_id="tokens"),
            ]
        with gr.Accordion("Answer as JSON", open=False):
            self.record = gr.Textbox(
                label="JSON", lines=6, interactive=False, buttons=["copy"], elem_id="record", show_label=False
            )

    def _connect(self) -> None:
        seen = [
            self.session, self.picture, *self.corners, self.picker, self.prompt, self.describe, self.dialogue,
            self.question, self.message, self.answer, self.record, self.upload,
        ]  # fmt: skip

        def clicked(session: Session, event: gr.SelectData) -> list[Any]:
            return self._tried(session, lambda: session.clicked(*event.index) if self.speaker.reads_boxes else session)

        def chosen(session: Session, event: gr.SelectData) -> list[Any]:
            return self._tried(session, lambda: session.uploaded([self.examples[event.index].data], self.sandbox))

        def picked(session: Session, number: int | None) -> list[Any]:
            return self._tried(session, lambda: session.picked(number or 0))

        def restarted(session: Session, mode: str) -> list[Any]:
            return self._tried(session, lambda: session.restarted(mode))

        def described_if_due(session: Session, request: gr.Request, prompt: str, *controls: Any) -> list[Any]:
            def describe() -> Session:
                return self._described(session, request, prompt, controls) if session.due else session

            return self._tried(session, describe)

        asking = [self.session, self.prompt, *self.controls]
        click = self.picture.select(clicked, [self.session], seen, **HIDDEN)
        click.then(described_if_due, asking, seen, api_visibility="private", **MODEL)
        self.gallery.select(chosen, [self.session], seen, **HIDDEN)
        self.upload.upload(self._uploaded, [self.session, self.upload], seen, api_visibility="private")
        self.picker.input(picked, [self.session, self.picker], seen, **HIDDEN)
        for event in (self.mode.input, self.restart.click):
            event(restarted, [self.session, self.mode], seen, **HIDDEN)
        typed = [self.session, self.prompt, *self.corners, *self.controls]
        for event in (self.describe.click, self.prompt.submit):
            event(self._typed, typed, seen, api_visibility="private", **MODEL)
        typed[1] = self.question
        self.question.submit(self._asked, typed, [*seen, self.question], api_visibility="private", **MODEL)

    def _uploaded(self, session: Session, files: list[bytes] | None) -> list[Any]:
        return self._tried(session, lambda: session.uploaded(files or [], self.sandbox))

    def _typed(self, session: Session, request: gr.Request, prompt: str, *values: Any) -> list[Any]:
        def describe() -> Session:
            return self._described(self._boxed(session, values[:4]), request, prompt, values[4:])

        return self._tried(session, describe)

    def _asked(self, session: Session, request: gr.Request, question: str, *values: Any) -> list[Any]:
        def ask() -> Session:
            self._count(request)
            how = Settings.checked(values[4:], *self.limits)
            return self.speaker.asked(self._boxed(session, values[:4]), question, how)

        shown = self._tried(session, ask)
        return [*shown, "" if shown[0].turns != session.turns else question]

    def _boxed(self, session: Session, corners: Sequence[Any]) -> Session:
        return session.boxed(corners) if session.pictures and self.speaker.reads_boxes else session

    def _described(self, session: Session, request: gr.Request, prompt: str, controls: Sequence[Any]) -> Session:
        self._count(request)
        return self.speaker.described(session, prompt, Settings.checked(controls, *self.limits))

    def _count(self, request: gr.Request) -> None:
        self.pace.check(request.client.host if request.client else "")

    def _tried(self, session: Session, change: Callable[[], Session]) -> list[Any]:
        """Return what the page shows after a change; after a failed one, all as it was and a message."""
        try:
            session = change()
        except (UserError, ImageError) as error:
            session = replace(session, message=without_folders(str(error)), due=False)
        except Exception:
            log.exception("a request failed")
            session = replace(session, message="This failed; the server's log says why.", due=False)
        return self._shown(session)

    def _shown(self, session: Session) -> list[Any]:
        picture, asking = session.picture, session.mode == "Question"
        corners = picture.corners if picture else (-1,) * 4
        if session.corner is not None:
            corners = (*session.corner, -1, -1)
        names = [f"{number + 1}" for number in range(len(session.pictures))]
        chosen = names[session.chosen] if names else None
        return [
            session,
            picture.drawn(session.corner) if picture else None,
            *corners,
            gr.update(choices=names, value=chosen, visible=len(names) > 1),
            gr.update(visible=not asking),
            gr.update(visible=not asking),
            gr.update(value=_told(session), visible=asking),
            gr.update(visible=asking),
            session.message,
            session.answer,
            session.record,
            gr.update(label="Upload more" if asking and session.pictures else "Upload a picture", value=None),
        ]


def inline(picture: Image.Image | None) -> Base64ImageData | None:
    """Return a picture as part of the page's data: no file of it lies on the server, and no address leads to it."""
    if picture is None:
        return None
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Base64ImageData(url=f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def _told(session: Session) -> str:
    """Return the dialogue as plain text."""
    return "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in session.turns)
