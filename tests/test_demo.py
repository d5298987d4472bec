"""The web page, in a real browser, with a real server and a small real model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from paging import ROOT, Visitor, page_of
from PIL import Image
from test_dense import BOXES, SIZE, checkpoint, saved_png
from tiny import byte_tokenizer, config

from git_model.batch import Region, Target
from git_model.checkpoint import save_checkpoint
from git_model.datasets.collate import Collator, Loaded
from git_model.datasets.images import Transform
from git_model.errors import UserError
from git_model.models.build import build_model
from git_model.tasks.captioner import open_captioner
from git_model.tasks.picture import COLOURS
from git_model.tasks.registry import run
from git_model.tasks.session import MAX_PICTURES, Picture, Session, Turn, without_folders
from git_model.tasks.speaker import MAX_PROMPT, Settings, Speaker, kept_turns

pytest.importorskip("gradio", reason="the page's extra is not installed")

HTML = "<img src=x onerror=hit()>"
ASKED = "is <b id=bold>${1+1}</b> it?"
NEW = 6  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("secret_place"), "roi")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_png(tmp_path_factory.mktemp("photos") / "a.png")


@pytest.fixture(scope="module")
def address(model: str, photo: str) -> Iterator[str]:
    with page_of(model_path=model, max_new_tokens=NEW, examples=[photo]) as found:
        yield found


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def come(where: str = address, **screen: Any) -> Visitor:
        visitors.append(Visitor(browser, where, **screen))
        return visitors[-1]

    yield come
    for visitor in visitors:
        assert not visitor.foreign, "the page asks nothing of other machines"
        assert not visitor.broken
        visitor.context.close()


def say(model: str, picture: Any, **keys: Any) -> str:
    task = {"type": "test_git_inference_single_image", "model_path": model, "image_path": picture}
    return run({**task, "max_new_tokens": NEW, **keys})["text"]


# ---------------------------------------------------------------------------------------------------------- describing
def test_two_clicks_describe_a_box(visit: Callable[..., Visitor], model: str, photo: str) -> None:
    visitor = visit()
    visitor.upload(photo)
    visitor.says("message", "click at two corners")
    plain = np.asarray(visitor.shown()).astype(int)
    told = visitor.box(BOXES[0])
    assert told["text"] == say(model, photo, bbox=told["boxes"][0])
    assert visitor.says("answer").split() == told["text"].split(), "a text field changes line ends only"
    assert told["model"] == "model.pt"
    assert told["settings"] == {"beams": 1, "sample": False, "max_new_tokens": NEW}
    drawn = np.asarray(visitor.shown()).astype(int)
    scale = drawn.shape[1] / SIZE[0]
    assert scale == 5, "small pictures are enlarged, to aim at"
    rows, columns = np.nonzero((drawn != plain).any(axis=2))
    corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
    assert np.abs(corners - told["boxes"][0]).max() * scale <= 2
    left, top, right, bottom = (int(value * scale) for value in told["boxes"][0])
    colour = np.array([int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    for edge in (drawn[top, left:right], drawn[bottom - 1, left:right], drawn[top:bottom, left]):
        assert (edge == colour).all()
    assert (
        drawn[top + 9 : bottom - 9, left + 9 : right - 9] == plain[top + 9 : bottom - 9, left + 9 : right - 9]
    ).all()
    other = visitor.box(BOXES[1])
    assert other["text"] == say(model, photo, bbox=other["boxes"][0]), "the next click starts anew"


def test_whole_pictures_typed_corners_and_examples(visit: Callable[..., Visitor], model: str, photo: str) -> None:
    visitor = visit()
    visitor.page.locator("#describe").click()
    visitor.says("message", "no picture yet")
    visitor.page.locator("#examples button img").first.click()
    visitor.says("message", "click at two corners")
    visitor.page.locator("#describe").click()
    assert visitor.record()["text"] == say(model, photo)
    visitor.page.locator("#left input").fill("40")
    visitor.page.locator("#describe").click()
    visitor.says("record", r'"boxes": \[\s+\[\s+40')
    assert visitor.record()["boxes"] == [[40, 0, *SIZE]], "-1 is that side of the picture"
    assert visitor.record()["text"] == say(model, photo, bbox=[40, -1, -1, -1])
    visitor.page.locator("#left input").fill("91")
    visitor.page.locator("#describe").click()
    visitor.says("message", "box_outside.*of 90x60")
    visitor.page.locator("#restart").click()
    visitor.says("message", "Upload a picture")
    assert visitor.says("answer") == visitor.says("record") == ""
    assert visitor.page.locator("#picture img").count() == 0


# ----------------------------------------------------------------------------------------------------------- questions
def test_a_dialogue_about_several_pictures(
    visit: Callable[..., Visitor], model: str, photo: str, tmp_path: Path
) -> None:
    second = saved_png(tmp_path / "b.png", 1)
    visitor = visit()
    visitor.page.get_by_label("Question", exact=True).check()
    question = visitor.page.locator("#question textarea, #question input").first
    visitor.upload(photo)
    visitor.says("message", "Ask about the picture")
    visitor.click(*BOXES[0][:2])
    visitor.says("message", "First corner")
    visitor.click(*BOXES[0][2:])
    visitor.says("bottom", "^(39|40|41)$")
    visitor.upload(second)
    visitor.says("message", "Ask about the 2 pictures")
    question.fill("which?")
    question.press("Enter")
    first = visitor.record()
    assert first["prompt"] == "[IMG] [IMG] which?"
    assert np.abs(np.array(first["boxes"][0]) - BOXES[0]).max() <= 1
    assert first["boxes"][1] is None
    said = say(model, [photo, second], bbox=first["boxes"], prompt="[IMG] [IMG] which?")
    assert first["text"] == said
    assert visitor.says("question") == ""
    question.fill("and now?")
    question.press("Enter")
    visitor.says("record", "and now")
    history = [["[IMG] [IMG] which?", said]]
    again = say(model, [photo, second], bbox=first["boxes"], history=history, prompt="and now?")
    assert visitor.record()["text"] == again
    told = visitor.says("dialogue")
    assert told.count("Question: ") == 2
    question.fill("look [IMG] here")
    question.press("Enter")
    visitor.says("message", r"1 \[IMG\] slots for 0 new")
    assert visitor.says("question") == "look [IMG] here", "a refused question can be mended"


# -------------------------------------------------------------------------------------------------------------- guards
def test_bad_uploads_leave_the_page_usable(visit: Callable[..., Visitor], model: str, photo: str) -> None:
    visitor = visit()
    visitor.upload({"name": "a.png", "mimeType": "image/png", "buffer": b"not a picture at all"})
    visitor.says("message", "no usable picture: not_image:text")
    visitor.upload({"name": "big.png", "mimeType": "image/png", "buffer": bytes(11 * 2**20)})
    toast = visitor.page.locator(".toast-body").first
    toast.wait_for()
    assert "10" in toast.inner_text()
    visitor.upload(photo)
    visitor.says("message", "click at two corners")
    told = visitor.box(BOXES[2])
    assert told["text"] == say(model, photo, bbox=told["boxes"][0])


def test_the_server_itself_refuses(address: str, model: str) -> None:
    large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(11 * 2**20))}, timeout=20)
    assert large.status_code == 413
    for path in (model, str(ROOT / "pyproject.toml"), "/etc/passwd", "../pyproject.toml"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)
    assert httpx.get(address, headers={"Host": "elsewhere.example"}).status_code == 403, "a name pointed here"
    answer = httpx.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert Path(model).parent.name not in answer.text, "no path of the server"
    assert "secret_place" not in httpx.get(f"{address}/config").text


def test_only_this_machine_is_listened_to(address: str) -> None:
    port = f"{int(address.rpartition(':')[2]):04X}"
    found = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        found += [row[1].rpartition(":")[0] for row in rows if row[1].endswith(f":{port}") and row[3] == "0A"]
    if not found:
        pytest.skip("this system does not tell who listens")
    assert found == ["0100007F"]


def test_two_visitors_at_once(visit: Callable[..., Visitor], model: str, photo: str, tmp_path: Path) -> None:
    second = saved_png(tmp_path / "b.png", 1)
    one, two = visit(), visit()
    one.upload(photo)
    two.upload(second)
    for visitor in (one, two):
        visitor.says("message", "click at two corners")
    for box in BOXES[:2]:
        for visitor in (one, two):
            visitor.click(*box[:2])
        for visitor in (one, two):
            visitor.says("message", "First corner")
        for visitor in (one, two):
            visitor.click(*box[2:])
        for visitor, path in ((one, photo), (two, second)):
            told = visitor.record()
            assert told["text"] == say(model, path, bbox=told["boxes"][0])
    stranger = visit()
    assert stranger.says("answer") == ""
    assert stranger.page.locator("#picture img").count() == 0


def test_a_telephone(visit: Callable[..., Visitor], photo: str) -> None:
    visitor = visit(viewport={"width": 375, "height": 700}, is_mobile=True, has_touch=True)
    visitor.upload(photo)
    visitor.says("message", "click at two corners")
    visitor.box(BOXES[1])
    for mode in ("Describe", "Question"):
        visitor.page.get_by_label(mode, exact=True).check()
        visitor.page.wait_for_timeout(300)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 375


# ------------------------------------------------------------------------------------------- pages in this process
@pytest.fixture
def opened_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    from git_model.tasks.captioner import open_captioner
    from git_model.tasks.demo import free_port
    from git_model.tasks.page import Page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    pages = []

    def start(path: str) -> str:
        pages.append(Page(Speaker(open_captioner(path, {}, "cpu"), path), [], 5, 40))
        return pages[-1].launch("127.0.0.1", free_port("127.0.0.1", 0), False, 20).rstrip("/")

    yield start
    for page in pages:
        page.close()


def test_html_stays_text(
    visit: Callable[..., Visitor], opened_page: Callable[[str], str], photo: str, tmp_path: Path
) -> None:
    """A model that has learnt to say HTML, asked with HTML."""
    settings = config(region={"mode": "roi", "width": 32, "heads": 4}, data={"max_text_tokens": 60})
    torch.manual_seed(0)
    model = build_model(settings, byte_tokenizer())
    image = Transform(model.vision.resolution)(Path(photo).read_bytes())
    targets = tuple(Target(HTML, prompt=prompt, regions=(Region(0),)) for prompt in ("", f"[IMG] {ASKED}"))
    batch = Collator(model.codec, model.num_image_tokens, regions=True)([Loaded("", (image,), targets)])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    save_checkpoint(tmp_path / "m.pt", model.eval(), settings, step=1, epoch=0)
    visitor = visit(opened_page(str(tmp_path / "m.pt")))
    visitor.upload(photo)
    visitor.says("message", "click at two corners")
    visitor.page.locator("#describe").click()
    assert visitor.record()["text"] == HTML
    visitor.page.get_by_label("Question", exact=True).check()
    visitor.says("record", "^$")
    visitor.upload(photo)
    visitor.says("message", "Ask about")
    question = visitor.page.locator("#question textarea, #question input").first
    question.fill(ASKED)
    question.press("Enter")
    assert visitor.says("answer", "^<img") == HTML
    assert visitor.says("dialogue") == f"Question: [IMG] {ASKED}\nAnswer: {HTML}"
    assert visitor.page.locator("img[src=x], [onerror], #bold").count() == 0


def test_a_model_of_whole_pictures(
    visit: Callable[..., Visitor], opened_page: Callable[[str], str], photo: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, "none")
    visitor = visit(opened_page(path))
    assert "without boxes" in visitor.page.inner_text("body")
    visitor.upload(photo)
    visitor.says("message", "Describe the whole picture")
    visitor.click(5, 20)
    visitor.page.wait_for_timeout(500)
    assert visitor.says("left") == "-1"
    assert visitor.page.locator("#left input").is_disabled()
    visitor.page.locator("#describe").click()
    assert visitor.record()["text"] == say(path, photo, max_new_tokens=40)


# ------------------------------------------------------------------------------------------------- without a browser
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((6, False, 1.0, 5), "beams must be a whole number from 1 to 5, got 6"),
        ((0, False, 1.0, 5), "beams"),
        ((1.5, False, 1.0, 5), "beams"),
        ((1, "perhaps", 1.0, 5), "sampling must be true or false"),
        ((1, True, 2.5, 5), r"temperature must be .* from 0.1 to 2, got 2.5"),
        ((1, True, 0.0, 5), "temperature"),
        ((1, True, 1.0, 101), "new tokens must be a whole number from 1 to 100, got 101"),
        ((1, True, float("nan"), 5), "temperature"),
    ],
)
def test_values_out_of_range(given: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Settings.checked(given, 5, 100)


def test_settings() -> None:
    drawn = Settings.checked((2.0, True, 0.7, 9), 5, 100)
    assert (drawn.beams, drawn.temperature, drawn.max_new_tokens) == (2, 0.7, 9)
    assert drawn.decoding().seed == drawn.seed
    assert Settings.checked((2, True, 0.7, 9), 5, 100).seed != drawn.seed, "drawn anew each time"
    assert Settings.checked((1, False, 0.7, 9), 5, 100).decoding().temperature == 1


def test_limits_of_a_session(model: str, photo: str) -> None:
    speaker = Speaker(open_captioner(model, {}, "cpu"), model)
    how = Settings(1, False, 1.0, 4)
    data = Path(photo).read_bytes()
    asking = Session().restarted("Question")
    with pytest.raises(UserError, match=f"{MAX_PICTURES + 1} pictures for one question; at most {MAX_PICTURES}"):
        asking.uploaded([data] * (MAX_PICTURES + 1))
    with pytest.raises(UserError, match="10485761 bytes; at most 10485760"):
        asking.uploaded([bytes(10 * 2**20 + 1)])
    with pytest.raises(UserError, match="unknown mode 'Q'"):
        asking.restarted("Q")
    one = asking.uploaded([data])
    with pytest.raises(UserError, match=f"at most {MAX_PROMPT}"):
        speaker.asked(one, "x" * (MAX_PROMPT + 1), how)
    with pytest.raises(UserError, match="the question is empty"):
        speaker.asked(one, " ", how)
    with pytest.raises(UserError, match="no picture 3; there are 1"):
        one.picked(2)
    with pytest.raises(UserError, match="box_empty"):
        one.clicked(0, 0).clicked(0, 0)
    for _ in range(9):  # longer than the model holds: the oldest turns make room, each with its picture
        one = speaker.asked(one, "what?", how).uploaded([data])
    assert len(one.turns) == 9


def test_visitors_that_are_answered_at_the_same_time_get_their_own_answers(model: str, tmp_path: Path) -> None:
    """Gradio lets one in at a time; the model itself keeps nothing of anybody either."""
    speaker, how = Speaker(open_captioner(model, {}, "cpu"), model), Settings.checked((1, False, 1.0, NEW), 5, 100)
    files = [Path(saved_png(tmp_path / f"{seed}.png", seed)).read_bytes() for seed in range(2)]
    waiting = [Session().uploaded([data]).boxed(box) for data in files for box in BOXES]
    alone = [speaker.described(session, "", how).answer for session in waiting]
    assert len(set(alone)) > 2
    order = [number % len(waiting) for number in range(200)]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda number: speaker.described(waiting[number], "", how).answer, order))
    assert said == [alone[number] for number in order]


def test_what_a_session_forgets_and_hides() -> None:
    picture = Picture(bytes(30 * 2**20), (1, 1), Image.new("RGB", (1, 1)))
    turns = [Turn(str(number), "", (picture,)) for number in range(5)]
    assert [turn.question for turn in kept_turns(turns)] == ["3", "4"]
    large = Turn("all", "", (picture,) * 3)
    assert kept_turns([*turns, large]) == (large,), "the newest stays"
    told = "'/tmp/secret place/m.pt' and /a/b.c: no; http://x/y, a/b and 3/4"
    assert without_folders(told) == "'/tmp/secret place/m.pt' and b.c: no; http://x/y, a/b and 3/4".replace(
        "/tmp/secret", "secret"
    )


def test_a_taken_port_and_a_wrong_example(model: str, photo: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on host '127.0.0.1', port {port}"):
            run({"type": "demo", "model_path": model, "port": port})
    (tmp_path / "t.png").write_text("text")
    with pytest.raises(UserError, match=r"examples: .*t\.png: this is no usable picture: not_image:text"):
        run({"type": "demo", "model_path": model, "examples": [photo, str(tmp_path / "t.png")]})


def test_without_gradio_at_once(model: str) -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; import inference;"
        f"code = inference.main(['-p', '{{type: demo, model_path: {model}}}']);"
        "print(code, 'torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5, "a busy machine's second"
    assert done.stdout.split() == ["2", "False"]
    assert "pip install 'generative-image-to-text[demo]'" in done.stderr
