"""Mutated commands and files: whatever comes in, the answer is a result or one line, never a traceback.

`make soak` sets GIT_MODEL_FUZZ=20000; here a smaller number runs.
"""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path

import pytest
from test_params import COMMANDS
from tiny import png

from git_model.batch import Sample
from git_model.datasets.asking import AskRows
from git_model.datasets.files import RecordError
from git_model.datasets.images import Transform
from git_model.datasets.records import json_cell, write_tsv
from git_model.datasets.sources import build_source
from git_model.errors import UserError
from inference import main

ROUNDS = int(os.environ.get("GIT_MODEL_FUZZ", "1000"))
ALLOWED = {0, 2, 3}
PIECES = ("{", "}", "[", "]", "'", '"', ":", ",", "&a", "*a", "!!python/object:os.system", "\\", "\n", "\t", "<<", "%",
          "null", "1e400", "0x10", "-", "? ", "| ", "#", "\x00", "\ud800", "é", "type", "beams", "type: ")  # fmt: skip


def mutated(text: str, dice: random.Random) -> str:
    """Cut, double, swap and insert a few times."""
    for _ in range(dice.randint(1, 6)):
        start, size = dice.randrange(len(text) + 1), dice.randint(0, 12)
        part = text[start : start + size]
        change = dice.choice((part * 2, "", dice.choice(PIECES), part[::-1], chr(dice.randrange(0x250))))
        text = text[:start] + change + text[start + size :]
    return text


def test_mutated_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    seeds = [command.partition("-p ")[2].strip()[1:-1] for command in COMMANDS]
    seeds += [
        "{'type': 'evaluate_on_coco_caption', 'res_file': 'a.tsv', 'label_file': 'b.json', 'metrics': ['Bleu']}",
        "{'type': 'convert_tsv_to_vqa_json', 'predict_file': 'a.tsv', 'out_json': 'b.json', 'fill_missing': true}",
        "{'type': 'evaluate_on_vqa', 'res_file': 'a.json', 'label_file': 'b.json', 'variant': 'head'}",
        "{'type': 'prepare_coco', 'annotations': 'a.json', 'image_dir': '.', 'out_dir': 'o', 'name': 'n'}",
        "{'type': 'evaluate', 'model_path': 'm.pt', 'out_dir': 'o', 'source': 'val', 'limit': 3, 'max_bad': 0.5}",
    ]
    dice = random.Random(0)
    codes: dict[int, int] = {}
    for number in range(ROUNDS):
        text = mutated(dice.choice(seeds), dice)
        code = main(["-p", text])
        codes[code] = codes.get(code, 0) + 1
        assert code in ALLOWED, (number, text)
        if number % 500 == 0:
            assert "Traceback" not in capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err
    assert codes[2] > ROUNDS // 2


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Flip, cut, double or insert bytes."""
    for _ in range(dice.randint(1, 4)):
        start, size = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 8, 64))
        part = data[start : start + size]
        noise = bytes(dice.randrange(256) for _ in range(min(size, 8)))
        data = (
            data[:start] + dice.choice((b"", part * 2, noise, b"\n", b"\t", b"\r\n", part[::-1])) + data[start + size :]
        )
        if dice.random() < 0.1:
            data = data[: dice.randrange(len(data) + 1)]
    return data


def test_mutated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of files that no one needs after a crash
    monkeypatch.setenv("PATH", "")  # without Java, whose start takes a second: the tokenizer in Python
    keys = [f"k{i}" for i in range(6)]
    asked = [[{"question": "what?", "question_id": i, "answer": "a"}] for i in range(6)]
    write_tsv(tmp_path / "i.tsv", [(k, base64.b64encode(png(i, 8)).decode()) for i, k in enumerate(keys)])
    write_tsv(tmp_path / "q.tsv", [(k, json_cell(q)) for k, q in zip(keys, asked, strict=True)])
    write_tsv(tmp_path / "c.tsv", [(k, json_cell([{"caption": "a dog"}])) for k in keys])
    write_tsv(tmp_path / "p.tsv", [(json_cell({"answer": "a", "question_id": i}),) for i in range(6)])
    whole = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    tasks = [
        {"type": "convert_tsv_to_vqa_json", "predict_file": "p.tsv", "question_file": "q.tsv", "out_json": "o.json"},
        {"type": "evaluate_on_vqa", "res_file": "p.tsv", "label_file": "q.tsv", "outfile": "o.json"},
        {"type": "evaluate_on_coco_caption", "res_file": "c.tsv", "label_file": "c.tsv", "outfile": "o.json"},
        {"type": "convert_tsv_to_coco_format", "res_file": "c.tsv", "outfile": "o.json"},
    ]
    dice, transform = random.Random(1), Transform(32)
    entry = {"type": "tsv", "images": "i.tsv", "captions": "c.tsv", "questions": "q.tsv"}
    for number in range(ROUNDS // 2):
        name = dice.choice(sorted(whole))
        (tmp_path / name).write_bytes(damaged(whole[name][0], dice))
        if dice.random() < 0.7:  # an index that looks as new as its TSV
            os.utime(tmp_path / name, ns=(whole[name][1], whole[name][1]))
        task = {k: str(tmp_path / v) if "." in v else v for k, v in dice.choice(tasks).items()}
        task |= {"metrics": ["Bleu"]} if task["type"] == "evaluate_on_coco_caption" else {}  # type: ignore[dict-item]
        assert main(["-p", json.dumps(task)]) in ALLOWED, (number, name)
        try:
            rows = AskRows(tmp_path / "i.tsv", tmp_path / "q.tsv", transform)
            found = [rows[i] for i in range(len(rows))]
            assert all(row.error or row.picture is not None for row in found)
        except UserError:
            pass  # another number of rows
        try:
            source = build_source([entry], tmp_path)
            for index in range(len(source)):
                try:
                    assert isinstance(source[index], Sample)
                except RecordError:
                    continue
        except UserError:
            pass
        for path in tmp_path.iterdir():
            if path.name not in whole:
                path.unlink()
        for kept, (data, when) in whole.items():
            (tmp_path / kept).write_bytes(data)
            os.utime(tmp_path / kept, ns=(when, when))
    assert "Traceback" not in capfd.readouterr().err
