"""Weights brought here beforehand: from a hub and a shop on this machine, then loaded without either."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import serving
from tiny import byte_tokenizer

import download
from git_model.models import openai_clip
from git_model.models.hub import repository_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The routes of huggingface.co that a download takes: what a model holds, and each of its files."""

    models: dict[str, dict[str, bytes]]
    asked: list[str]


class _Routes(http.server.BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0].lstrip("/")
        self.server.asked.append(path)
        for name, files in self.server.models.items():
            if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                return self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), body)
            if path == f"api/models/{name}/tree/{COMMIT}":
                tree = [{"type": "file", "path": k, "size": len(v), "oid": COMMIT} for k, v in files.items()]
                return self._send(json.dumps(tree).encode(), body)
            for revision in ("main", COMMIT):
                file = path.removeprefix(f"{name}/resolve/{revision}/")
                if file != path and file in files:
                    return self._send(files[file], body)
        return self._send(b"{}", body, 404)

    def _send(self, content: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            **({"X-Error-Code": "RepoNotFound"} if status == 404 else {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serves one GPT-2 as safetensors among other frameworks' weights, and as pytorch_model.bin alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub")
    ids = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **ids))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    other = (folder / "pytorch_model.bin").read_bytes()
    junk = {"flax_model.msgpack": b"x", "onnx/model.onnx": b"x", "modeling.py": b"raise", "README.md": b"# x"}
    server = Hub(("127.0.0.1", 0), _Routes)
    server.asked = []
    server.models = {
        "lab/safe": {**files, "pytorch_model.bin": other, **junk},
        "lab/old": {**{k: v for k, v in files.items() if not k.endswith(".safetensors")}, "pytorch_model.bin": other},
        "lab/none": {"config.json": b"{}", "model.onnx": b"x"},
    }
    with serving(server):
        yield server


def fetch(root: Path, home: Path, endpoint: str, *names: str, **more: str) -> tuple[int, str, str, float]:
    """Run download.py --weights in a process of its own: the library reads its settings when imported."""
    known = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "CLIP_CACHE", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if k not in known}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "no_proxy": "*", **more}
    start = time.monotonic()
    line = [sys.executable, "download.py", "--weights", *names]
    done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


def test_from_the_hub_and_loaded_without_it(hub: Hub, tmp_path: Path, root: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    code, told, error, _ = fetch(root, tmp_path, endpoint, "lab/safe", "lab/old")
    assert code == 0, error
    safe, old, advice = told.splitlines()
    assert advice == f"where there is no internet: export HF_HOME={tmp_path} HF_HUB_OFFLINE=1"
    folders = [Path(line.split("\t")[1]) for line in (safe, old)]
    assert (folders[0] / "model.safetensors").is_file()
    assert (folders[1] / "pytorch_model.bin").is_file()
    unwanted = (
        "flax_model.msgpack",
        "onnx/model.onnx",
        "modeling.py",
        "README.md",
        "lab/safe/resolve/main/pytorch_model",
    )
    assert not [path for path in hub.asked if any(name in path for name in unwanted)]
    assert not any("lab/safe" in path and path.endswith(".bin") for path in hub.asked)
    code = (
        "from git_model.config import LanguageConfig; from git_model.models.decoders import build_decoder; "
        "from git_model.tokens import load_tokenizer; import sys; "
        "sums = [sum(float(p.double().abs().sum()) for p in build_decoder(LanguageConfig(name=n), load_tokenizer(n))"
        ".parameters()) for n in sys.argv[1:]]; assert sums[0] == sums[1] > 0, sums"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    line = [sys.executable, "-c", code, "lab/safe", "lab/old"]
    done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "has no such model"),
        ("lab/none", "holds no weights that can be read"),
        ("ViT-B/33", "did you mean 'ViT-B/32'?"),
        ("a/b/c", "no such folder"),
        ("what is this?", "neither a folder nor an id"),
    ],
)
def test_names_that_are_none(hub: Hub, tmp_path: Path, root: Path, name: str, words: str) -> None:
    code, told, error, _ = fetch(root, tmp_path, f"http://127.0.0.1:{hub.server_address[1]}", name)
    assert (code, told, error.count("\n")) == (2, "", 1), error
    assert words in error


def test_no_network_is_said_at_once(tmp_path: Path, root: Path) -> None:
    for endpoint, more, words in (
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 cannot be reached"),
        ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ):
        code, _, error, seconds = fetch(root, tmp_path, endpoint, "lab/safe", **more)
        assert (code, error.count("\n")) == (2, 1), error
        assert words in error
        assert seconds < 60, "the library itself tries for minutes"


def test_clip_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Shop(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "shop"))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    body = b"weights of a tower"
    digest = hashlib.sha256(body).hexdigest()
    (tmp_path / "shop" / digest).mkdir(parents=True)
    (tmp_path / "shop" / digest / "Tiny.pt").write_bytes(body)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "clip"))
    address = f"http://127.0.0.1:{server.server_address[1]}/{digest}/Tiny.pt"
    monkeypatch.setattr(openai_clip, "weight_urls", lambda: {"Tiny": address})
    with serving(server):
        assert download.main(["--weights", "Tiny"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Tiny\t{tmp_path}/clip/Tiny.pt\n")
    assert f"CLIP_CACHE={tmp_path}/clip HF_HUB_OFFLINE=1" in told
    assert download.main(["--weights", "Tiny"]) == 0, "it is there"
    (tmp_path / "clip" / "Tiny.pt").unlink()
    assert download.main(["--weights", "Tiny"]) == 2
    assert f"place it as {tmp_path}/clip/Tiny.pt" in capsys.readouterr().err


def test_pictures_or_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--weights", "gpt2", "--data_root", "x"]):
        assert download.main(flags) == 2
        assert "either --data_root (pictures) or --weights" in capsys.readouterr().err


def test_which_files() -> None:
    small = ["config.json", "merges.txt", "tokenizer.model", "chat_template.jinja"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    variants = ["model.fp16.safetensors", "consolidated.safetensors", "original/model.safetensors"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert sorted(repository_files([*small, *shards, *variants, *bins])) == sorted([*small, *shards])
    assert sorted(repository_files([*small, *bins, "training_args.bin"])) == sorted([*small, *bins])
    assert repository_files([*small, "flax_model.msgpack"]) == []
