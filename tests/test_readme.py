"""The README's commands are real: they parse, the small ones run, the tree names what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from download import build_parser
from git_model.flags import read_flags
from git_model.tasks.params import parse_params
from git_model.tasks.registry import resolve


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def commands(readme: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    lines = re.sub(r"\\\n", "\\\\\x00", "".join(blocks)).splitlines()
    return [shlex.split(line.replace("\\\x00", "\\\n"), comments=True) for line in lines if line.strip()]


def test_every_training_command_parses(readme: str) -> None:
    found = [c[c.index("train.py") + 1 :] for c in commands(readme) if "train.py" in c and "--help" not in c]
    assert len(found) >= 3
    for arguments in found:
        read_flags(arguments)


def test_every_download_command_parses(readme: str) -> None:
    found = [c[c.index("download.py") + 1 :] for c in commands(readme) if "download.py" in c]
    assert len(found) >= 3
    for arguments in found:
        build_parser().read(arguments)


def test_every_inference_command_resolves(readme: str) -> None:
    found = [c[c.index("-p") + 1] for c in commands(readme) if "inference.py" in c and "-p" in c]
    assert len(found) >= 8
    asked = [resolve(parse_params(text))[0].__name__ for text in found]
    assert {"caption_image", "caption_tsv", "evaluate_on_coco_caption", "convert_tsv_to_vqa_json"} <= {*asked}


def test_make_targets_exist(readme: str, root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for command in commands(readme):
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE)


def test_the_tree_names_what_is_there(readme: str, root: Path) -> None:
    tree = readme.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {p.name for p in (root / "git_model").rglob("*.py") if p.name != "__init__.py"} | {
        "train.py",
        "inference.py",
        "download.py",
    }
    assert named == there


def test_the_makefiles_tasks_resolve(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    texts = re.findall(r'inference.py -p "(.*?)"', makefile, re.DOTALL)
    assert [resolve(parse_params(text))[0].__name__ for text in texts] == ["make_shapes", "evaluate"]


def test_every_recipe_is_in_the_image(root: Path) -> None:
    definition = (root / "container.def").read_text(encoding="utf-8")
    recipes = sorted(path.relative_to(root).as_posix() for path in root.glob("checkpoints/*/config.yml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        assert f"    {recipe} /opt/generative-image-to-text/{recipe}\n" in definition
