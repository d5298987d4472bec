"""Regressors through train.py: a head on an encoder, an ensemble of sources; resumed, on processes, from a store."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_fsdp import finished
from test_train import losses, same_tensors

import train
from git_model.architecture import VisionConfig
from git_model.checkpoint import load_checkpoint, load_regressor, read_content
from git_model.config import Config, TrainConfig
from git_model.datasets.groups import near_across
from git_model.datasets.sources import build_source
from git_model.datasets.vectors import Vectors, read_vectors, write_vectors
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.models.regressor import EnsembleRegressor, PromptRegressor, PublishedEnsemble
from git_model.models.vision import build_vision
from git_model.optimizer import layer_factors, parameter_groups
from git_model.tasks.registry import run

VISION = {"name": "small", "resolution": 32, "small": {"stem": [8, 16, 16], "width": 16, "depth": 2, "heads": 2}}


@pytest.fixture(scope="session")
def head(tiny_tsv: Path, minilm: str) -> Path:
    """A recipe of a head on a small encoder; its texts are encoded once."""
    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}
    recipe = {
        "vision": VISION,
        "regressor": {"type": "head", "text_encoder": minilm},
        "data": {"dir": str(tiny_tsv), "train": [entry], "val": [entry], "workers": 0},
        "train": {"batch_size": 8, "epochs": 2, "lr": 0.003, "warmup": 1, "log_every": 1, "schedule": "constant"},
    }
    path = tiny_tsv / "head.yml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def config_of(recipe: Path, out: Path, *flags: str) -> Config:
    return read_flags(["--config", str(recipe), "--output_dir", str(out), *flags])[0]


def test_a_head_learns_and_goes_on_where_it_stopped(head: Path, tmp_path: Path) -> None:
    scores = train.train(config_of(head, tmp_path / "through", "--epochs", "4"))
    train.train(config_of(head, tmp_path / "parts", "--epochs", "2"))
    train.train(config_of(head, tmp_path / "parts", "--epochs", "4"))
    assert same_tensors(tmp_path / "through" / "model_latest.pt", tmp_path / "parts" / "model_latest.pt")
    assert losses(tmp_path / "through") == losses(tmp_path / "parts")
    found = losses(tmp_path / "through")
    assert found[12] < 0.8 * found[1]
    assert scores["mean_cosine"] == pytest.approx(1 - scores["val_loss"])
    assert set(scores) == {"val_loss", "mean_cosine", "median_cosine", "R@1", "mean_vector_cosine"}
    model, config = load_regressor(tmp_path / "parts" / "model_best.pt")
    assert isinstance(model, PromptRegressor)
    assert config.parts == ("vision", "head")
    with pytest.raises(UserError, match="is a regressor, which gives vectors and no text; the task embed_prompt"):
        load_checkpoint(tmp_path / "parts" / "model_best.pt")


def test_two_processes_are_one(head: Path, tmp_path: Path, root: Path) -> None:
    train.train(config_of(head, tmp_path / "one", "--bs", "10"))  # 24 pictures: the last step is short
    line = ["--config", str(head), "--output_dir", str(tmp_path / "two"), "--bs", "5"]
    finished(2, line, root)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)


def test_head_first_from_a_store_then_all(head: Path, tmp_path: Path) -> None:
    """A frozen encoder's features are made once, and give what pictures give; then all layers, the lower the slower."""
    frozen = ("--freeze", "vision", "--epochs", "3")
    train.train(config_of(head, tmp_path / "pictures", *frozen))
    train.train(config_of(head, tmp_path / "stored", *frozen, "--feature_store", str(tmp_path / "store")))
    plain, stored = losses(tmp_path / "pictures"), losses(tmp_path / "stored")
    assert list(stored.values()) == pytest.approx(list(plain.values()), rel=2e-3)
    start = tmp_path / "pictures" / "model_best.pt"
    first = read_content(start)["tensors"]
    train.train(config_of(head, tmp_path / "all", "--init_from", str(start), "--layer_decay", "0.5"))
    after = read_content(tmp_path / "all" / "model_latest.pt")["tensors"]
    assert losses(tmp_path / "all")[1] < plain[1], "it starts from the head that was trained"
    for low, high in (("vision.tower.stem.0.weight", "vision.tower.blocks.1.linear1.weight"),):
        moved = [float((after[name] - first[name]).abs().mean()) for name in (low, high)]
        assert 0 < moved[0] < 0.7 * moved[1], "AdamW moves each weight by about its learning rate"


