"""The interrogator: every mode's exact prompt, what fits, the true minimum, lists of a package, a folder, one's own."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from published import SIDE, save_clip
from tokenizers import pre_tokenizers

from git_model.errors import UserError
from git_model.models.interrogator import MODES, PACKAGE, Interrogator, Lists, read_lists
from git_model.models.phrases import PhraseBank, TwoTowers

Parts = dict[str, Sequence[float]]


class Known:
    """Stands in for a model of both towers: texts' parts have known vectors, a text is their sum, a word is a token.

    Args:
        pictures: vectors; a picture's width says which is its own.
        parts: the vectors of texts between commas; an unknown one is the last axis.
        limit: words, commas not counted.
    """

    def __init__(self, pictures: Sequence[Sequence[float]], parts: Parts, limit: int = 99) -> None:
        self.seen, self.parts, self.encoded = np.array(pictures, np.float32), parts, []
        self.model = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=limit)))

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return unit(self.seen[[picture.width - 1 for picture in pictures]])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += texts
        other = [*[0.0] * (self.seen.shape[1] - 1), 1.0]
        return unit(np.array([sum(np.array(self.parts.get(p, other)) for p in text.split(", ")) for text in texts]))

    def processor(self, text: Sequence[str], padding: bool, truncation: bool, max_length: int) -> dict[str, Any]:
        assert truncation
        assert not padding
        return {"input_ids": [some.split()[:max_length] for some in text]}


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def wide(*which: int) -> list[Image.Image]:
    return [Image.new("RGB", (i + 1, 1)) for i in which]


# Two pictures: the first is along x, the second along y. Of every list the first phrase fits the first picture best.
PARTS: Parts = {
    "a dog": [1, 1, 0, 1], "a painting of a dog": [1, 1, 0, 1],
    "a painting": [9, 1, 0, 2], "a photo": [1, 9, 0, 2],
    "by Ada": [8, 1, 0, 3], "by Bo": [1, 8, 0, 3], "inspired by Ada": [2, 1, 0, 9], "inspired by Bo": [1, 2, 0, 9],
    "on Tumblr": [7, 1, 0, 3], "on Flickr": [1, 7, 0, 3],
    "baroque": [6, 1, 0, 3], "cubism": [1, 6, 0, 3],
    "sharp": [9, 2, 0, 4], "soft": [2, 9, 0, 4], "grey": [5, 4, 0, 4], "loud": [4, 5, 0, 5], "flat": [1, 1, 0, 9],
    "oak": [6, 1, 1, 3], "elm": [1, 6, 1, 3], "nine": [3, 1, 0, 9], "ten": [1, 3, 0, 9],
}  # fmt: skip
LISTS = Lists(
    artists=("by Ada", "by Bo", "inspired by Ada", "inspired by Bo"),
    flavors=("sharp", "soft", "grey", "loud", "flat"),
    mediums=("a painting", "a photo"),
    movements=("baroque", "cubism"),
    trendings=("on Tumblr", "on Flickr"),
    negative=("bad",),
    own={"trees": ("oak", "elm"), "numbers": ("nine", "ten")},
)
ALONE = replace(LISTS, own={})


def known(lists: Lists = ALONE, limit: int = 99, **parts: Sequence[float]) -> Interrogator:
    towers: Any = Known([[1, 0, 0, 0], [0, 1, 0, 0]], PARTS | parts, limit)
    return Interrogator(towers, lists)


# --------------------------------------------------------------------------------------------------- the exact prompts
@pytest.mark.parametrize(
    ("mode", "flavors", "prompts"),
    [
        ("classic", None, ["a dog, a painting by Ada, on Tumblr, baroque, sharp, grey, loud",
                           "a painting of a dog, a photo by Bo, on Flickr, cubism, soft, loud, grey"]),
        ("classic", 1, ["a dog, a painting by Ada, on Tumblr, baroque, sharp",
                        "a painting of a dog, a photo by Bo, on Flickr, cubism, soft"]),
        ("classic_lite", None, ["a dog, a painting, baroque, sharp, grey, loud",
                                "a painting of a dog, a photo, cubism, soft, loud, grey"]),
        ("fast", 4, ["a dog, a painting, by Ada, on Tumblr, sharp",
                     "a painting of a dog, a photo, by Bo, on Flickr, soft"]),
    ],
)  # fmt: skip
def test_prompts(mode: str, flavors: int | None, prompts: list[str]) -> None:
    assert known().prompts(wide(0, 1), ["a dog", " a painting of a dog\n"], mode, flavors) == prompts


def test_a_caption_that_begins_with_the_medium() -> None:
    classic, lite = (known().prompts(wide(0), ["a painting of a dog"], mode) for mode in ("classic", "classic_lite"))
    assert classic == ["a painting of a dog by Ada, on Tumblr, baroque, sharp, grey, loud"]
    assert lite == ["a painting of a dog, baroque, sharp, grey, loud"]
    inside = known().prompts(wide(0), ["dog in a painting"], "classic_lite")
    assert inside == ["dog in a painting, a painting, baroque, sharp, grey, loud"]
    assert known().prompts(wide(0), [""], "classic", 1) == ["a painting by Ada, on Tumblr, baroque, sharp"]


def test_fast_merges_all_lists() -> None:
    """Each phrase once, even if several lists have it, and no more than there are."""
    twice = replace(ALONE, movements=("baroque", "cubism", "sharp"), artists=())
    (prompt,) = known(twice).prompts(wide(0), ["a dog"], "fast")
    want = ["a dog", "a painting", "on Tumblr", "sharp", "baroque", "grey", "loud", "soft", "a photo", "cubism"]
    assert prompt.split(", ")[:7] == want[:7]
    assert sorted(prompt.split(", ")) == sorted([*want, "on Flickr", "flat"])


def test_best_takes_what_brings_it_nearest() -> None:
    """The first picture is the caption and one flavor, the second the caption and two, the third the caption."""
    parts: Parts = {"cap": [1, 0, 0, 0], "off": [0, 0, 0, 1], "up": [0, 1, 0, 0], "side": [0, 0, 1, 0]}
    towers: Any = Known([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], parts)
    found = Interrogator(towers, Lists(flavors=("off", "up", "side"))).prompts(wide(0, 1, 2), ["cap"] * 3, "best")
    assert found == ["cap, up", "cap, up, side", "cap"]


def test_best_may_be_classic_or_fast() -> None:
    parts: Parts = {"cap": [1, 0, 0], "a ink by Bo": [0, 9, 0], "up": [0, 1, 0], "over": [0, 2, 0]}
    towers: Any = Known([[1, 9, 0]], parts)
    classic = Interrogator(towers, Lists(mediums=("a ink",), artists=("by Bo",), flavors=("cap",)))
    assert classic.prompts(wide(0), ["cap"], "best", 1) == ["cap, a ink by Bo, cap"]
    fast = Interrogator(towers, Lists(flavors=("up", "over")), intermediate=1)
    assert fast.prompts(wide(0), ["cap"], "best", 2) == ["cap, up, over"]
    assert "cap, over" not in towers.encoded, "the chain has one candidate only"


def test_best_is_cut_before_it_is_compared() -> None:
    parts: Parts = {"cap": [1, 0, 0, 0], "up": [0, 1, 0, 0], "side": [0, 0, 1, 0], "up and side": [0, 1, 1, 0]}
    towers: Any = Known([[1, 1, 1, 0]], parts, limit=2)
    room = Interrogator(towers, Lists(flavors=("up and side", "up", "side")))
    assert room.prompts(wide(0), ["cap"], "best") == ["cap, up"], "what does not fit is no candidate of the chain"
    assert room.prompts(wide(0), ["cap, side, up"], "best") == ["cap, side"]
    assert all(len(text.split()) <= 2 or text == "up and side" for text in towers.encoded)


def test_equal_ones_come_in_the_list_s_order() -> None:
    """Equal to six decimals: on another machine the rest of the digits may be others."""
    parts: Parts = {"low": [1, 2, 0], "as low": [1, 2, 0], "nearly": [1, 0.0005, 0], "straight": [1, 0, 0]}
    towers: Any = Known([[1, 0, 0]], parts)
    near, straight = (towers.texts(["nearly", "straight"]) @ towers.pictures(wide(0)).T)[:, 0]
    assert near < straight
    room = Interrogator(towers, Lists(flavors=("low", "as low", "nearly", "straight")))
    assert room.prompts(wide(0), ["x"], "fast", 3) == ["x, nearly, straight, low"]
    assert room.prompts(wide(0), ["x"], "classic", 1) == ["x, nearly"]


def test_no_caption() -> None:
    towers: Any = Known([[0, 0, 1]], {"up": [0, 1, 0.5]})
    room = Interrogator(towers, Lists(flavors=("up",)))
    for mode in MODES:
        assert room.prompts(wide(0), [" "], mode) == ["up"]


def test_many_pictures_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in MODES:
        want = known().prompts(wide(0, 1, 0), ["a dog"] * 3, mode)
        with monkeypatch.context() as less:
            less.setattr("git_model.models.interrogator.ROWS", 2)
            assert known().prompts(wide(0, 1, 0), ["a dog"] * 3, mode) == want


def test_a_chain_goes_through_what_does_not_help() -> None:
    """Each of two phrases alone leads away from the picture, both together to it; later only what helps is added."""
    parts: Parts = {"cap": [1, 0, 1, 0], "over": [0, 9, -0.5, 0], "under": [0, -9, -0.5, 0]}
    parts |= {f"worse {i}": [0, 0, 0, 20 + i] for i in range(9)}
    towers: Any = Known([[1, 0, 0, 0]], parts)
    room = Interrogator(towers, Lists(flavors=tuple(parts)[1:]))
    assert room.prompts(wide(0), ["cap"], "best", 1) == ["cap"]
    towers.encoded.clear()
    assert room.prompts(wide(0), ["cap"], "best", 11) == ["cap, over, under"]
    tried = {text.count(", ") for text in towers.encoded}
    assert tried == {*range(10), 11}, "eight phrases are taken in any case, a ninth is tried; classic and fast have all"


# ------------------------------------------------------------------------------------------------------------ negative
@pytest.fixture(scope="module")
def many() -> Parts:
    vectors = np.random.default_rng(0).normal(size=(5000, 8))
    return {f"phrase {i}": list(vector) for i, vector in enumerate(vectors)}


def test_negative_is_the_true_minimum(many: Parts) -> None:
    """Of a list that clip-interrogator ranks in chunks of 2048, and then by what is nearest."""
    towers: Any = Known(np.random.default_rng(1).normal(size=(3, 8)).tolist(), many)
    room = Interrogator(towers, Lists(flavors=tuple(many), negative=("ugly",)), intermediate=5)
    cosines = towers.pictures(wide(0, 1, 2)) @ towers.texts(list(many)).T  # (3,5000)
    low = [[f"phrase {i}" for i in row] for row in cosines.argsort(axis=1)]
    assert room.prompts(wide(0, 1, 2), ["unused"] * 3, "negative", 1) == [row[0] for row in low]
    towers.encoded.clear()
    room.prompts(wide(1), [""], "negative", 1)
    assert towers.encoded == [*low[1][:5], "ugly"], "the five farthest, farthest first, and the list of the negative"


def test_negative_goes_down(many: Parts) -> None:
    """The chain ends lower than any phrase alone, and lower than any shorter beginning of it."""
    towers: Any = Known(np.random.default_rng(1).normal(size=(1, 8)).tolist(), many)
    (prompt,) = Interrogator(towers, Lists(flavors=tuple(many))).prompts(wide(0), [""], "negative")
    beginnings = [", ".join(prompt.split(", ")[: n + 1]) for n in range(len(prompt.split(", ")))]
    cosines = (towers.texts(beginnings) @ towers.pictures(wide(0)).T)[:, 0]
    assert 1 < len(beginnings) <= 32
    assert cosines.argmin() == len(beginnings) - 1
    assert cosines[-1] < -0.99


def test_negative_of_the_negative_list() -> None:
    towers: Any = Known([[1, 0, 1]], {"up": [1, 2, 0], "far": [-1, 0, 0], "down": [0, -1, 0]})

    def pick(lists: Lists) -> list[str]:
        return Interrogator(towers, lists).prompts(wide(0), [""], "negative")

    assert pick(Lists(flavors=("up", "down"), negative=("far",))) == ["far"]
    assert pick(Lists(negative=("up", "far"))) == ["far"]
    assert pick(Lists(flavors=("up", "down"))) == ["down"]
    towers.seen[0], towers.parts = [1, 1, 0], {"left": [-2, 0, 0], "down": [0, -1, 0]}
    assert pick(Lists(flavors=("left", "down"), negative=("down",))) == ["left, down"], "no phrase twice"


# ------------------------------------------------------------------------------------------------------- what is made
def test_a_text_is_encoded_once(many: Parts) -> None:
    few = dict(list(many.items())[:30])
    towers: Any = Known([[1, 0, 0, 0, 0, 0, 0, 1]], few)
    room = Interrogator(towers, Lists(flavors=tuple(few), negative=("ugly", "phrase 3")))
    for mode in ("best", "negative"):
        room.prompts(wide(0), ["phrase 0"], mode)  # the vectors of lists are made
        towers.encoded.clear()
        once = room.prompts(wide(0), ["phrase 0"], mode)
        met = list(towers.encoded)
        assert len(met) == len(set(met)) > 200
        towers.encoded.clear()
        assert room.prompts(wide(0, 0), ["phrase 0"] * 2, mode) == once * 2
        assert sorted(towers.encoded) == sorted(met)


def test_forgotten_texts_are_encoded_again(many: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    towers: Any = Known([[1, 0, 0, 0, 0, 0, 0, 1]], many)
    lists = Lists(flavors=tuple(many)[:30])
    want = Interrogator(towers, lists).prompts(wide(0, 0), ["phrase 0"] * 2, "best")
    monkeypatch.setattr("git_model.models.interrogator.ROOM", 1)
    towers.encoded.clear()
    assert Interrogator(towers, lists).prompts(wide(0, 0), ["phrase 0"] * 2, "best") == want
    assert len(towers.encoded) > 1.5 * len(set(towers.encoded)), "or the memory would grow without end"


@pytest.mark.parametrize(
    ("mode", "lists"),
    [
        ("classic", ["artists", "flavors", "mediums", "movements", "numbers", "trees", "trendings"]),
        ("classic_lite", ["flavors", "mediums", "movements", "numbers", "trees"]),
        ("fast", ["artists", "flavors", "mediums", "movements", "numbers", "trees", "trendings"]),
        ("best", ["artists", "flavors", "mediums", "movements", "numbers", "trees", "trendings"]),
        ("negative", ["flavors"]),
    ],
)
def test_banks_are_made_when_needed_and_once(mode: str, lists: list[str]) -> None:
    names = {phrases: name for name, phrases in {**vars(ALONE), **LISTS.own}.items() if name != "own"}
    towers: Any = Known([[1, 0, 0, 0]], PARTS)
    made = []

    def bank(phrases: Sequence[str]) -> PhraseBank:
        made.append(names[tuple(phrases)])
        return PhraseBank(phrases, towers)

    room = Interrogator(towers, LISTS, bank)
    assert made == []
    for _ in range(2):
        room.prompts(wide(0), ["a dog"], mode)
        assert sorted(made) == lists


# ------------------------------------------------------------------------------------------------------- lists, errors
def test_own_lists_in_every_mode() -> None:
    room = known(LISTS)
    classic = ["a dog, a painting by Ada, on Tumblr, baroque, sharp, oak, nine"]
    assert room.prompts(wide(0), ["a dog"], "classic", 1) == classic
    assert room.prompts(wide(0), ["a dog"], "classic_lite", 1) == ["a dog, a painting, baroque, sharp, oak, nine"]
    fast = known(Lists(own={"trees": ("oak", "elm"), "numbers": ("nine", "ten")}))
    assert fast.prompts(wide(0, 1), ["a dog"] * 2, "fast", 2) == ["a dog, oak, nine", "a dog, elm, ten"]
    parts: Parts = {"a dog": [1, 0, 0, 0], "elm": [0, 1, 0, 0], "oak": [0, 0, 1, 0]}
    towers: Any = Known([[1, 1, 0, 0]], parts)
    assert Interrogator(towers, Lists(own={"t": ("oak", "elm")})).prompts(wide(0), ["a dog"], "best") == ["a dog, elm"]


@pytest.mark.parametrize(
    ("missing", "classic"),
    [
        ("mediums", "a dog by Ada, on Tumblr, baroque, sharp"),
        ("artists", "a dog, a painting, on Tumblr, baroque, sharp"),
        ("trendings", "a dog, a painting by Ada, baroque, sharp"),
        ("movements", "a dog, a painting by Ada, on Tumblr, sharp"),
        ("flavors", "a dog, a painting by Ada, on Tumblr, baroque"),
    ],
)
def test_a_missing_list_is_left_out(missing: str, classic: str) -> None:
    nothing: Any = {missing: ()}
    room = known(replace(ALONE, **nothing))
    assert room.prompts(wide(0), ["a dog"], "classic", 1) == [classic]
    (lite,) = room.prompts(wide(0), ["a dog"], "classic_lite", 1)
    assert lite == ", ".join(part.removesuffix(" by Ada") for part in classic.split(", ") if part != "on Tumblr")
    gone = {*getattr(ALONE, missing)}
    assert gone.isdisjoint(room.prompts(wide(0), ["a dog"], "fast")[0].split(", "))
    assert gone.isdisjoint(room.prompts(wide(0), ["a dog"], "best")[0].split(", "))


@pytest.mark.parametrize(
    ("lists", "mode", "flavors", "told"),
    [
        (LISTS, "classical", None, "unknown mode 'classical' .did you mean 'classic'.*_lite, fast, best, negative"),
        (LISTS, "fast", 0, "flavors must be 1 or more, not 0"),
        (Lists(mediums=("a photo",)), "negative", None, r"'negative' needs one of flavors\.txt, negative\.txt"),
        (Lists(negative=("bad",)), "best", None, r"'best' needs one of artists\.txt, flavors\.txt, mediums\.txt, mov"),
        (Lists(artists=("by Bo",)), "classic_lite", None, r"needs one of flavors\.txt, mediums\.txt, movements\.txt$"),
    ],
)
def test_what_does_not_fit(lists: Lists, mode: str, flavors: int | None, told: str) -> None:
    room = known(lists)
    with pytest.raises(UserError, match=told):
        room.check(mode, flavors)
    with pytest.raises(UserError, match=told):
        room.prompts(wide(0), ["a dog"], mode, flavors)


def test_as_many_captions_as_pictures() -> None:
    assert known().prompts([], [], "best") == []
    with pytest.raises(UserError, match="2 pictures, but 1 captions"):
        known().prompts(wide(0, 1), ["a dog"], "fast")


def write(folder: Path, **lists: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", artists="Ada\n\nBo, Jr.\n", mediums="a photo", trees=" oak \nelm", numbers="nine")
    write(tmp_path / "a" / "below", flavors="deep")
    (tmp_path / "a" / "notes.md").write_text("no list")
    (tmp_path / "a" / "._trees.txt").write_bytes(b"\0\5\xff")
    own = {"numbers": ("nine",), "trees": ("oak", "elm")}
    artists = ("by Ada", "by Bo, Jr.", "inspired by Ada", "inspired by Bo, Jr.")
    assert read_lists(folder) == Lists(artists=artists, mediums=("a photo",), own=own)
    names = ("flavors", "mediums", "movements", "trendings", "negative")
    every: dict[str, Any] = {name: (f"{name} 1", f"{name} 2") for name in names}
    write(tmp_path / "b", **{name: "\n".join(some) for name, some in every.items()})
    assert read_lists(str(tmp_path / "b")) == Lists(**every)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of lists at '.*nowhere'"):
        read_lists(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no list in '.*': it needs files such as artists\.txt"):
        read_lists(str(tmp_path))
    with pytest.raises(UserError, match=r"flavors\.txt' holds no phrase"):
        read_lists(write(tmp_path, flavors="\n \n"))


def test_the_package_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"artists": "Ada", "flavors": "sharp", "mediums": "a photo", "movements": "cubism", "negative": "bad"}
    write(tmp_path / PACKAGE / "data", **data)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise ImportError('torchvision')")
    monkeypatch.syspath_prepend(tmp_path)
    lists = read_lists(None)
    assert (lists.artists, lists.flavors, lists.own) == (("by Ada", "inspired by Ada"), ("sharp",), {})
    assert len(set(lists.trendings)) == len(lists.trendings) == 72
    for phrase in ("Artstation", "trending on pixiv", "featured on cg society", "zbrush central contest winner"):
        assert phrase in lists.trendings
    write(tmp_path / PACKAGE / "data", trendings="on Flickr")
    assert read_lists(None).trendings == ("on Flickr",)


@pytest.mark.parametrize("found", [None, SimpleNamespace(submodule_search_locations=["nowhere"])])
def test_no_package(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="pip install --no-deps clip-interrogator, or give a folder"):
        read_lists(None)


def test_the_package_s_lists() -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("the lists of clip-interrogator are not installed (pip install --no-deps clip-interrogator)")
    lists = read_lists(None)
    assert len(lists.artists) == len(set(lists.artists)) == 2 * 5265
    assert (len(lists.flavors), len(set(lists.flavors))) == (100_969, 100_954), "one line of the file is empty"
    assert (len(lists.mediums), len(lists.movements), len(lists.negative)) == (95, 200, 41)
    assert (len(lists.trendings), lists.own) == (72, {})


# ---------------------------------------------------------------------------------------- a real CLIP, CLIP's own words
@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> TwoTowers:
    """Random weights, 77 tokens, and the tokens of OpenAI's CLIP."""
    spec = importlib.util.find_spec("clip")
    assert spec
    assert spec.origin
    lines = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges: Any = [tuple(line.split()) for line in lines.splitlines()[1 : 49152 - 256 - 2 + 1]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words: Any = hf.CLIPTokenizer({token: i for i, token in enumerate([*tokens, *ends])}, merges)
    torch.manual_seed(0)
    body = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**body, "vocab_size": len(tokens) + 2, "bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1}
    eye = {**body, "image_size": SIDE, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=eye, projection_dim=12))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.3)
    side = {"height": SIDE, "width": SIDE}
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    hf.CLIPProcessor(pictures, words).save_pretrained(folder)
    return TwoTowers(str(folder))


