"""The feature store: same features, same losses, safe from kills, shared by processes, never stale."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import png
from torch import Tensor

import train
from git_model.batch import Sample, Target
from git_model.config import Config
from git_model.datasets import features
from git_model.datasets.features import FeatureStore, stamp
from git_model.datasets.files import SampleError
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.sources import build_source
from git_model.encoding import fill
from git_model.errors import EXIT_IO, Preempted, UserError
from git_model.flags import read_flags

PICTURES, SHAPE = 30, (4, 6)
LIST = "Train_GCC-training.tsv"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The original's layout: thirty pictures, one of them broken and one missing."""
    folder = tmp_path / "cc3m"
    for split, name in (("train", LIST), ("val", "Validation_GCC-1.1.0-Validation.tsv")):
        (folder / split).mkdir(parents=True)
        for i in range(PICTURES):
            (folder / split / f"{i:08d}.jpg").write_bytes(png(i))
        (folder / name).write_text("".join(f"a thing like number {i}\thttp://x/{i}\n" for i in range(PICTURES)))
    (folder / "train" / "00000003.jpg").write_bytes(png(3)[:200])
    (folder / "train" / "00000007.jpg").unlink()
    return folder


def encode(images: Tensor) -> Tensor:
    """(I,3,H,W) -> (I,4,6): numbers that tell every picture from the others."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, (4, 2)).permute(0, 2, 1, 3).flatten(2)


def data_of(folder: Path, split: str = "train") -> ImageTextDataset:
    return ImageTextDataset(build_source([{"type": "cc3m", "split": split}], folder), Transform(32))


def store_of(tmp_path: Path, kind: str = "float16", **identity: Any) -> FeatureStore:
    return FeatureStore(tmp_path / "features", identity, range(PICTURES), SHAPE, kind)


@pytest.mark.parametrize(("kind", "error"), [("float16", 5e-4), ("int8", 5e-3)])
def test_features_come_back(photos: Path, tmp_path: Path, kind: str, error: float) -> None:
    data, store = data_of(photos), store_of(tmp_path, kind)
    store.per_file = 8
    store.files = 4
    store.announce()
    assert store.missing() == [0, 1, 2, 3]
    assert fill(store, data, encode, batch_size=5)
    assert store.missing() == []
    for record in range(PICTURES):
        if record in (3, 7):
            with pytest.raises(SampleError) as caught:
                store.get(record, data.source.said(record))
            assert caught.value.reason == ("truncated" if record == 3 else "missing")
            continue
        picture = data[(0, record)].images[0]  # type: ignore[union-attr]
        found = store.get(record, data.source.said(record))
        assert (found.dtype, found.shape) == (np.float16 if kind == "float16" else np.float32, SHAPE)
        np.testing.assert_allclose(found, encode(picture[None])[0].numpy(), atol=error)


def test_batches_and_processes_make_the_same_files(photos: Path, tmp_path: Path) -> None:
    contents = []
    for name, batch, world, workers in (("a", 1, 1, 0), ("b", 7, 3, 2)):
        store = store_of(tmp_path / name)
        store.per_file, store.files = 4, 8
        store.announce()
        for rank in range(world):
            fill(store, data_of(photos), encode, rank=rank, world=world, batch_size=batch, workers=workers)
        contents.append({path.name: path.read_bytes() for path in store.folder.glob("*.safetensors")})
    assert len(contents[0]) == 8
    assert contents[0] == contents[1]


def test_few_descriptors_stay_open(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MAX_MAPPED", 4)
    data, store = data_of(photos), store_of(tmp_path)
    store.per_file, store.files = 1, PICTURES
    store.announce()
    fill(store, data, encode)
    before = len(os.listdir("/proc/self/fd"))
    for record in (*range(3), *range(10, PICTURES), 1):
        store.get(record, data.source.said(record))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_safetensors_reads_the_files(photos: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    store = store_of(tmp_path)
    store.announce()
    fill(store, data_of(photos), encode)
    tensors = load_file(next(store.folder.glob("*.safetensors")))
    assert tensors["features"].shape == (PICTURES, *SHAPE)
    np.testing.assert_array_equal(tensors["features"][5], store.get(5, data_of(photos).source.said(5)))


def test_another_identity_is_another_store(tmp_path: Path) -> None:
    base = store_of(tmp_path, encoder="a")
    others = [
        store_of(tmp_path, encoder="b"),
        store_of(tmp_path, "int8", encoder="a"),
        FeatureStore(tmp_path / "features", {"encoder": "a"}, range(29), SHAPE, "float16"),
        FeatureStore(tmp_path / "features", {"encoder": "a"}, (1, 5), SHAPE, "float16"),
        FeatureStore(tmp_path / "features", {"encoder": "a"}, range(PICTURES), (1, 6), "float16"),
    ]
    assert len({store.folder for store in (base, *others)}) == 6
    assert store_of(tmp_path, encoder="a").folder == base.folder


def test_changed_data_is_noticed(photos: Path, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.announce()
    fill(store, data_of(photos), encode)
    said = data_of(photos).source.said(5)
    for changed in (replace(said, key="other"), replace(said, targets=(Target("another text"),))):
        with pytest.raises(UserError, match=f"record 5 is '{changed.key}' now"):
            store.get(5, changed)
    with pytest.raises(UserError, match=r"record 30 .* is not in the feature store"):
        store.get(30, said)


def test_the_size_is_told_and_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FeatureStore(tmp_path / "features", {}, range(3_000_000), (256, 1024), "float16")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10**12))
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=r"1,572\.88 GB") as caught:
        grid.announce()
    assert caught.value.exit_code == EXIT_IO
    assert "3,000,000 pictures x 256 x 1024 x 2 bytes = 1,572.88 GB" in caplog.text
    half = FeatureStore(tmp_path / "features", {}, range(3_000_000), (256, 1024), "int8")
    assert half.bytes < 0.51 * grid.bytes
    half.announce()


def test_what_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    for kind in ("float16", "int8"):
        store = store_of(tmp_path, kind)
        store.announce()
        features = np.full((PICTURES, *SHAPE), 1e5, np.float32)
        if kind == "float16":
            with pytest.raises(UserError, match="int8 has a scale"):
                store.write(0, features, [0] * PICTURES, {})
        else:
            sample = Sample("a", (), ())
            assert store.write(0, features, [stamp(sample)] * PICTURES, {}) < 1e-6
            np.testing.assert_allclose(store.get(3, sample), features[3], rtol=1e-5)
            with pytest.raises(UserError, match="not finite"):
                store.write(0, features * np.inf, [0] * PICTURES, {})


def recipe(photos: Path, out: Path, *flags: str) -> list[str]:
    """Flags of a run with a frozen small encoder over the photos."""
    sizes = {"stem": [8, 16, 16], "width": 16, "depth": 1, "heads": 2}
    words = {"vision.small": sizes, "language.small": {"width": 32, "depth": 1, "heads": 2, "vocab_size": 300}}
    line = ["--data_dir", str(photos), "--output_dir", str(out), "-iet", "small", "-lm", "small", "-mpt", "grid"]
    line += ["--output_grid", "True", "--input_resolution", "32", "--bs", "8", "-ws", "1", "--lr", "3e-3"]
    line += ["--freeze", "vision", "--max_bad", "0.2", "--workers", "0", "--log_every", "1", "--validate_samples", "7"]
    for key, value in words.items():
        for name, number in value.items():
            line += ["--set", f"{key}.{name}={json.dumps(number)}"]
    return [*line, *flags]


def config_of(photos: Path, out: Path, *flags: str) -> Config:
    return read_flags(recipe(photos, out, *flags))[0]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_losses_are_those_without_a_store(photos: Path, tmp_path: Path, kind: str, tolerance: float) -> None:
    plain = train.train(config_of(photos, tmp_path / "plain", "--epochs", "3"))
    flags = ("--epochs", "3", "--feature_store", str(tmp_path / "store"), "--feature_type", kind)
    stored = train.train(config_of(photos, tmp_path / "stored", *flags))
    np.testing.assert_allclose(losses(tmp_path / "stored"), losses(tmp_path / "plain"), atol=tolerance)
    assert abs(stored["val_loss"] - plain["val_loss"]) < tolerance
    reports = [json.loads((tmp_path / n / "run_report.json").read_text())["samples"] for n in ("plain", "stored")]
    assert reports[0] == reports[1], "the broken and the missing picture are counted alike"


def test_later_epochs_touch_neither_pictures_nor_encoder(photos: Path, tmp_path: Path) -> None:
    flags = ("--feature_store", str(tmp_path / "store"))
    whole = config_of(photos, tmp_path / "whole", "--epochs", "3", *flags)
    train.train(config_of(photos, tmp_path / "out", "--epochs", "1", "--schedule", "constant", *flags))
    train.train(config_of(photos, tmp_path / "whole", "--epochs", "3", "--schedule", "constant", *flags))
    for split in ("train", "val"):
        shutil.rmtree(photos / split)
    from git_model.models.vision import VisionEncoder

    forward, VisionEncoder.forward = VisionEncoder.forward, never  # type: ignore[method-assign]
    try:
        train.train(config_of(photos, tmp_path / "out", "--epochs", "3", "--schedule", "constant", *flags))
    finally:
        VisionEncoder.forward = forward  # type: ignore[method-assign]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole"), "to the bit"
    assert whole.train.epochs == 3


def never(*_: Any) -> Any:
    raise AssertionError("the encoder ran")


def test_array_jobs_encode_before_a_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    from git_model.models.vision import VisionEncoder
    from git_model.schema import to_dict
    from git_model.tasks.registry import run

    store = tmp_path / "store"
    config = config_of(photos, tmp_path / "out", "--feature_store", str(store))
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(to_dict(config)))
    task = {"type": "encode_features", "config": tmp_path / "recipe.yml", "workers": 0, "device": "cpu"}
    told = [run({**task, "part": part, "parts": 2}) for part in (1, 0)]
    assert [t["missing"] for t in told] == [1, 0]
    assert told[0]["pictures"] == PICTURES
    run({**task, "source": "val", "batch_size": 3})
    monkeypatch.setattr(VisionEncoder, "forward", never)
    train.train(config)
    trained = config_of(photos, tmp_path, "--freeze", "nothing")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(to_dict(trained)))
    with pytest.raises(UserError, match="--freeze vision,auto"):
        run({**task, "feature_store": store})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--freeze", "nothing"), "--freeze vision,auto"),
        (("--augment", "flip"), "leave out --augment flip"),
        (("--feature_type", "int4"), "int8"),
    ],
)
def test_what_cannot_be_stored_is_refused(photos: Path, tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(photos, tmp_path, "--feature_store", str(tmp_path / "store"), *flags)


def test_asked_to_stop_it_leaves_and_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from git_model.cluster import StopRequest
    from git_model.run import Run

    stop = StopRequest()
    stop.why = "SIGTERM"
    config, note = config_of(photos, tmp_path / "out", "--feature_store", str(tmp_path / "store")), tmp_path / "note"
    monkeypatch.setenv("GIT_MODEL_STOP_NOTE", str(note))
    with pytest.raises(Preempted, match="stopped by SIGTERM while pictures were encoded"):
        Run(config, stop)
    assert [path.name for path in (tmp_path / "store").glob("*/*")] == ["STORE.json"], "nothing half-written"
    assert note.read_text() == "0\n"
    train.train(config)
    assert len(list((tmp_path / "store").glob("*/*.safetensors"))) == 2


def test_an_empty_share_of_a_step_is_no_obstacle(photos: Path, tmp_path: Path, root: Path) -> None:
    """33 records in batches of 16 on two processes: the last step has one record, for the first of them."""
    for split, name in (("train", LIST),):
        with (photos / name).open("a") as file:
            for i in range(30, 33):
                (photos / split / f"{i:08d}.jpg").write_bytes(png(i))
                file.write(f"one more {i}\thttp://x/{i}\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "train.py"]
    line += recipe(photos, tmp_path / "two", "--epochs", "1", "--bs", "16", "--fsdp")
    line += ["--feature_store", str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "two")) == 2


def test_two_processes_share_the_work(photos: Path, tmp_path: Path, root: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "train.py"]
    line += recipe(photos, tmp_path / "two", "--epochs", "2", "--bs", "4", "--feature_store", str(tmp_path / "store"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    train.train(config_of(photos, tmp_path / "one", "--epochs", "2", "--feature_store", str(tmp_path / "other")))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


FILLER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_features import data_of, encode, fill, store_of
store = store_of(Path(sys.argv[2]))
store.per_file, store.files = 1, 30
store.announce()
print("ready", flush=True)
fill(store, data_of(Path(sys.argv[1])), encode, batch_size=2)
"""


def test_killed_at_any_moment_it_goes_on(photos: Path, tmp_path: Path, root: Path) -> None:
    """Files that are there are whole, whatever the moment of the kill; the last start ends the work."""
    script = FILLER.format(root=str(root), tests=str(root / "tests"))
    dice, seen = random.Random(0), []
    whole = store_of(tmp_path / "whole")
    whole.per_file, whole.files = 1, 30
    whole.announce()
    fill(whole, data_of(photos), encode, batch_size=2)
    expected = {path.name: path.read_bytes() for path in whole.folder.glob("*.safetensors")}
    for kill in range(int(os.environ.get("GIT_MODEL_KILLS", "5")) + 1):
        child = subprocess.Popen([sys.executable, "-c", script, str(photos), str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if kill < int(os.environ.get("GIT_MODEL_KILLS", "5")):
            time.sleep(dice.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
        child.wait()
        found = {path.name: path.read_bytes() for path in store_of(tmp_path).folder.glob("[0-9]*.safetensors")}
        assert found.items() <= expected.items()
        seen.append(len(found))
    assert seen == sorted(seen)
    assert seen[-1] == 30