def test_layers_below_learn_slower() -> None:
    for name, top, bottom in (
        ("RN50", "tower.visual.attnpool.c_proj.weight", "tower.visual.conv1.weight"),
        ("ViT-B/32", "tower.visual.proj", "tower.visual.class_embedding"),
    ):
        vision = build_vision(VisionConfig(name=name), load_weights=False)
        named = dict(vision.named_parameters())
        factors = {key: layer_factors(vision, 0.9)[value] for key, value in named.items()}
        assert factors[top] == 1
        layers = 16 if name == "RN50" else 12
        assert factors[bottom] == min(factors.values()) == pytest.approx(0.9 ** (layers + 1))
    steps = [factors[f"tower.visual.transformer.resblocks.{n}.ln_1.weight"] for n in range(12)]
    assert steps == pytest.approx([0.9 ** (12 - n) for n in range(12)])
    from transformers import AutoModel, ResNetConfig, SwinConfig

    resnet = AutoModel.from_config(ResNetConfig(depths=[2, 2], hidden_sizes=[8, 16], embedding_size=8))
    factors = {name: layer_factors(resnet, 0.5)[p] for name, p in resnet.named_parameters()}
    levels = [0.5 ** (4 - number) for number in range(4)]
    layers = [f"encoder.stages.{s}.layers.{n}.layer" for s in range(2) for n in range(2)]
    for layer, level in zip(layers, levels, strict=True):
        assert {f for name, f in factors.items() if name.startswith(layer)} == {level}
    assert {f for name, f in factors.items() if name.startswith("embedder")} == {0.5**5}
    swin = AutoModel.from_config(SwinConfig(depths=[1, 1], num_heads=[2, 2], embed_dim=8, image_size=32, window_size=2))
    factors = {name: layer_factors(swin, 0.5)[p] for name, p in swin.named_parameters()}
    down = next(f for name, f in factors.items() if "downsample" in name)
    blocks = [next(f for n, f in factors.items() if n.startswith(f"encoder.layers.{s}.blocks.0")) for s in range(2)]
    assert blocks[0] < down < blocks[1]
    small = PromptRegressor(build_vision(VisionConfig(name="small")), 8)
    groups = parameter_groups(small, TrainConfig(lr=1.0, lr_vision=0.1, layer_decay=0.5))
    assert sum(len(g["params"]) for g in groups) == len(list(small.parameters()))
    assert {(g["part"], round(g["lr"], 6)) for g in groups} == {
        *(("vision", 0.1 * 0.5**level) for level in range(4)),
        ("head", 1.0),
    }