WORDS: list[str] = [
    "dog", "cat", "tree", "house", "river", "cloud", "stone", "glass", "paper", "light", "dark", "red", "green",
    "blue", "gold", "silver", "bright", "soft", "sharp", "old", "new", "small", "big", "round", "flat", "wild",
    "calm", "warm", "cold", "deep", "high", "low", "long", "short", "thin", "thick", "clean", "rough", "smooth",
    "sweet", "night", "day", "sun", "moon", "star", "sky", "sea", "fire", "rain", "snow", "wind",
]  # fmt: skip


def scenes(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(some) for some in pixels]


def lists_of_words() -> Lists:
    words = tuple(WORDS)
    return Lists(
        artists=tuple(f"by {word}" for word in words[:5]), flavors=words[5:21], mediums=words[21:25],
        movements=words[25:29], trendings=words[29:33], negative=words[33:37], own={"more": words[37:42]},
    )  # fmt: skip


@pytest.mark.parametrize(("caption", "parts", "tokens"), [("dog", 37, 77), ("a dog", 36, 76), ("a dog, a cat", 35, 77)])
def test_cut_at_the_token_limit(clip: TwoTowers, caption: str, parts: int, tokens: int) -> None:
    """Every word and every comma is a token; 77 with the two at the ends may be read, and 76 + ', ' + word may not."""
    (whole,) = Interrogator(clip, Lists(flavors=tuple(WORDS[2:]))).prompts(scenes(1), [caption], "fast", 50)
    assert clip.processor.tokenizer.model_max_length > 77, "the limit is the tower's own"
    assert len(clip.processor(text=[whole])["input_ids"][0]) == tokens
    assert whole.startswith(f"{caption}, ")
    flavors = whole.removeprefix(f"{caption}, ").split(", ")
    assert len(flavors) == parts
    assert flavors == PhraseBank(WORDS[2:], clip).nearest(clip.pictures(scenes(1)), parts)[0]


