"""From pictures to a submission by every mode: caption, interrogator, nearest prompt, regressor, bank, ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from published import save_clip
from test_prompt import KAGGLE
from tiny import config, png

import train
from git_model.checkpoint import save_checkpoint
from git_model.datasets.prompt_files import read_prompts
from git_model.datasets.vectors import Vectors, read_submission, read_vectors, write_vectors
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.metrics.similarity import mean_cosine
from git_model.models.build import build_model
from git_model.tasks.registry import run

GATEWAY = ("data", "diffusiondb_gateway6")
SETS = {"six": GATEWAY, "seven": KAGGLE}
MODES = ("caption", "classic", "classic_lite", "fast", "best", "negative", "nearest")
LISTS = {
    "artists": ["Greg Rutkowski", "Hokusai"],
    "flavors": ["highly detailed", "sharp focus", "octane render", "concept art", "intricate"],
    "mediums": ["a painting", "a photo"],
    "movements": ["cubism", "baroque"],
    "trendings": ["trending on artstation"],
    "negative": ["blurry", "cropped"],
    "weather": ["rain", "sunshine"],
}
"""`weather` is a list of one's own."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"), 77)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for name, phrases in LISTS.items():
        (folder / f"{name}.txt").write_text("".join(f"{phrase}\n" for phrase in phrases))
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from git_model.tokens import train_tokenizer

    path = tmp_path_factory.mktemp("captioner") / "model.pt"
    own = config()
    save_checkpoint(path, build_model(own, train_tokenizer(["a cat in space", "a city"], 300)), own, step=0, epoch=0)
    return path


def recovered(out: Path) -> dict[str, str]:
    rows = (line.split("\t") for line in out.read_text(encoding="utf-8").splitlines())
    return {key: json.loads(cell)[0]["caption"] for key, cell in rows}


@pytest.mark.parametrize("name", SETS)
def test_real_pictures_through_every_mode_to_a_submission(
    name: str, reference_data: Path, minilm: str, clip: str, lists: Path, captioner: Path, tmp_path: Path
) -> None:
    folder = reference_data.joinpath(*SETS[name])
    images, prompts = folder / "images", folder / "prompts.csv"
    truth = read_prompts(prompts)
    bank = tmp_path / "bank"
    made = run({"type": "make_prompt_bank", "prompts": prompts, "out_dir": bank, "towers": clip, "shard": 4})
    assert made == {"out_dir": str(bank), "prompts": len(truth), "shards": 2}
    files: dict[str, str] = {}

    # texts
    for mode in MODES:
        task: dict[str, Any] = {"type": "image_to_prompt", "mode": mode, "image_path": images, "max_new_tokens": 6}
        task |= {"out_tsv": tmp_path / f"{mode}.tsv", "workers": 0}
        task |= {"nearest": {"bank": bank}, "negative": {}}.get(mode, {"model_path": captioner})
        task |= {} if mode in ("caption", "nearest") else {"lists": lists, "towers": clip, "intermediate": 4}
        assert run(task)["ok"] == len(truth)
        texts = recovered(tmp_path / f"{mode}.tsv")
        assert {key.rpartition(".")[0] for key in texts} == set(truth)
        phrases = [p for part in LISTS.values() for p in part]
        if mode == "nearest":
            assert set(texts.values()) <= set(truth.values())
        elif mode not in ("caption", "best"):
            assert all(any(phrase in text for phrase in phrases) for text in texts.values()), mode
        if mode == "classic_lite":
            assert not any("artstation" in text or "by " in text for text in texts.values())
        files[mode] = str(tmp_path / f"{mode}.npy")
        run({"type": "embed_prompt", "prompts": tmp_path / f"{mode}.tsv", "out": files[mode]})

    # vectors: features of an encoder, a head, a bank, an ensemble of what there is
    run({"type": "encode_features", "image_encoder_type": clip, "images": images, "out": tmp_path / "clip.npy"})
    run({"type": "embed_prompt", "prompts": prompts, "out": tmp_path / "truth.npy", "text_encoder": minilm})
    files["regressor"] = str(tmp_path / "head.npy")
    look = {"type": "embed_prompt", "images": images, "out": files["regressor"], "workers": 0}
    run({**look, "model_path": trained_head(folder, tmp_path)})
    files["bank"] = str(tmp_path / "bank.npy")
    run({**look, "out": files["bank"], "bank": bank, "nearest": 3})
    sources = {"clip": str(tmp_path / "clip.npy"), "caption": files["caption"], "interrogated": files["classic_lite"]}
    files["ensemble"] = str(tmp_path / "ensemble.npy")
    task = {"type": "embed_prompt", "vectors": sources, "model_path": trained_ensemble(sources, tmp_path)}
    run({**task, "out": files["ensemble"]})

    for way, path in files.items():
        out = tmp_path / f"{way}.csv"
        told = run({"type": "write_submission", "vectors": path, "out": out})
        assert (told["images"], told["dim"]) == (len(truth), 384)
        score = run({"type": "score_submission", "submission": out, "truth": tmp_path / "truth.npy"})
        expected = mean_cosine(
            read_vectors(Path(path)).sorted().values, read_vectors(tmp_path / "truth.npy").sorted().values
        )
        assert score["mean_cosine"] == pytest.approx(expected, abs=1e-6), way
    three = {"regressor": files["regressor"], "interrogated": files["classic_lite"], "caption": files["caption"]}
    run({"type": "write_submission", "vectors": three, "out": tmp_path / "all.csv"})
    parts = [read_vectors(Path(path)).sorted().values for path in three.values()]
    joined = 0.7488 * parts[0] + 0.2112 * parts[1] + 0.04 * parts[2]
    np.testing.assert_allclose(read_submission(tmp_path / "all.csv").sorted().values, joined, atol=1e-6)
    told = run({"type": "evaluate_on_prompt_similarity", "vectors": three, "truth": prompts})
    assert set(told["sources"]) == set(three)
    assert told["mean_cosine"] == pytest.approx(
        mean_cosine(joined, read_vectors(tmp_path / "truth.npy").sorted().values)
    )
    again = run(
        {"type": "evaluate_on_prompt_similarity", "vectors": files["regressor"], "truth": prompts, "bank": prompts}
    )
    assert again["mean_cosine"] > again["mean_vector_cosine"] + 0.15, "a head trained on these few pictures knows them"


