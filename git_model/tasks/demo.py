"""The task that shows a model as a web page, on this machine only unless asked otherwise."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.errors import UserError
from git_model.tasks.options import BatchOptions, ModelOptions, SearchOptions
from git_model.tasks.teller import RegionOptions, WriterOptions
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.tasks.page import Page
    from git_model.tasks.paragraph_tab import Finder

log = logging.getLogger(__name__)


def demo(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Range(0, 65535)] = 7860,
    share: bool = False,
    examples: list[str] | None = None,
    max_waiting: Annotated[int, Range(1, 1000)] = 20,
    max_beams: Annotated[int, Range(1, 5)] = 5,
    max_new_tokens: Annotated[int, Range(1, 100)] = 100,
    max_seconds: Annotated[int, Range(1, 3600)] = 60,
    per_minute: int | None = None,
    gallery: str | None = None,
    gallery_tsv: str | None = None,
    text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
    regions: RegionOptions,
    writing: WriterOptions,
    model: ModelOptions,
) -> dict[str, Any]:
    """Show a model as a web page until Ctrl-C: click at a box to have it described, or ask about pictures.

    host: whom the page listens to; the default is this machine alone, 0.0.0.0 everybody who reaches it.
    port: 0 = any that is free.
    share: also open a public tunnel, through Gradio's servers.
    examples: pictures to begin with.
    max_waiting: requests that may wait; one is answered at a time.
    max_beams, max_new_tokens: the most a visitor may ask for.
    max_seconds: of an answer; it ends then with what there is.
    per_minute: answers that one address gets, 0 = all it asks for; null = 0 on this machine alone, else 10.
    gallery: a folder of pictures that visitors find by texts; gallery_tsv: the pictures' paragraphs, which are written
        before the page is there unless they are (image_to_paragraph); text_encoder: of the texts.
    """
    if any(importlib.util.find_spec(name) is None for name in ("gradio", "pebble")):
        raise UserError("the page needs Gradio and pebble: pip install 'generative-image-to-text[demo]'")
    model.check()
    from git_model.datasets.images import read_image
    from git_model.tasks.guard import LOOPBACK
    from git_model.tasks.session import opened

    pictures = []
    for path in examples or ():
        try:
            pictures.append(opened(read_image(path)))
        except UserError as error:
            raise UserError(f"examples: {path}: {error}") from error
    if per_minute is None:
        per_minute = 10 if share or host not in LOOPBACK else 0
    elif per_minute < 0:
        raise UserError(f"per_minute is {per_minute}; 0 or more")
    if (gallery is None) != (gallery_tsv is None):
        raise UserError("gallery and gallery_tsv belong together: pictures, and where their paragraphs are")
    form = writing.form()
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="captioner-page-") as folder:
        # read by Gradio while it is imported, or a component made
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it is there
        from git_model.tasks.page import Page
        from git_model.tasks.speaker import Speaker
        from git_model.tasks.teller import Teller

        captioner = model.open()
        speaker = Speaker(captioner, model.model_path, max_seconds)
        search = SearchOptions(max_new_tokens=min(40, max_new_tokens))
        decoding = replace(search.decoding(), max_time=max_seconds)
        teller = Teller(model, regions, writing, form, decoding, opened={model.model_path: captioner})
        finder = _finder(gallery, gallery_tsv, text_encoder, regions, writing, model, search) if gallery else None
        page = Page(speaker, pictures, max_beams, max_new_tokens, per_minute, teller, finder)
        url = page.launch(host, port, share, max_waiting)
        log.info("the page is at %s; Ctrl-C ends it", url)
        _wait(page)
    return {"url": url}


def _finder(
    gallery: str,
    gallery_tsv: str | None,
    text_encoder: str,
    regions: RegionOptions,
    writing: WriterOptions,
    model: ModelOptions,
    search: SearchOptions,
) -> Finder:
    """Return the pictures of a folder with their paragraphs, which are written now unless there is a file of them."""
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.paragraph import image_to_paragraph
    from git_model.tasks.paragraph_tab import Finder

    encoder = SentenceEncoder(text_encoder)
    told: dict[str, Any] = {"image_path": gallery, "out_tsv": gallery_tsv, "regions": regions, "writing": writing}
    if not Path(str(gallery_tsv)).exists():
        image_to_paragraph(**told, model=model, search=search, share=BatchOptions(max_bad=1.0))
    return Finder.of_folder(Path(gallery), Path(str(gallery_tsv)), encoder)


def free_port(host: str, port: int) -> int:
    """Return a port that can be listened on.

    Args:
        host: name or address of this machine.
        port: the wanted one, 0 = any.

    Raises:
        UserError: taken, not allowed, or no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            return tried.getsockname()[1]
    except OSError as error:
        raise UserError(f"cannot listen on host '{host}', port {port}: {error.strerror}; port 0 takes any") from error


def _wait(page: Page) -> None:
    """Return once the process is asked to stop; what waits for an answer is dropped."""
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    try:
        while not done.wait(0.5):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        page.close()