def test_a_caption_that_is_too_long(clip: TwoTowers) -> None:
    room = Interrogator(clip, Lists(flavors=("blue",), mediums=("a photo",), negative=("bad",)))
    endless = " ".join(["dog"] * 80)
    for mode in ("classic", "classic_lite", "fast", "best"):
        assert room.prompts(scenes(1), [endless], mode) == [endless], "no part of it could be cut"
        (prompt,) = room.prompts(scenes(1), [f"a cat, {endless}, a dog"], mode)
        assert prompt.startswith("a cat")
        assert "dog" not in prompt


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_as_one_by_one(clip: TwoTowers, mode: str) -> None:
    pictures, captions = scenes(4), ["a dog", "a river, old", "cloud", "a big house"]
    lists = lists_of_words()
    found = Interrogator(clip, lists).prompts(pictures, captions, mode, 6)
    room = Interrogator(clip, lists)
    alone = [room.prompts([p], [c], mode, 6)[0] for p, c in zip(pictures, captions, strict=True)]
    assert found == alone
    assert len(set(found)) > 1
    assert Interrogator(clip, lists).prompts(pictures, captions, mode, 6) == found, "the same twice"


def greedy(clip: TwoTowers, picture: Image.Image, start: list[str], phrases: list[str], most: int, sign: int) -> str:
    """The chain, told as simply as may be."""
    eye = clip.pictures([picture])[0]
    now, met, left = list(start), [], list(phrases)
    while left and len(now) - len(start) < most:
        scored = [(sign * float(clip.texts([", ".join([*now, phrase])])[0] @ eye), phrase) for phrase in left]
        score, phrase = max(scored)
        if len(now) - len(start) >= 8 and score <= met[-1][0]:
            break
        now.append(phrase)
        left.remove(phrase)
        met.append((score, ", ".join(now)))
    if start:
        met.append((sign * float(clip.texts([", ".join(start)])[0] @ eye), ", ".join(start)))
    return max(met)[1]