def trained_head(folder: Path, tmp_path: Path) -> Path:
    """Train a head on real pictures and prompts until it knows them."""
    entry = {"type": "prompts", "prompts": "prompts.csv", "images": "images"}
    recipe = {
        "vision": {"name": "small", "resolution": 32, "small": {"stem": [8, 16], "width": 16, "depth": 1, "heads": 2}},
        "regressor": {"type": "head"},
        "data": {"dir": str(folder), "train": [entry], "val": [entry], "workers": 0, "cache": True},
        "train": {"output_dir": str(tmp_path / "head"), "epochs": 60, "batch_size": 7, "lr": 0.01, "warmup": 5},
    }
    return trained(recipe, tmp_path)


def trained_ensemble(sources: dict[str, str], tmp_path: Path) -> Path:
    entry = {"type": "vectors", "sources": sources, "truth": "truth.npy"}
    recipe = {
        "regressor": {"type": "ensemble", "width": 32, "depth": 1, "heads": 4},
        "data": {"dir": str(tmp_path), "train": [entry], "val": [entry], "workers": 0},
        "train": {"output_dir": str(tmp_path / "ensemble"), "epochs": 3, "batch_size": 4},
    }
    return trained(recipe, tmp_path)


def trained(recipe: dict[str, Any], tmp_path: Path) -> Path:
    recipe["train"] |= {"validate_every": 1000, "freeze": ["nothing"]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train.train(read_flags(["--config", str(tmp_path / "recipe.yml")])[0])
    return Path(recipe["train"]["output_dir"]) / "model_latest.pt"


def test_a_single_picture(captioner: Path, clip: str, lists: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    task = {"type": "image_to_prompt", "image_path": tmp_path / "a.png", "model_path": captioner, "max_new_tokens": 5}
    said = run({**task, "mode": "caption"})["prompt"]
    assert said == run({**task, "type": "test_git_inference_single_image"})["text"]
    assert run({**task, "mode": "caption", "suffix": ", masterpiece"})["prompt"] == said + ", masterpiece"
    lite = run({**task, "towers": clip, "lists": lists})
    assert lite["mode"] == "classic_lite"


def test_a_killed_run_goes_on_and_bad_pictures_are_told(captioner: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "broken.png").write_bytes(png(9)[:60])
    out = tmp_path / "out.tsv"
    task = {"type": "image_to_prompt", "mode": "caption", "image_path": folder, "model_path": captioner}
    task |= {"out_tsv": out, "max_new_tokens": 4, "workers": 0}
    with pytest.raises(UserError, match="1 of 6"):
        run(task)
    report = run({**task, "max_bad": 0.5})
    assert report["ok"] == 5
    assert "error" in out.read_text()
    texts = {"type": "embed_prompt", "prompts": out, "out": tmp_path / "t.npy"}
    with pytest.raises(
        UserError, match=r"1 of 6 captions are unusable, more than max_bad 0; such as broken.png: trunc"
    ):
        run(texts)
    told = run({**texts, "max_bad": 0.5})
    assert (told["count"], list(told["failed"])) == (5, ["broken.png"])
    with pytest.raises(UserError, match=r"has no caption of 'broken.png': trunc"):
        run({"type": "score_submission", "submission": tmp_path / "t.npy", "truth": out})
    (folder / "4.jpg").write_bytes(png(5))
    with pytest.raises(
        UserError, match="'4' is there twice: vectors are joined by a picture's name without its ending"
    ):
        run({"type": "embed_prompt", "images": folder, "out": tmp_path / "v.npy", "bank": "b"} | head_of(tmp_path))
    (folder / "4.jpg").unlink()
    head = {"type": "embed_prompt", "images": folder, "out": tmp_path / "v.npy", "workers": 0}
    model = head_of(tmp_path)["model_path"]
    with pytest.raises(
        UserError, match=r"1 of 6 pictures are unusable, more than max_bad 0; such as broken.png: trunc"
    ):
        run({**head, "model_path": model})
    told = run({**head, "model_path": model, "max_bad": 0.2})
    assert told["count"] == 5
    assert list(told["failed"]) == ["broken.png"]
    assert read_vectors(tmp_path / "v.npy").ids == tuple("01234")


def head_of(tmp_path: Path) -> dict[str, Any]:
    recipe = {"vision": {"name": "small", "resolution": 32}, "regressor": {"type": "head", "dim": 8}}
    return {"model_path": untrained_head(recipe, tmp_path), "bank": None, "workers": 0}


def untrained_head(recipe: dict[str, Any], tmp_path: Path) -> Path:
    from git_model.config import Config
    from git_model.models.build import build_regressor
    from git_model.schema import from_dict

    own = from_dict(Config, recipe)
    save_checkpoint(tmp_path / "head.pt", build_regressor(own), own, step=0, epoch=0)
    return tmp_path / "head.pt"


def test_weights_are_fitted_on_the_training_split_alone(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    names = tuple(f"n{row}" for row in range(60))
    a, b = (dice.normal(size=(60, 12)).astype(np.float32) for _ in range(2))
    right = 0.8 * a + 0.3 * b
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    right[40:] = dice.normal(size=(20, 12))  # what is held out says something else
    for name, array in (("a", a), ("b", b), ("truth", right)):
        write_vectors(tmp_path / f"{name}.npy", Vectors(names, array.astype(np.float32)))
    (tmp_path / "train.csv").write_text("image,prompt\n" + "".join(f"{n}.png,x\n" for n in names[:40]))
    files = {name: str(tmp_path / f"{name}.npy") for name in "ab"}
    told = run(
        {"type": "fit_weights", "vectors": files, "truth": tmp_path / "truth.npy", "train": tmp_path / "train.csv"}
    )
    wanted = np.linalg.lstsq(np.stack([a[:40].ravel(), b[:40].ravel()], 1), right[:40].ravel(), rcond=None)[0]
    assert list(told["weights"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert (told["train"], told["held_out"]) == (40, 20)
    assert told["train_cosine"] > 0.99
    assert told["held_out_cosine"] < 0.5
    whole = run({"type": "evaluate_on_prompt_similarity", "vectors": files, "weights": told["weights"],
                 "truth": tmp_path / "truth.npy", "outfile": tmp_path / "f.json"})  # fmt: skip
    share = 40 * told["train_cosine"] + 20 * told["held_out_cosine"]
    assert whole["mean_cosine"] == pytest.approx(share / 60)
    listed = json.loads((tmp_path / "f.json").read_text())["images"]
    assert [entry["key"] for entry in listed] == list(names)
    assert np.mean([entry["cosine"] for entry in listed]) == pytest.approx(whole["mean_cosine"])
    (tmp_path / "train.csv").write_text("image,prompt\nelse.png,x\n")
    with pytest.raises(UserError, match=r"1 names that .* does not have, such as else"):
        run({"type": "fit_weights", "vectors": files, "truth": tmp_path / "truth.npy", "train": tmp_path / "train.csv"})


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"type": "embed_prompt"}, "needs one of prompts, images and vectors, got none"),
        ({"type": "embed_prompt", "prompts": "a.csv", "images": "b"}, "got prompts and images"),
        ({"type": "embed_prompt", "images": "b"}, "images need either model_path .a regressor. or bank"),
        ({"type": "embed_prompt", "images": "b", "model_path": "no.pt"}, "no file 'no.pt'"),
        ({"type": "embed_prompt", "prompts": "a.csv", "bank": "b"}, "texts need text_encoder alone"),
        ({"type": "embed_prompt", "images": "b", "bank": "b", "suffix": "x"}, "suffix is for texts"),
        ({"type": "embed_prompt", "images": "b", "model_path": "x.pt", "published": True}, "published is for vectors"),
        ({"type": "encode_features", "out": "o.npy"}, "either config .a recipe., or image_encoder_type and images"),
        ({"type": "encode_features", "image_encoder_type": "small", "images": "x", "out": "o.csv"}, "end in .npy"),
        ({"type": "image_to_prompt", "mode": "fast", "image_path": "a.png"}, "begins with a caption: give model_path"),
        (
            {"type": "image_to_prompt", "mode": "nearest", "image_path": "a.png"},
            "'nearest' and bank .* belong together",
        ),
        ({"type": "image_to_prompt", "mode": "negative", "image_path": "a.png", "model_path": "x"}, "uses no caption"),
        (
            {"type": "image_to_prompt", "mode": "caption", "image_path": "a.png", "model_path": "x", "lists": "y"},
            "lists has",
        ),
        (
            {"type": "image_to_prompt", "mode": "fast", "image_path": "a.png", "model_path": "x", "lists": "y"},
            "no folder of",
        ),
        (
            {"type": "image_to_prompt", "mode": "nearest", "image_path": "a.png", "bank": "y"},
            "no bank of prompts at 'y'",
        ),
        (
            {"type": "embed_prompt", "images": "b", "model_path": "x.pt", "towers": "c"},
            "towers is for images and a bank",
        ),
        ({"type": "fit_weights", "vectors": {"a": "no.npy"}, "truth": "t", "train": "t"}, "no file 't'"),
        ({"type": "write_submission", "vectors": {}, "out": "s.csv"}, "vectors names no source"),
        ({"type": "image_to_prompt", "mode": "quick", "image_path": "a.png"}, "mode must be one of: caption, classic"),
        ({"type": "image_to_prompt", "model_path": "x"}, "either image_path .a picture or a folder. or image_tsv"),
        ({"type": "image_to_prompt", "image_tsv": "a.tsv", "model_path": "x"}, "name out_tsv"),
    ],
)
def test_what_does_not_go_together(task: dict[str, Any], told: str, tmp_path: Path) -> None:
    given = {"out": tmp_path / "o.npy", **task} if task["type"] == "embed_prompt" else task
    with pytest.raises(UserError, match=told):
        run(given)


def test_models_of_another_kind(captioner: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    task = {"type": "embed_prompt", "out": tmp_path / "o.npy", "model_path": captioner}
    with pytest.raises(UserError, match="is a model that writes text, no regressor"):
        run({**task, "images": tmp_path})
    write_vectors(tmp_path / "v.npy", Vectors(("a",), np.ones((1, 4), np.float32)))
    head = untrained_head({"vision": {"name": "small"}, "regressor": {"type": "head", "dim": 8}}, tmp_path)
    with pytest.raises(UserError, match="looks at pictures: give images, not vectors"):
        run({**task, "model_path": head, "vectors": {"a": str(tmp_path / "v.npy")}})
    with pytest.raises(UserError, match="embed_prompt takes it"):
        run({"type": "image_to_prompt", "mode": "caption", "image_path": tmp_path / "a.png", "model_path": head})
    torch.save({"weights": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="is no checkpoint of this program"):
        run({**task, "model_path": tmp_path / "x.pt", "images": tmp_path})


def test_the_recipe_of_diffusiondb(tmp_path: Path, root: Path) -> None:
    """Split by prompts, then the recipe as it stands, with small models: pictures in parts, names of one side."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts = [f"{a} {b}, {c}" for a in ("red", "blue") for b in ("cat", "tower", "ship") for c in ("oil", "photo")]
    names = [f"{number:02d}.png" for number in range(24)]
    (tmp_path / "images" / "part-000001").mkdir(parents=True)
    for number, name in enumerate(names):
        (tmp_path / "images" / "part-000001" / name).write_bytes(png(number))
    table = {"image_name": names, "prompt": prompts * 2, "part_id": [1] * 24}
    table |= {"image_nsfw": [0.1] * 23 + [2.0], "prompt_nsfw": [0.0] * 24}
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    split = {"type": "split_prompts", "prompts": tmp_path / "metadata.parquet", "out_dir": tmp_path / "split"}
    told = run({**split, "share": 0.25, "near": None})
    assert (told["train"], told["val"]) == (18, 6)
    small = [
        "--data_dir",
        str(tmp_path),
        "--workers",
        "0",
        "--bs",
        "4",
        "--set",
        "vision.small={stem: [8, 16], width: 16}",
    ]
    small += ["-iet", "small", "--input_resolution", "32", "--freeze", "nothing", "--epochs", "1"]
    recipes = root / "checkpoints"
    lines = {
        "diffusiondb": ["-lm", "small", "--set", "language.small={width: 32, depth: 1, heads: 2, vocab_size: 300}"],
        "diffusiondb_head": ["--freeze", "vision", "--feature_store", str(tmp_path / "store")],
        "diffusiondb_all": ["--init_from", str(tmp_path / "diffusiondb_head" / "model_best.pt")],
    }
    for name, more in lines.items():
        line = ["--config", str(recipes / name / "config.yml"), *small, "--output_dir", str(tmp_path / name), *more]
        scores = train.train(read_flags(line)[0])
        report = json.loads((tmp_path / name / "run_report.json").read_text())["samples"]
        assert report["ok"] in (17, 18), "a picture that Stable Diffusion has blurred is left out"
        assert set(scores) >= ({"cider"} if name == "diffusiondb" else {"mean_cosine"})


def test_other_pictures_under_the_same_names(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    task = {"type": "encode_features", "image_encoder_type": "small", "images": folder, "out": tmp_path / "f.npy"}
    found = []
    for seed in (0, 10):
        for number in range(3):
            (folder / f"{number}.png").write_bytes(png(seed + number))
        assert run({**task, "workers": 0})["count"] == 3
        found.append(read_vectors(tmp_path / "f.npy").values)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_bank_of_prompts_as_distractors_and_from_elsewhere(
    clip: str, minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.csv").write_text("image,prompt\na,a cat\nb,a dog\nc,a ship\n")
    (tmp_path / "t.csv").write_text("image,prompt\nx,a cat on a mat\ny,a boat\n")
    monkeypatch.chdir(Path(clip).parent)
    made = {"type": "make_prompt_bank", "prompts": tmp_path / "p.csv", "out_dir": tmp_path / "bank"}
    run({**made, "towers": Path(clip).name})
    with pytest.raises(UserError, match="holds a bank of prompts already"):
        run({**made, "towers": Path(clip).name})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(png(0))
    look = {"type": "embed_prompt", "images": "pictures", "bank": "bank", "out": "n.npy", "workers": 0}
    assert run(look)["count"] == 1, "a relative path of the towers was kept as it was meant"
    assert run({**look, "towers": clip})["count"] == 1
    run({"type": "embed_prompt", "prompts": "p.csv", "out": "p.npy"})
    said = read_vectors(tmp_path / "p.npy")
    write_vectors(tmp_path / "v.npy", Vectors(("x", "y"), said.values[[0, 2]]))
    alone = run({"type": "evaluate_on_prompt_similarity", "vectors": "v.npy", "truth": "t.csv"})
    beside = run({"type": "evaluate_on_prompt_similarity", "vectors": "v.npy", "truth": "t.csv", "bank": "bank"})
    assert (alone["R@1"], beside["R@1"]) == (1.0, 0.0)
    assert alone["mean_cosine"] == beside["mean_cosine"]
