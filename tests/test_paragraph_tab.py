"""The page's tab of paragraphs, in a real browser: a picture told, its regions lit, pictures found by a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paging import Visitor, page_of
from test_dense import checkpoint, saved_png, scene

from git_model.errors import UserError
from git_model.tasks.levels import Levels, Thing
from git_model.tasks.registry import run
from git_model.tasks.writers import Paragraph

pytest.importorskip("gradio", reason="the page's extra is not installed")

from git_model.tasks.paragraph_tab import highlighted, marked
from git_model.tasks.teller import Told

KEYS: dict[str, Any] = {"top_k": 4, "largest": 1, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("models"), "roi")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery") / "pictures"
    folder.mkdir()
    for seed in range(8):
        saved_png(folder / f"p{seed}.png", seed)
    (folder / "broken.png").write_text("none")
    return folder


@pytest.fixture(scope="module")
def address(browser: Any, model: str, gallery: Path, minilm: str) -> Iterator[str]:
    where = {"gallery": str(gallery), "gallery_tsv": str(gallery.parent / "said.tsv"), "text_encoder": minilm}
    with page_of(model_path=model, **where, **KEYS) as found:
        yield found


def test_a_picture_is_told_and_found_again(browser: Any, address: str, model: str, gallery: Path) -> None:
    visitor = Visitor(browser, address)
    page = visitor.page
    page.get_by_role("tab", name="Paragraph").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#tell").click()
    chooser.value.set_files(str(gallery / "p3.png"))
    text = visitor.says("paragraph", ".")
    expected = run({"type": "image_to_paragraph", "model_path": model, "image_path": gallery / "p3.png", **KEYS})
    assert text == expected["paragraph"]
    page.get_by_role("button", name="All that is known as JSON").click()
    told = json.loads(visitor.says("levels", "."))
    assert told["regions"] == expected["regions"]
    marks = page.locator("#told mark")
    assert marks.count() > 0
    first = int(marks.first.get_attribute("class").split()[0][1:])
    box = page.locator(f"#told rect.r{first}")
    assert box.evaluate("e => getComputedStyle(e).stroke") == "rgba(0, 0, 0, 0)"
    marks.first.hover()
    assert box.evaluate("e => getComputedStyle(e).stroke") == "rgb(230, 25, 75)"
    drawn = {name: float(box.get_attribute(name)) for name in ("x", "y", "width", "height")}
    left, top, right, bottom = told["regions"][first]["rect"]
    assert drawn == {"x": left, "y": top, "width": right - left, "height": bottom - top}
    page.mouse.move(0, 0)
    marks.first.focus()  # a finger, or the keyboard
    assert box.evaluate("e => getComputedStyle(e).stroke") != "rgba(0, 0, 0, 0)"

    wanted = page.locator("#wanted textarea, #wanted input").first
    assert wanted.input_value() == text, "its own paragraph is asked for"
    wanted.press("Enter")
    cards = page.locator("#gallery .found > div")
    cards.first.wait_for()
    assert cards.count() == 6
    assert "p3.png" in [cards.nth(i).locator("b").inner_text() for i in range(6)]
    assert cards.first.locator("p").nth(1).text_content() == text, "the nearest text is its own"
    with page.expect_file_chooser() as chooser:
        page.locator("#tell").click()
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    visitor.says("tell_message", "no usable picture")
    page.get_by_role("tab", name="Ask").click()
    assert page.locator("#upload").is_visible()
    assert not visitor.foreign
    assert not visitor.broken
    visitor.context.close()


def test_names_are_marked_once_and_escaped() -> None:
    assert marked("A <b> and a b.", ["a b", "none", ""]) == (
        "A &lt;b&gt; and <mark class='s0' tabindex='0'>a b</mark>."
    )
    assert marked("A cat, a cat and a catalogue.", ["a catalogue", "a cat", "A CAT"]) == (
        "<mark class='s1 s2' tabindex='0'>A cat</mark>, a cat and <mark class='s0' tabindex='0'>a catalogue</mark>."
    )
    assert marked("a red cat", ["a red cat", "red"]) == "<mark class='s0' tabindex='0'>a red cat</mark>"
    sly = Paragraph("<script>hit()</script> is in the middle.", "openai")
    told = Told(Levels((90, 60), "", (Thing((0, 0, 9, 9), "<script>"),)), sly, (None,))
    shown = highlighted(scene(), told)
    assert "<script" not in shown
    assert "&lt;/script&gt;" in shown


def test_a_file_of_paragraphs_is_used_as_it_is(gallery: Path, model: str, minilm: str, tmp_path: Path) -> None:
    from git_model.tasks.demo import _finder
    from git_model.tasks.options import ModelOptions, SearchOptions
    from git_model.tasks.teller import RegionOptions, WriterOptions

    said = tmp_path / "said.tsv"
    said.write_text('p1.png\t[{"caption": "written by hand"}]\n')
    options = (RegionOptions(), WriterOptions(), ModelOptions(model_path=model), SearchOptions())
    found = _finder(str(gallery), str(said), minilm, *options)
    assert (found.keys, found.texts) == (["p1.png"], ["written by hand"])
    assert said.read_text() == 'p1.png\t[{"caption": "written by hand"}]\n'


def test_what_does_not_fit(model: str, gallery: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gallery and gallery_tsv belong together"):
        run({"type": "demo", "model_path": model, "port": 0, "gallery": gallery})
    from git_model.tasks.paragraph_tab import Finder

    (tmp_path / "said.tsv").write_text('other.png\t[{"caption": "a dog"}]\n')
    with pytest.raises(UserError, match="tells of no picture in"):
        Finder.of_folder(gallery, tmp_path / "said.tsv", None)  # type: ignore[arg-type]