def test_chains(clip: TwoTowers) -> None:
    flavors, negative = WORDS[:14], WORDS[14:18]
    room = Interrogator(clip, Lists(flavors=tuple(flavors), negative=tuple(negative)))
    low = room.prompts(scenes(3), [""] * 3, "negative", 12)
    assert low == [greedy(clip, picture, [], flavors + negative, 12, -1) for picture in scenes(3)]
    chains = [greedy(clip, picture, ["a moon"], flavors, 12, 1) for picture in scenes(3)]
    best = room.prompts(scenes(3), ["a moon"] * 3, "best", 12)
    eyes = clip.pictures(scenes(3))
    for prompt, chain, eye in zip(best, chains, eyes, strict=True):
        high, reached = clip.texts([prompt, chain]) @ eye
        assert prompt == chain or high > reached
    assert any(prompt == chain for prompt, chain in zip(best, chains, strict=True))


def test_best_is_never_less_than_its_candidates(clip: TwoTowers) -> None:
    pictures, captions = scenes(6), ["a dog", "river", "cloud", "a big house", "moon", "a calm sea"]
    room, eyes = Interrogator(clip, lists_of_words()), clip.pictures(scenes(6))
    cosines = {
        mode: (clip.texts(room.prompts(pictures, captions, mode, 6)) * eyes).sum(1)
        for mode in ("best", "classic", "fast")
    }
    others = np.stack([(clip.texts(captions) * eyes).sum(1), cosines["classic"], cosines["fast"]])
    assert (cosines["best"] >= others.max(0) - 1e-5).all()
    assert (cosines["best"] > others.max(0) + 1e-3).any(), "the chain finds more"


def test_nothing_is_longer_than_the_tower_reads(tmp_path: Path) -> None:
    """A tower of twelve tokens, ten without those at the ends: the chains stop, too."""
    clip = TwoTowers(save_clip(tmp_path))
    room = Interrogator(clip, Lists(flavors=("red", "blue dog", "it runs", "no", "yes"), negative=("what is it ?",)))
    for mode in MODES:
        for prompt in room.prompts(scenes(3), ["a dog"] * 3, mode, 5):
            assert len(clip.processor(text=[prompt])["input_ids"][0]) <= 12
            assert ", " in prompt or mode in ("best", "negative")
