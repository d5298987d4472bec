"""The web page's server, started as a user does; it tells of every address it asks for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
