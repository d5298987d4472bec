"""Paragraphs: the template on any boxes, the rules, a real HTTP endpoint, the second try and the way back."""

from __future__ import annotations

import http.server
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving

from git_model.errors import UserError
from git_model.tasks.levels import PLACES, Levels, Thing, place_of, spelt
from git_model.tasks.writers import (
    MOST_SENTENCES,
    PROMPT,
    RULES,
    SENTENCE_END,
    Endpoint,
    broken_rules,
    compose,
    prompt_of,
    template,
)

pytest.importorskip("openai", reason="the package openai is not installed")

SCENE = Levels(
    (90, 60),
    "three shapes",
    (Thing((0, 0, 20, 20), "a large red circle"), Thing((40, 25, 50, 35), "a blue star")),
    (Thing((0, 0, 20, 20), "a circle"),),
)
GOOD = "A large red circle is at the top left. In the middle there is a blue star."


# --------------------------------------------------------------------------------------------------------- by template
boxes = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 1)).map(
    lambda v: (v[0] * 0.99, v[1] * 0.99, min(1.0, v[0] * 0.99 + v[2]), min(1.0, v[1] * 0.99 + v[3]))
)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40) | st.sampled_from(
    [
        "2 dogs (one asleep)",
        "a man. A plan! A canal?",
        "no. 7 [blurred]",
        "a large red circle",
        "",
        "1,000.5 bees; 21 wasps",
    ]
)


@settings(max_examples=1000, deadline=None)
@given(
    things=st.lists(st.tuples(boxes, words), max_size=30),
    caption=words,
    size=st.tuples(st.integers(16, 4000), st.integers(16, 4000)),
)
def test_the_template_keeps_the_rules(things: list[Any], caption: str, size: tuple[int, int]) -> None:
    width, height = size
    told = tuple(Thing((b[0] * width, b[1] * height, b[2] * width, b[3] * height), text) for b, text in things)
    levels = Levels(size, caption, told)
    text = template(levels)
    assert template(levels) == text
    assert "\n" not in text
    assert not any(c.isdecimal() or c in "[](){}" for c in text)
    sentences = [s.strip() for s in SENTENCE_END.split(text) if s.strip()]
    assert len(sentences) <= MOST_SENTENCES
    for thing in told:
        said = spelt(thing.text)
        if said:
            mine = [
                s for s in sentences if said.casefold() in s.casefold() and place_of(thing.box, size) in s.casefold()
            ]
            assert mine, f"{said!r} is {place_of(thing.box, size)}"
    if text:
        assert not broken_rules(text, levels)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (640, 480), (4000, 3000)])
def test_places_are_those_of_the_scene_at_any_resolution(size: tuple[int, int]) -> None:
    width, height = size
    for row in range(3):
        for column in range(3):
            box = (width * column / 3, height * row / 3, width * (column + 1) / 3, height * (row + 1) / 3)
            assert place_of(box, size) == PLACES[row][column]
    assert place_of((0, 0, width, height), size) == "in the middle"


def test_the_largest_first_and_places_together() -> None:
    things = (
        Thing((0, 0, 9, 9), "a small cat"),
        Thing((0, 40, 30, 60), "a dog"),
        Thing((0, 0, 20, 20), "a tree"),
        Thing((0, 0, 9, 9), "a small cat"),
    )
    assert template(Levels((90, 60), "2 animals", things)) == (
        "Two animals. A dog is at the bottom left. A tree and a small cat are at the top left."
    )
    assert template(Levels((90, 60), "", (), things[:1])) == "A small cat is at the top left."
    assert template(Levels((90, 60), "", ())) == ""


# -------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD, ""),
        ("", "it is empty"),
        (GOOD.replace(". ", ".\n"), "more than one paragraph"),
        (GOOD + " So." * 6, "8 sentences, more than seven"),
        (GOOD + " It has 2 shapes.", "digits"),
        (GOOD + " (Really.)", "brackets"),
        ("A large red circle is at the top left. There is a blue star.", "where 'a blue star' is"),
        ("A large red circle is at the top left.", "where 'a blue star' is"),
    ],
)
def test_rules(text: str, told: str) -> None:
    broken = broken_rules(text, SCENE)
    assert (told in "; ".join(broken)) if told else not broken


def test_objects_of_one_kind_are_told_apart() -> None:
    two = (Thing((0, 0, 9, 9), "a red circle"), Thing((40, 0, 49, 9), "a blue circle"), Thing((0, 0, 9, 9), "a bus"))
    levels = Levels((90, 60), "", two)
    assert broken_rules("A circle is at the top left, a bus on the right.", levels) == [
        "it does not say where 'a blue circle' is",
        "it does not say where 'a red circle' is",
    ]
    assert not broken_rules(
        "A red circle and a blue circle are at the top. The bus is in the upper left corner.", levels
    )
    assert broken_rules("The right answer is a bus.", Levels((9, 9), "", two[2:]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the 1st car of 3", "the first car of three"),
        ("a 1990s car", "a car"),
        ("a 3D print", "a print"),
        ("bus with number 52", "bus with number fifty-two"),
        ("120 bees, 0 wasps, 300 ants", "one hundred twenty bees, zero wasps, three hundred ants"),
        ("1,000 birds (2)", "birds two"),
    ],
)
def test_numbers_in_words(text: str, said: str) -> None:
    assert spelt(text) == said


