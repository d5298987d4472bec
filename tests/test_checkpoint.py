"""What a checkpoint holds, and what is refused: truncated, foreign, pickles that want to run code."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import captions, collator, config, git_model

from git_model.checkpoint import load_checkpoint, read_content, save_checkpoint, sealed
from git_model.errors import EXIT_NO_CHECKPOINT, UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model-000.pt"
    save_checkpoint(path, git_model(), config(), step=7, epoch=0, metrics={"cider": 1.5})
    return path


def test_it_comes_back_and_says_the_same(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert (loaded.config, loaded.metrics, loaded.step) == (config(), {"cider": 1.5}, 7)
    model = git_model()
    batch = collator(model, generate=True)([captions("x")])
    assert loaded.model.generate(batch) == model.generate(batch)


def test_only_what_was_trained_or_cannot_be_fetched_again_is_saved(tmp_path: Path) -> None:
    model = git_model()
    model.freeze(("vision", "language"))
    model.vision.pretrained = True  # as an encoder whose weights have a name
    save_checkpoint(tmp_path / "m.pt", model, config(), step=1, epoch=0)
    content = read_content(tmp_path / "m.pt")
    assert {name.split(".")[0] for name in content["tensors"]} == {"mapper", "language"}
    assert content["frozen"]["vision"]["name"] == "small"
    assert len(content["frozen"]["vision"]["fingerprint"]) == 64


def test_other_frozen_weights_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = git_model()
    model.freeze(("vision",))
    model.vision.pretrained = True
    save_checkpoint(tmp_path / "m.pt", model, config(), step=1, epoch=0)
    content = read_content(tmp_path / "m.pt")
    content["frozen"]["vision"]["fingerprint"] = "0" * 64
    (tmp_path / "m.pt").write_bytes(sealed(content))
    load_checkpoint(tmp_path / "m.pt")
    assert "are not those this model was trained on" in caplog.text


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("kind", ["empty", "html", "lfs", "truncated", "pickle", "torch_pickle", "list", "other_dict"])
def test_foreign_files_are_refused_and_run_nothing(saved: Path, tmp_path: Path, kind: str) -> None:
    path, canary = tmp_path / "x.pt", tmp_path / "canary"
    texts = {
        "empty": b"",
        "html": b"<!doctype html><html>404</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "truncated": saved.read_bytes()[:-3000],
        "pickle": pickle.dumps({"tensors": Bomb(canary)}),
    }
    if kind in texts:
        path.write_bytes(texts[kind])
    else:
        torch.save({"torch_pickle": {"a": Bomb(canary)}, "list": [1], "other_dict": {"a": torch.zeros(1)}}[kind], path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert error.value.exit_code == 76
    assert not canary.exists()


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint") as error:
        load_checkpoint(tmp_path / "none.pt")
    assert error.value.exit_code == 2


def test_tensors_that_do_not_fit_are_named(saved: Path, tmp_path: Path) -> None:
    content = read_content(saved)
    del content["tensors"]["mapper.linear.bias"]
    content["tensors"]["mapper.position"] = torch.zeros(3, 3)
    content["tensors"]["mapper.extra"] = torch.zeros(1)
    (tmp_path / "x.pt").write_bytes(sealed(content))
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "x.pt")
    for words in ("mapper.linear.bias missing", "mapper.extra unexpected", "mapper.position is (3, 3)"):
        assert words in str(error.value)


def test_a_bare_state_dict_needs_the_architecture(saved: Path, tmp_path: Path) -> None:
    content = read_content(saved)
    torch.save(content["tensors"], tmp_path / "bare.pt")
    with pytest.raises(UserError, match="image_encoder_type"):
        load_checkpoint(tmp_path / "bare.pt")


def test_a_failing_save_leaves_the_old_file_and_nothing_else(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(saved.read_bytes())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, git_model(), config(), step=8, epoch=0)
    monkeypatch.undo()
    assert load_checkpoint(path).step == 7
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_the_config_travels_whole(tmp_path: Path) -> None:
    wanted = replace(config(), data=replace(config().data, resize="pad", max_text_tokens=9))
    save_checkpoint(tmp_path / "m.pt", git_model(), wanted, step=1, epoch=0)
    loaded = load_checkpoint(tmp_path / "m.pt")
    assert loaded.config == wanted
    assert loaded.model.codec.max_target == 9


def test_any_changed_byte_is_told(saved: Path, tmp_path: Path) -> None:
    """Flips, cuts, zeroed pages, insertions: wherever the file was copied to, whatever torch makes of it."""
    good, rng = saved.read_bytes(), random.Random(0)
    path = tmp_path / "copy.pt"
    path.write_bytes(good)
    assert read_content(path)["step"] == 7
    for number in range(400):
        bad, place = bytearray(good), rng.randrange(len(good))
        kind = number % 5
        if kind == 0:
            bad[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del bad[place:]
        elif kind == 2:
            bad[place : place + 4096] = bytes(len(bad[place : place + 4096]))
        elif kind == 3:
            bad[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            bad[-rng.randrange(1, 80) :] = b""
        if bytes(bad) == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(UserError) as error:
            read_content(path)
        assert error.value.exit_code == EXIT_NO_CHECKPOINT


def test_torch_reads_past_the_seal(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)["step"] == 7
