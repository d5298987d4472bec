"""The web page's server, started as a user does, which tells of every address it asks for; and its visitors."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_dense import SIZE

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# imported by every Python that finds it; what it hears of goes to stderr
LISTENER = """
import sys

def heard(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        where = args[1][0]
    elif event == "socket.getaddrinfo":
        where = args[0]
    else:
        return
    where = where.decode() if isinstance(where, bytes) else where
    if where not in (None, "", "127.0.0.1", "localhost", "::1"):
        print("FOREIGN", event, args, file=sys.stderr, flush=True)

sys.addaudithook(heard)
"""


@contextmanager
def page_of(**params: Any) -> Iterator[str]:
    """Serve a model and yield the address; it ends on SIGTERM with its JSON, no traceback and no foreign address."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(LISTENER)
        command = [sys.executable, "inference.py", "-p", json.dumps({"type": "demo", "port": 0, **params})]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stderr is not None
        assert process.stdout is not None
        lines: list[str] = []
        found = None
        for line in process.stderr:
            lines.append(line.decode())
            if found := re.search(r"the page is at (http://127\.0\.0\.1:\d+)/", lines[-1]):
                break
        assert found, "".join(lines)
        reader = threading.Thread(target=lambda: lines.extend(line.decode() for line in process.stderr))  # type: ignore[union-attr]
        reader.start()
        try:
            yield found[1]
        finally:
            process.terminate()
            code, printed = process.wait(20), process.stdout.read()
            reader.join(10)
        said = "".join(lines)
        assert code == 0, said
        assert json.loads(printed)["url"].startswith(found[1])
        assert "Traceback" not in said, said
        assert "FOREIGN" not in said, said


class Visitor:
    """Somebody at the page; what it asks of other machines, and what breaks in it, is kept."""

    def __init__(self, browser: Any, address: str, **screen: Any) -> None:
        self.context = browser.new_context(**screen)
        self.page = self.context.new_page()
        self.page.set_default_timeout(8_000)
        self.foreign: list[str] = []
        self.broken: list[str] = []
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#upload")
        self.page.get_by_role("button", name="Answer as JSON").click()

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def upload(self, *files: Any) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#upload").click()
        chooser.value.set_files(list(files))

    def says(self, name: str, wanted: str = "") -> str:
        """Return a text field's content, once it matches."""
        field = self.page.locator(f"#{name} textarea, #{name} input").first
        if wanted:
            from playwright.sync_api import expect

            expect(field).to_have_value(re.compile(wanted, re.DOTALL), timeout=8_000)
        return field.input_value()

    def shown(self) -> Image.Image:
        source = self.page.locator("#picture img").get_attribute("src")
        assert source.startswith("data:image/png;base64,")
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")

    def click(self, x: float, y: float) -> None:
        """Click at a point of the original picture, wherever the browser shows it."""
        picture = self.page.locator("#picture img")
        place = picture.bounding_box()
        picture.click(position={"x": x * place["width"] / SIZE[0], "y": y * place["height"] / SIZE[1]})

    def box(self, box: list[int]) -> dict[str, Any]:
        """Click at a box and return what is told of the answer."""
        self.click(*box[:2])
        self.says("message", "First corner")
        self.click(*box[2:])
        told = self.record()  # the first click has emptied it
        assert np.abs(np.array(told["boxes"][0]) - box).max() <= 1, "browsers round"
        return told

    def record(self) -> dict[str, Any]:
        return json.loads(self.says("record", "."))