def test_what_is_asked() -> None:
    asked = prompt_of(SCENE)
    assert "a. Resolution: 90x60" in asked
    assert "b. Caption: three shapes" in asked
    assert "c. Dense captions: a large red circle: [0, 0, 20, 20]; a blue star: [40, 25, 50, 35]" in asked
    assert "d. Region semantics: a circle: [0, 0, 20, 20]" in asked
    assert RULES in asked
    assert prompt_of(SCENE, "{caption} {unknown} {", "Dutch") == "three shapes {unknown} {"
    assert prompt_of(SCENE, "auf {language}", "Deutsch").endswith("auf Deutsch")
    sly = Levels((9, 9), "{rules}", ())
    assert prompt_of(sly, "{caption}") == "{rules}", "what a picture says is data"


def test_the_second_try_and_then_the_template(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def writer(texts: list[str]) -> Callable[..., str]:
        left = iter(texts)

        def write(levels: Levels, picture: Any, wrong: str) -> str:
            asked.append(wrong)
            return next(left)

        return write

    assert compose(SCENE, None, "w", writer([GOOD])).writer == "w"
    second = compose(SCENE, None, "w", writer(["It has 2 stars.", GOOD]))
    assert (second.text, second.writer, second.why) == (GOOD, "w", "")
    assert "digits" in asked[-1]
    third = compose(SCENE, None, "w", writer(["It has 2 stars.", "So [it] is."]))
    assert (third.text, third.writer) == (template(SCENE), "template")
    assert "brackets" in third.why
    assert "the template writes" in caplog.text
    assert compose(SCENE, None, "template", template).why == ""


# ------------------------------------------------------------------------------------------------------ a real endpoint
class Provider(http.server.BaseHTTPRequestHandler):
    """Answers as it is told to, and keeps what it was sent."""

    answers: list[Any]
    seen: list[tuple[str, dict[str, str], Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        answer = self.answers.pop(0)
        if answer == "late":
            time.sleep(1.5)
            answer = 500
        status, told = (
            (answer, {"error": {"message": "KEY-ECHO secret-key"}}) if isinstance(answer, int) else (200, answer)
        )
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def said(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }  # fmt: skip


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Provider], str]]:
    monkeypatch.setenv("SOME_KEY", "secret-key")
    handler = type("Handler", (Provider,), {"answers": [], "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with serving(server):
        yield handler, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.server_close()


def endpoint(url: str, timeout: float = 5, retries: int = 2) -> Endpoint:
    return Endpoint(url, "some-model", "SOME_KEY", timeout, retries, PROMPT, "English")


def test_the_request(provider: tuple[type[Provider], str]) -> None:
    handler, url = provider
    handler.answers += [said(GOOD)]
    assert compose(SCENE, None, "openai", endpoint(url)).text == GOOD
    ((path, headers, body),) = handler.seen
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-key"
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": prompt_of(SCENE)}]}


def test_errors_that_pass(provider: tuple[type[Provider], str], caplog: pytest.LogCaptureFixture) -> None:
    handler, url = provider
    handler.answers += [500, 429, said("It has 2 stars."), said(GOOD)]
    with caplog.at_level(logging.DEBUG):
        found = compose(SCENE, None, "openai", endpoint(url))
    assert (found.text, found.writer) == (GOOD, "openai")
    assert len(handler.seen) == 4
    assert "The paragraph before was wrong: it has digits; it does" in handler.seen[-1][2]["messages"][0]["content"]
    assert "secret-key" not in caplog.text


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (["late"] * 2, "APITimeoutError"),
        ([500, 500], "InternalServerError 500"),
        ([said(None), said("")], "it is empty"),
        ([{"choices": []}], "IndexError|TypeError"),
        ([b"<html>"], "Error"),
    ],
)
def test_errors_that_do_not(
    provider: tuple[type[Provider], str], caplog: pytest.LogCaptureFixture, answers: list[Any], why: str
) -> None:
    handler, url = provider
    handler.answers += answers
    found = compose(SCENE, None, "openai", endpoint(url, timeout=0.3 if answers[0] == "late" else 5, retries=1))
    assert (found.text, found.writer) == (template(SCENE), "template")
    assert re.search(why, found.why)
    assert "the template writes" in caplog.text
    assert "secret-key" not in caplog.text + found.why


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_the_users_to_mend(provider: tuple[type[Provider], str], status: int) -> None:
    handler, url = provider
    handler.answers += [status]
    with pytest.raises(UserError, match=f"refuses the key of SOME_KEY .status {status}"):
        compose(SCENE, None, "openai", endpoint(url))


def test_another_language(provider: tuple[type[Provider], str]) -> None:
    handler, url = provider
    german = "Oben links steht ein grosser roter Kreis, in der Mitte ein blauer Stern."
    handler.answers += [said(german)]
    writer = Endpoint(url, "m", "SOME_KEY", 5, 0, PROMPT, "German")
    assert compose(SCENE, None, "openai", writer, "German").text == german
    assert "Answer in German." in handler.seen[0][2]["messages"][0]["content"]
    assert broken_rules("Eins. " * 8, SCENE, "German") == ["it has 8 sentences, more than seven"]


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "k")
    assert (
        compose(SCENE, None, "openai", endpoint("http://127.0.0.1:9/v1", retries=0)).why
        == "APIConnectionError of http://127.0.0.1:9/v1"
    )
    monkeypatch.delenv("SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "k")
    with pytest.raises(UserError, match="base_url 'http://a:b' is no address"):
        endpoint("http://a:b")
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match="SOME_KEY is not set"):
        endpoint("https://api.openai.com/v1")
    with pytest.raises(UserError, match="begins with http"):
        endpoint("127.0.0.1:9")
    lost = endpoint("http://127.0.0.1:9/v1", retries=0)  # which needs no key
    for _ in range(4):
        assert compose(SCENE, None, "openai", lost).writer == "template"
    with pytest.raises(UserError, match="5 times in a row: is it there"):
        compose(SCENE, None, "openai", lost)
