"""Do ensembles of prompt vectors fuse? Prompts composed of real lists, three sources that each know a part of them.

    python -m benchmarks.prompt_gates

3,000 prompts "adjective subject, medium, movement, flavor" of the lists that come with clip-interrogator; what is to be
foretold is their real MiniLM vector. Sources:

    clip          512 numbers that tell of subject, medium and flavor, and noise
    convnext      768 numbers that tell of adjective and movement, and noise
    interrogated  MiniLM's vector of a caption that is partly wrong

Split by groups of prompts, 80 to 20; 12 epochs, batches of 64, learning rate 5e-4, by train.py. Gates: all sources
together are above the best alone and above the mean vector; a batch of one gives the same; shuffling any source costs;
the published ensemble, trained on the same, fails that. Then the weighted ensemble: fixed weights above its best
source, and weights fitted on the training split. Last, drawn scenes: the recipes shapes_head (a vector) and
shapes_prompt (a text), scored on scenes with combinations that training never showed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

# fmt: off
ADJECTIVES = (
    "ancient", "broken", "burning", "colossal", "crystal", "cursed", "dancing", "dreamy", "electric", "fallen",
    "floating", "forgotten", "frozen", "furious", "gentle", "giant", "glowing", "golden", "haunted", "hidden",
    "holy", "iron", "laughing", "lonely", "lost", "melting", "mechanical", "miniature", "neon", "overgrown",
    "rusty", "sacred", "sleeping", "tiny", "translucent", "wandering", "weeping", "wooden",
)
SUBJECTS = (
    "astronaut", "bear", "bird", "bridge", "butterfly", "castle", "cat", "cathedral", "cave", "church", "city",
    "clock", "cloud", "cowboy", "crab", "crow", "deer", "desert", "dinosaur", "dog", "dolphin", "dragon",
    "elephant", "factory", "farmer", "fish", "flower", "forest", "fountain", "fox", "frog", "garden", "ghost",
    "girl", "goat", "harbor", "horse", "island", "jellyfish", "king", "knight", "lake", "library", "lighthouse",
    "lion", "market", "monk", "moon", "mountain", "mushroom", "ocean", "owl", "piano", "pirate", "planet", "queen",
    "rabbit", "river", "robot", "samurai", "ship", "skeleton", "spider", "statue", "street", "subway", "temple",
    "throne", "tiger", "tower", "train", "tree", "turtle", "vampire", "village", "volcano", "waterfall", "whale",
    "windmill", "witch", "wizard", "wolf",
)
# fmt: on
FLAVORS = 2000  # of the list's hundred thousand: the most frequent come first
NOISE = {"clip": 1.0, "convnext": 1.0}
SINGLES = ("clip", "convnext", "interrogated")
ABOVE_SINGLE, ABOVE_MEAN, COST, SAME = 0.015, 0.15, 0.01, 1e-5
ABOVE_SOURCE, FITTED = 0.03, -0.005
RECOVERED = 0.9


def main() -> int:
    """Make the sets, train, score, print; return 1 where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/prompt_gates"), help="folder of all of it")
    given = parser.parse_args()
    out = given.out.resolve() / f"seed-{given.seed}"
    write_sources(out, given.rows, given.seed)
    found = {**fusion(out, given.seed, given.epochs), "weighted": weighted(out), "shapes": shapes(out)}
    missed = [name for name, good in gates(found).items() if not good]
    found["missed"] = missed
    (out / "figures.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    return bool(missed)


def gates(found: dict[str, Any]) -> dict[str, bool]:
    """Return each gate's name and whether it is reached."""
    best = max(found[name] for name in SINGLES)
    told = {
        f"fused >= best single + {ABOVE_SINGLE}": found["fused"] >= best + ABOVE_SINGLE,
        f"fused >= mean vector + {ABOVE_MEAN}": found["fused"] >= found["mean_vector"] + ABOVE_MEAN,
        f"batch of one as batch of many to {SAME}": found["batch_of_one"] <= SAME,
        "every source gets a gradient": min(found["gradients"].values()) > 0,
        "the published one ignores two sources": not any(
            found["published"]["cost"][name] for name in ("convnext", "interrogated")
        ),
        "the published one depends on the batch": found["published"]["batches_of_64"]
        > found["published"]["batches_of_one"] + COST,
    }
    told |= {f"shuffled {name} costs {COST}": cost >= COST for name, cost in found["cost"].items()}
    drawn = found["shapes"]
    told[f"head >= mean vector + {ABOVE_MEAN}"] = drawn["head"]["mean_cosine"] >= drawn["mean_vector"] + ABOVE_MEAN
    told[f"captioner >= {RECOVERED}"] = drawn["captioner"]["mean_cosine"] >= RECOVERED
    sums = found["weighted"]
    told[f"fixed weights >= best source + {ABOVE_SOURCE}"] = (
        sums["fixed"] >= max(sums["sources"].values()) + ABOVE_SOURCE
    )
    told[f"fitted weights >= fixed {FITTED}"] = sums["fitted"] >= sums["fixed"] + FITTED
    return told


def write_sources(out: Path, rows: int, seed: int) -> None:
    """Write prompts and sources once."""
    from git_model.datasets.vectors import Vectors, write_vectors
    from git_model.models.interrogator import read_lists
    from git_model.models.text import SentenceEncoder

    settings = json.dumps([rows, seed, NOISE, FLAVORS])
    if (out / "whole").is_file() and (out / "whole").read_text() == settings:
        return
    out.mkdir(parents=True, exist_ok=True)
    lists, rng, encoder = read_lists(None), random.Random(seed), SentenceEncoder()
    pools = {
        "adjective": ADJECTIVES,
        "subject": SUBJECTS,
        "medium": list(lists.mediums),
        "movement": list(lists.movements),
        "flavor": list(lists.flavors[:FLAVORS]),
    }
    drawn = [{name: rng.choice(pool) for name, pool in pools.items()} for _ in range(rows)]
    prompts = [f"{d['adjective']} {d['subject']}, {d['medium']}, {d['movement']}, {d['flavor']}" for d in drawn]
    names = tuple(f"p{row:05d}" for row in range(rows))
    wrong = [{name: rng.choice(pool) if rng.random() < 0.4 else d[name] for name, pool in pools.items()} for d in drawn]
    captions = [f"{w['medium']} of a {w['subject']}, {w['movement']}" for w in wrong]
    plain = [f"a picture of a {w['subject']}, fine details, masterpiece" for w in wrong]
    dice = np.random.default_rng(seed)

    def told(parts: tuple[str, ...], width: int, noise: float) -> np.ndarray:
        said = encoder([", ".join(d[part] for part in parts) for d in drawn])  # (n,F)
        mixed = said @ dice.normal(size=(said.shape[1], width))  # (n,D), about 1 each
        return (mixed + noise * dice.normal(size=mixed.shape)).astype(np.float32)

    truth = encoder(prompts, progress=True)
    arrays = {
        "truth": truth,
        "clip": told(("subject", "medium", "flavor"), 512, NOISE["clip"]),
        "convnext": told(("adjective", "movement"), 768, NOISE["convnext"]),
        "interrogated": encoder(captions, progress=True),
        "caption": encoder(plain),
        "regressor": (truth + 0.052 * dice.normal(size=truth.shape)).astype(np.float32),  # cosines of about 0.7
    }
    for name, array in arrays.items():
        write_vectors(out / f"{name}.npy", Vectors(names, array))
    (out / "whole").write_text(settings)


def source_of(out: Path, sources: tuple[str, ...], split: str) -> Any:
    """Return a data set of some sources."""
    from git_model.datasets.vector_source import VectorSource

    return VectorSource(out, {name: f"{name}.npy" for name in sources}, truth="truth.npy", split=split)


def fusion(out: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Train on all sources and on each alone, and the published ensemble; return what is scored on the held-out."""
    found: dict[str, Any] = {}
    for name in ("fused", *SINGLES):
        sources = SINGLES if name == "fused" else (name,)
        entry = {"type": "vectors", "sources": {s: f"{s}.npy" for s in sources}, "truth": "truth.npy"}
        recipe = {
            "regressor": {"type": "ensemble"},
            "data": {
                "dir": str(out),
                "workers": 0,
                "train": [entry | {"split": "train"}],
                "val": [entry | {"split": "val"}],
            },
            "train": {"output_dir": str(out / name), "epochs": epochs, "batch_size": 64, "lr": 5e-4, "warmup": 100},
        }
        recipe["train"] |= {"schedule": "cosine", "seed": seed, "validate_samples": 100_000}
        (out / f"{name}.yml").write_text(json.dumps(recipe))
        subprocess.run(
            [sys.executable, "train.py", "--config", str(out / f"{name}.yml"), "--resume", "no"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "mean_cosine" in line][-1]
        found[name] = last["mean_cosine"]
        print(f"{name}: {found[name]:.4f} after {last['seconds']:.0f} s", flush=True)
    whole, held = (columns(source_of(out, SINGLES, split)) for split in ("train", "val"))
    mean = torch.nn.functional.normalize(whole[1].mean(dim=0), dim=0)
    found["mean_vector"] = float((held[1] @ mean).mean())
    found |= examined(out, held)
    found["published"] = published(whole, held, seed, epochs)
    return found


def shapes(out: Path) -> dict[str, Any]:
    """Train the two recipes of drawn scenes, and score what they say of scenes unlike those they saw."""
    from git_model.datasets.shapes import write_shapes
    from git_model.tasks.registry import run

    data = out.parent / "shapes"
    write_shapes(data)
    for name in ("shapes_head", "shapes_prompt"):
        line = ["--config", f"checkpoints/{name}/config.yml", "--data_dir", str(data), "--output_dir", str(out / name)]
        subprocess.run([sys.executable, "train.py", *line, "--resume", "no"], check=True, stderr=subprocess.DEVNULL)
    head, text = out / "shapes_head.npy", out / "shapes_prompt.tsv"
    images = data / "test.img.tsv"
    run({"type": "embed_prompt", "images": images, "model_path": out / "shapes_head" / "model_best.pt", "out": head})
    task = {"type": "image_to_prompt", "mode": "caption", "image_tsv": images, "max_new_tokens": 60, "out_tsv": text}
    run({**task, "model_path": out / "shapes_prompt" / "model_best.pt"})
    run({"type": "embed_prompt", "prompts": text, "out": text.with_suffix(".npy")})
    score = {"type": "evaluate_on_prompt_similarity", "truth": data / "test.prompt.tsv"}
    score["baseline"] = data / "train.prompt.tsv"
    found = {"head": run({**score, "vectors": head}), "captioner": run({**score, "vectors": text.with_suffix(".npy")})}
    return {**found, "mean_vector": found["head"]["mean_vector_cosine"]}


def columns(source: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the features (n,D) of each source, and the right vectors (n,F)."""
    samples = [source[row] for row in range(len(source))]
    features = [torch.tensor(np.stack(column)) for column in zip(*(s.features for s in samples), strict=True)]
    return features, torch.tensor(np.stack([s.wanted for s in samples]))


def examined(out: Path, held: tuple[list[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Return what shuffling costs, how far a batch of one differs, and each source's gradient."""
    from git_model.checkpoint import load_regressor
    from git_model.models.regressor import EnsembleRegressor, cosine_loss

    model, _ = load_regressor(out / "fused" / "model_latest.pt")
    assert isinstance(model, EnsembleRegressor)
    features, right = held
    with torch.no_grad():
        together = model.vectors(features)
        alone = torch.cat([model.vectors([x[i : i + 1] for x in features]) for i in range(64)])
    told = {"batch_of_one": float((together[:64] - alone).abs().max()), "cost": shuffled(model.vectors, held)}
    cosine_loss(model.vectors([x[:64] for x in features]), right[:64]).backward()
    weights = [p.weight for p in model.fusion.projections]
    told["gradients"] = {n: float(w.grad.abs().sum()) for n, w in zip(SINGLES, weights, strict=True)}  # type: ignore[union-attr]
    return told


def shuffled(answer: Any, held: tuple[list[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Return by how much the mean cosine falls where one source is that of other rows."""
    features, right = held
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))

    def score(given: list[torch.Tensor]) -> float:
        with torch.no_grad():
            return float(torch.cosine_similarity(answer(given), right).mean())

    whole = score(features)
    turned = ([x[order] if i == number else x for i, x in enumerate(features)] for number in range(len(SINGLES)))
    return {name: whole - score(given) for name, given in zip(SINGLES, turned, strict=True)}


def published(whole: Any, held: Any, seed: int, epochs: int) -> dict[str, Any]:
    """Train the published ensemble as its authors do (no shuffle, no warm-up), and look at it in the same way."""
    from git_model.models.regressor import PublishedEnsemble, cosine_loss

    torch.manual_seed(seed)
    model = PublishedEnsemble()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    features, right = whole
    for _ in range(epochs):
        for start in range(0, len(right), 64):
            loss = cosine_loss(model([x[start : start + 64] for x in features]), right[start : start + 64])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    features, right = held
    with torch.no_grad():
        batches = [model([x[i : i + 64] for x in features]) for i in range(0, len(right), 64)]
        alone = [model([x[i : i + 1] for x in features]) for i in range(len(right))]
        scores = [float(torch.cosine_similarity(torch.cat(v), right).mean()) for v in (batches, alone)]
    return {"batches_of_64": scores[0], "batches_of_one": scores[1], "cost": shuffled(model, held)}


def weighted(out: Path) -> dict[str, Any]:
    """Return the scores of the weighted ensemble and its sources on the held-out, weights fixed and fitted."""
    from git_model.datasets.vectors import Vectors, read_vectors, write_vectors
    from git_model.tasks.registry import run
    from git_model.tasks.submission import WEIGHTS

    sides = {}
    for split in ("train", "val"):
        ids = tuple(source_of(out, SINGLES, split).ids)
        write_vectors(out / f"truth_{split}.npy", Vectors(ids, read_vectors(out / "truth.npy").of(ids)))
        sides[split] = ids
    for name in WEIGHTS:
        write_vectors(
            out / f"{name}_val.npy", Vectors(sides["val"], read_vectors(out / f"{name}.npy").of(sides["val"]))
        )
    task = {"vectors": {name: str(out / f"{name}_val.npy") for name in WEIGHTS}, "truth": str(out / "truth_val.npy")}
    fixed = run({"type": "evaluate_on_prompt_similarity", **task})
    fitting = {"vectors": {name: str(out / f"{name}.npy") for name in WEIGHTS}, "truth": str(out / "truth.npy")}
    fit = run({"type": "fit_weights", **fitting, "train": str(out / "truth_train.npy")})
    return {
        "sources": {name: told["mean_cosine"] for name, told in fixed["sources"].items()},
        "fixed": fixed["mean_cosine"],
        "fitted": fit["held_out_cosine"],
        "weights": fit["weights"],
        "mean_vector": fixed["mean_vector_cosine"],
    }


if __name__ == "__main__":
    sys.exit(main())