def write_set(folder: Path, rows: int = 120, named: bool = True) -> dict[str, Any]:
    """Write three sources of which each tells a part of the answer; every prompt is there twice."""
    dice = np.random.default_rng(0)
    hidden = np.repeat(dice.normal(size=(rows // 2, 12)), 2, axis=0)
    truth = hidden @ dice.normal(size=(12, 16))
    parts = {"a": (slice(0, 4), 6), "b": (slice(4, 8), 10), "c": (slice(8, 12), 4)}
    arrays = {n: hidden[:, place] @ dice.normal(size=(4, width)) for n, (place, width) in parts.items()} | {"gt": truth}
    names = tuple(f"n{row:04d}" for row in range(rows))
    for name, array in arrays.items():
        values = array.astype(np.float32)
        if named:  # each file in an order of its own
            order = dice.permutation(rows)
            write_vectors(folder / f"{name}.npy", Vectors(tuple(names[i] for i in order), values[order]))
        else:
            np.save(folder / f"{name}.npy", values)
    return {"type": "vectors", "sources": {n: f"{n}.npy" for n in parts}, "truth": "gt.npy"}


def ensemble(folder: Path, entry: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "regressor": {"type": "ensemble", "dim": 16, "width": 32, "depth": 1, "heads": 4, "dropout": 0.0, **changes},
        "data": {"dir": str(folder), "workers": 0, "train": [entry | {"split": "train"}]},
        "train": {"batch_size": 16, "epochs": 12, "lr": 0.003, "warmup": 5, "log_every": 1},
    }
    recipe["data"]["val"] = [entry | {"split": "val"}]
    (folder / "ensemble.yml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "ensemble.yml"


def test_an_ensemble_learns_from_files_in_any_order(tmp_path: Path) -> None:
    entry = write_set(tmp_path)
    recipe, out = ensemble(tmp_path, entry), tmp_path / "run"
    train.train(config_of(recipe, out, "--epochs", "6"))
    scores = train.train(config_of(recipe, out))
    assert scores["mean_cosine"] > scores["mean_vector_cosine"] + 0.3
    told = yaml.safe_load((out / "resolved_config.yml").read_text())
    assert told["regressor"]["sources"] == {"a": 6, "b": 10, "c": 4}
    parts = [build_source([entry | {"split": split}], tmp_path) for split in ("train", "val")]
    ids = [{part.said(row).key for row in range(len(part))} for part in parts]
    assert not ids[0] & ids[1]
    assert 0.6 < len(ids[0]) / 120 < 0.9
    everything = read_vectors(tmp_path / "gt.npy")
    held = np.array([name in ids[1] for name in everything.ids])
    assert near_across(everything.values, held) is None

    task = {"type": "embed_prompt", "model_path": out / "model_latest.pt", "out": tmp_path / "found.npy"}
    files = {name: str(tmp_path / f"{name}.npy") for name in "cab"}  # another order than the model's
    assert run({**task, "vectors": files})["count"] == 120
    found = read_vectors(tmp_path / "found.npy")
    model, _ = load_regressor(out / "model_latest.pt")
    assert isinstance(model, EnsembleRegressor)
    given = [torch.from_numpy(read_vectors(tmp_path / f"{name}.npy").of(found.ids)) for name in "abc"]
    with torch.no_grad():
        np.testing.assert_allclose(found.values, model.vectors(given).numpy(), atol=1e-6)
    # a source that lacks a name is masked
    some = read_vectors(tmp_path / "b.npy").sorted()
    write_vectors(tmp_path / "b.npy", Vectors(some.ids[:100], some.values[:100]))
    run({**task, "vectors": files})
    masked = read_vectors(tmp_path / "found.npy")
    np.testing.assert_allclose(masked.values[:100], found.values[:100], atol=1e-5)
    assert np.abs(masked.values[100:] - found.values[100:]).max() > 0.01
    with pytest.raises(UserError, match=r"b: 20 of \d+ names have no vector.*'missing': 'mask'"):
        build_source([entry], tmp_path)
    lacking: Any = build_source([entry | {"missing": "mask"}], tmp_path)
    bare = [s.key for s in map(lacking.__getitem__, range(120)) if np.isnan(s.features[1]).all()]
    assert sorted(bare) == sorted(some.ids[100:])
    train.train(config_of(ensemble(tmp_path, entry | {"missing": "mask"}), tmp_path / "masked", "--epochs", "2"))
    # names that fit nothing else are an error, not a mask
    write_vectors(tmp_path / "b.npy", Vectors(tuple(f"{name}.png" for name in some.ids), some.values))
    with pytest.raises(UserError, match=r"no name of '.*b.npy' .n0000.png, .*is one of another source's"):
        run({**task, "vectors": files})
    # the order of the sources is the model's
    turned = entry | {"sources": {name: f"{name}.npy" for name in "bac"}, "missing": "mask"}
    with pytest.raises(UserError, match=r"the order of sources was \['a', 'b', 'c'\], is \['b', 'a', 'c'\]"):
        train.train(config_of(ensemble(tmp_path, turned), tmp_path / "masked", "--epochs", "3"))
    start = str(tmp_path / "masked" / "model_latest.pt")
    with pytest.raises(UserError, match=r"has the sources \['a', 'b', 'c'\], this run's are \['b', 'a', 'c'\]"):
        train.train(config_of(ensemble(tmp_path, turned), tmp_path / "other", "--init_from", start))
    other = entry | {"sources": {"a": "a.npy", "z": "c.npy"}}
    with pytest.raises(UserError, match=r"regressor.sources.b was 10, is None"):
        train.train(config_of(ensemble(tmp_path, other), tmp_path / "masked", "--epochs", "3"))


def test_records_without_any_source_are_bad_samples(tmp_path: Path) -> None:
    entry = write_set(tmp_path)
    for name in entry["sources"]:
        given = read_vectors(tmp_path / f"{name}.npy")
        write_vectors(tmp_path / f"{name}.npy", Vectors(tuple(f"{key}.png" for key in given.ids), given.values))
    recipe = ensemble(tmp_path, entry | {"missing": "mask"})
    with pytest.raises(UserError, match=r"are unusable, more than --max_bad 0.01: no_source x"):
        train.train(config_of(recipe, tmp_path / "run"))
    np.save(tmp_path / "plain.npy", np.zeros((120, 6), np.float32))
    with pytest.raises(UserError, match=r"plain.npy has no .ids.txt and others have names"):
        build_source([entry | {"sources": {"a": "plain.npy"}, "missing": "mask"}], tmp_path)


def test_answers_and_boxes_are_no_prompts(head: Path, tmp_path: Path) -> None:
    entry = [{"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv", "questions": "t.question.tsv"}]
    flags = ["--set", f"data.train={json.dumps(entry)}"]
    with pytest.raises(
        UserError, match="'p00' has questions or boxes: a regressor learns what is said of a whole picture"
    ):
        train.train(config_of(head, tmp_path / "run", *flags))


def test_the_published_recipes_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's YAML, and its files, which have no names."""
    write_set(tmp_path, named=False)
    monkeypatch.chdir(tmp_path)
    told = {
        "exp_name": "tiny", "num_examples": 100, "embedding_paths": ["a.npy", "b.npy", "c.npy"], "gt_path": "gt.npy",
        "train_fraction": 0.8, "num_layers": 1, "num_heads": 4, "seed": 3, "batch_size": 16, "learning_rate": 0.001,
        "num_epochs": 2,
    }  # fmt: skip
    (tmp_path / "config.yml").write_text(yaml.safe_dump(told))
    config = read_flags(["--config", "config.yml", "--set", "regressor.dim=16", "--set", "regressor.width=32"])[0]
    assert config.train.output_dir == "checkpoints/tiny"
    assert (config.regressor.depth, config.regressor.heads, config.train.seed, config.train.lr) == (1, 4, 3, 0.001)
    train.train(config)
    assert load_regressor("checkpoints/tiny/model_latest.pt")[1].regressor.sources == {"a": 6, "b": 10, "c": 4}
    for wrong, message in (
        ({"num_layer": 3}, "unknown key 'num_layer' .did you mean 'num_layers'"),
        ({"embedding_paths": "a.npy"}, "embedding_paths must be a list of .npy files"),
        ({"num_examples": 10.7}, "num_examples must be a whole number, got 10.7"),
        ({"train_fraction": "most"}, "train_fraction must be a number, got 'most'"),
        ({"gt_path": None}, "gt_path must be a text"),
    ):
        (tmp_path / "config.yml").write_text(yaml.safe_dump({**told, **wrong}))
        with pytest.raises(UserError, match=message):
            read_flags(["--config", "config.yml"])


def test_the_published_checkpoint_by_a_switch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    old = PublishedEnsemble().eval()
    torch.save({"state_dict": {f"model.{n}": v for n, v in old.state_dict().items()}}, tmp_path / "old.ckpt")
    names, dice = tuple("abcde"), np.random.default_rng(0)
    files = {}
    for name, width in PublishedEnsemble.widths.items():
        values = dice.normal(size=(5, width)).astype(np.float32)
        write_vectors(tmp_path / f"{name}.npy", Vectors(names, values))
        files[name] = str(tmp_path / f"{name}.npy")
    task = {"type": "embed_prompt", "vectors": files, "model_path": tmp_path / "old.ckpt", "out": tmp_path / "o.npy"}
    with pytest.raises(UserError, match="no checkpoint of this program"):
        run(task)
    with caplog.at_level(logging.WARNING):
        run({**task, "published": True})
    assert "attention runs across the batch" in caplog.text
    given = [torch.from_numpy(read_vectors(Path(path)).values) for path in files.values()]
    with torch.no_grad():
        alone = torch.cat([old([x[i : i + 1] for x in given]) for i in range(5)])
    np.testing.assert_allclose(read_vectors(tmp_path / "o.npy").values, alone.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--regressor", "heads"], "--regressor. 'heads' .did you mean 'head'"),
        (["--regressor", "head", "-mpt", "mlp"], "head has nothing to do with: mapper; leave out"),
        (["--regressor", "head", "-lm", "opt"], "head has nothing to do with: language"),
        (["--regressor", "head", "--region", "roi", "--output_grid"], "nothing to do with: region"),
        (["--regressor", "head", "--freeze", "mapper"], "--freeze mapper: this model's parts are vision, head"),
        (["--regressor", "head", "--fsdp"], "nothing to do with: train.fsdp"),
        (["--regressor", "head", "--set", "regressor.depth=4"], "nothing to do with: regressor.depth"),
        (["--regressor", "ensemble", "--set", "regressor.hidden=4"], "nothing to do with: regressor.hidden"),
        (["--regressor", "ensemble", "-iet", "RN50"], "nothing to do with: vision"),
        (["--regressor", "ensemble", "--layer_decay", "0.9"], "nothing to do with: train.layer_decay"),
        (["--layer_decay", "0"], r"layer_decay 0.0 is not in \(0, 1\]"),
        (["--set", "regressor.hidden=8"], "do nothing without its type"),
        (["--regressor", "ensemble", "--set", "regressor.sources={a: 0}"], "regressor.sources.a 0 is no width"),
        (["--regressor", "ensemble", "--set", "regressor.width=30"], "width 30 is no multiple of heads 8"),
    ],
)
def test_settings_of_another_kind(flags: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_flags(flags)


def test_data_of_another_kind(head: Path, tmp_path: Path) -> None:
    entry = write_set(tmp_path)
    recipe = ensemble(tmp_path, entry)
    for name, flags, told in (
        ("dim", ["--set", "regressor.dim=384"], "regressor.dim is 384, the vectors to learn have 16 numbers"),
        ("sources", ["--set", "regressor.sources={a: 6}"], r"regressor.sources is .*the data has"),
    ):
        with pytest.raises(UserError, match=told):
            train.train(config_of(recipe, tmp_path / name, *flags))
    with pytest.raises(UserError, match=r"regressor.dim is 100, .* gives 384 numbers: --set regressor.dim=384"):
        train.train(config_of(head, tmp_path / "dim", "--set", "regressor.dim=100"))
    told = json.dumps([entry])
    flags = [word for split in ("train", "val") for word in ("--set", f"data.{split}={told}")]
    config = config_of(head, tmp_path / "v", *flags, "--data_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"data of type .vectors. are for --regressor ensemble"):
        train.train(config)
    pictures = [{"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}]
    flags = ["--set", f"data.train={json.dumps(pictures)}", "--set", f"data.val={json.dumps(pictures)}"]
    with pytest.raises(UserError, match="ensemble reads data of type 'vectors'"):
        train.train(config_of(recipe, tmp_path / "p", *flags, "--data_dir", str(head.parent)))
    for wrong, message in (
        ({"split": "test"}, "vectors split"),
        ({"count": 500}, "count is 500, there are 120 records"),
        ({"missing": "drop"}, "vectors missing"),
        ({"truth": None}, "needs either truth .vectors. or prompts"),
        ({"split": "val", "fraction": 1.5}, "fraction 1.5 is not between 0 and 1"),
        ({"sources": {}}, "needs sources"),
        ({"count": "x"}, "count must be a whole number, got 'x'"),
        ({"fraction": "x", "split": "val"}, "fraction must be a number, got 'x'"),
        ({"near": 5}, "near 5 is not from 0 to 1"),
        ({"truth": 3}, "truth must be a file's name, got 3"),
    ):
        with pytest.raises(UserError, match=message):
            build_source([entry | wrong], tmp_path)
