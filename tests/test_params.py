"""The reader of -p: what is read, what is refused, and how values become the types of a signature."""

from __future__ import annotations

import math
import subprocess
import time
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from git_model.errors import UserError
from git_model.tasks.params import Scalar, parse_params, show
from git_model.tasks.registry import TASKS, resolve
from git_model.tasks.values import convert

# the documented commands of the original project, as they are typed into a shell
CAPTION = r"""python3 inference.py -p "{'type': 'test_git_inference_single_image', \
      'image_encoder_type': 'ViT-B/32', \
      'language_model': 'gpt2-large', \
      'mapping_type': 'mlp', \
      'output_grid': False, \
      'input_resolution': 224, \
      'model_path': 'checkpoints/vitb32_gpt2l/model-004.pt', \
      'image_path': 'images/cartoon.jpg', \
      'prompt': '', \
}" """
QUESTION = r"""python3 inference.py -p "{'type': 'test_git_inference_single_image', \
      'image_path': 'images/cartoon.jpg', \
      'model_path': 'checkpoints/RN50_OPT2.7B_CC3M/model_latest.pt', \
      'prompt': 'What is a dinosaur holding?', \
}" """
TSV = r"""python3 inference.py -p "{'type': 'test_git_inference_single_tsv', \
    'image_tsv': 'data/coco_caption/test.img.tsv', \
    'model_path': 'checkpoints/llama-8bit/model_lates.pt', \
    'question_tsv': null, \
    'out_tsv': 'inference/LLaMA-8bit_COCO/coco.tsv', \
}" """
COMMANDS = {
    CAPTION: {
        "image_encoder_type": "ViT-B/32",
        "language_model": "gpt2-large",
        "mapping_type": "mlp",
        "output_grid": False,
        "input_resolution": 224,
        "model_path": "checkpoints/vitb32_gpt2l/model-004.pt",
        "image_path": "images/cartoon.jpg",
        "prompt": "",
    },
    QUESTION: {
        "image_path": "images/cartoon.jpg",
        "model_path": "checkpoints/RN50_OPT2.7B_CC3M/model_latest.pt",
        "prompt": "What is a dinosaur holding?",
    },
    TSV: {
        "image_tsv": "data/coco_caption/test.img.tsv",
        "model_path": "checkpoints/llama-8bit/model_lates.pt",
        "question_tsv": None,
        "out_tsv": "inference/LLaMA-8bit_COCO/coco.tsv",
    },
}
GADGETS = """
!!python/object/apply:os.mkdir ["CANARY"]
!!python/object/apply:os.system ["touch CANARY"]
!!python/object/apply:subprocess.check_output [["touch", "CANARY"]]
!!python/object/apply:subprocess.Popen [["touch", "CANARY"]]
!!python/object/apply:builtins.open ["CANARY", "w"]
!!python/object/apply:builtins.eval ["open('CANARY', 'w')"]
!!python/object/apply:builtins.exec ["open('CANARY', 'w')"]
!!python/object/apply:runpy.run_path ["CANARY"]
!!python/object/apply:importlib.import_module ["os"]
!!python/object/new:os.system ["touch CANARY"]
!!python/object/new:type {args: ["z", !!python/tuple [], {"extend": !!python/name:exec }]}
!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval , ["open('CANARY', 'w')"]]]
!!python/object:pathlib.Path {}
!!python/name:os.system
!!python/module:os
!!python/tuple [1, 2]
!!python/bytes "YQ=="
!!python/str "text"
!!python/complex 1j
!!python/none ""
!!python/dict {a: 1}
!!binary "YQ=="
!!set {a, b}
!!omap [a: 1]
!!timestamp 2024-01-01
!!float 1
!!str text
! text
!local text
!<tag:yaml.org,2002:python/name:os.system> ""
""".strip().splitlines()
BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
REFUSED = {
    "empty": ("", "expects a mapping with 'type'"),
    "spaces": (" \n ", "expects a mapping"),
    "a list": ("[]", "expects a mapping"),
    "a number": ("1", "expects a mapping"),
    "a text": ('"x"', "expects a mapping"),
    "a tuple of lists": ("[{type: a}]", "expects a mapping"),
    "no type": ("{image_path: a}", "got only: [image_path]"),
    "duplicate": ("{type: a, b: 1, b: 2}", "key 'b' twice"),
    "duplicate, quoted": ("{type: a, b: 1, 'b': 2}", "key 'b' twice"),
    "duplicate, nested": ("{type: a, b: {c: 1, c: 2}}", "key 'c' twice"),
    "anchor": ("{type: &a b}", "anchors and aliases not allowed"),
    "anchor on a key": ("{&a type: b}", "anchors and aliases not allowed"),
    "alias": ("{type: a, b: *c}", "anchors and aliases not allowed"),
    "bomb": (BOMB, "anchors and aliases not allowed"),
    "merge key": ("{type: a, <<: {b: 1}}", "merge keys"),
    "a list as key": ("{type: a, [b]: 1}", "a key must be text"),
    "a mapping as key": ("{type: a, ? {b: 1} : 1}", "a key must be text"),
    "two documents": ("type: a\n---\ntype: b\n", "several YAML documents"),
    "yaml directive": ("%YAML 1.1\n---\ntype: a\n", "directives"),
    "tag directive": ("%TAG ! tag:x,2000:\n---\ntype: a\n", "directives"),
    "unclosed": ("{type: a", "not valid YAML at line"),
    "unclosed quote": ("{type: 'a}", "not valid YAML at line"),
    "a tab for indentation": ("type:\n\t- a", "not valid YAML"),
    "depth 17": ("{type: " + "[" * 16 + "]" * 16 + "}", "nested deeper than 16"),
    "depth 500": ("{type: " + "[" * 500 + "]" * 500 + "}", "nested deeper than 16"),
    "depth 30000, never closed": ("{a: " * 16000, "nested deeper than 16"),
    "depth in block style": ("- " * 30000, "nested deeper than 16"),
    "257 keys": ("{" + ", ".join(f"type{i}: 1" for i in range(257)) + "}", "more than 256 keys"),
    "257 keys, nested": ("{type: [" + "{a: 1}, " * 257 + "]}", "more than 256 keys"),
    "100k keys": ("{" + ", ".join(f"k{i}: 1" for i in range(100_000)) + "}", "longer than 65536 bytes"),
    "10 MB": ("{type: '" + "x" * 10_000_000 + "'}", "longer than 65536 bytes"),
    "64 KiB in bytes": ("{type: '" + "é" * 33_000 + "'}", "longer than 65536 bytes"),
    "2049 values": ("{type: [" + "a, " * 2047 + "]}", "more than 2048 values"),
    "NUL": ("{type: 'a\0'}", "U+0000"),
    "escaped NUL": ('{type: "a\\0"}', "U+0000"),
    "escaped NUL in a key": ('{type: a, "b\\0": 1}', "U+0000"),
    "leading BOM": ("\ufeff{type: a}", "U+FEFF"),
    "BOM": ("{type: a\ufeff}", "U+FEFF"),
    "lone surrogate": ("{type: a\udcff}", "U+DCFF"),
    "text reordering": ("{type: 'a\u202egpj.exe'}", "U+202E"),
    "terminal escape": ("{type: '\x1b[2J'}", "U+001B"),
    "escaped terminal escape": ('{type: "\\e[2J"}', "U+001B"),
    "no such character": ('{type: "\\U00110000"}', "not valid YAML"),
    "no such character, larger": ('{type: "\\UFFFFFFFF"}', "not valid YAML"),
    "a long list, shown in short": ("[" + f"'{'x' * 70}', " * 100 + "]", ", 'x..."),
}


@pytest.fixture(params=["libyaml", "python"])
def yaml_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML may be installed without its C part; both must refuse alike."""
    if request.param == "python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML without libyaml")


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_params(text, ["caption"])
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable(), message  # one line, nothing a terminal obeys
    assert len(message) < 300
    return message


def values(text: str) -> dict[str, Any]:
    return {key: value.text if isinstance(value, Scalar) else value for key, value in parse_params(text).items()}


@pytest.mark.parametrize(("command", "arguments"), COMMANDS.items(), ids=["caption", "question", "tsv"])
def test_documented_commands_are_read_as_typed(command: str, arguments: dict[str, Any]) -> None:
    typed = command.replace("python3 inference.py -p", "printf %s")
    by_shell = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, check=True).stdout
    assert "\n" not in by_shell
    text = command.partition("-p ")[2].strip()[1:-1]  # as single quotes hand it over: backslashes left in
    for given_text in (by_shell, text, text.replace("\\\n", "\\  \r\n"), text.replace("'", '"')):
        read = parse_params(given_text)
        kind = read.pop("type")
        assert isinstance(kind, Scalar)
        got = {k: convert(v, type(arguments[k]) | None, k) for k, v in read.items()}
        assert got == arguments
        if kind.text in TASKS:
            task, resolved = resolve({**read, "type": kind})
            assert task is TASKS[kind.text]
            plain = {name: value for name, value in resolved.items() if not is_dataclass(value)}
            for group in (value for value in resolved.values() if is_dataclass(value)):
                plain |= {name: value for name, value in vars(group).items() if name in arguments}
            assert plain == arguments


@pytest.mark.usefixtures("yaml_reader")
def test_flow_block_and_nested_values() -> None:
    assert values("type: a\nb: 'c d'\n") == {"type": "a", "b": "c d"}
    assert values('{"type": "a", "b": ""}') == {"type": "a", "b": ""}
    assert values("--- {type: no, b: 1e-5, c: 0123, d: 12:30:45, e: 2024-01-01, f: .nan, }") == {
        "type": "no", "b": "1e-5", "c": "0123", "d": "12:30:45", "e": "2024-01-01", "f": ".nan",
    }  # fmt: skip
    assert values("{type: a, b: [c, 'd']}")["b"] == [Scalar("c"), Scalar("d", plain=False)]
    assert values("{type: שלום, b: '🦖 naïve'}") == {"type": "שלום", "b": "🦖 naïve"}


@pytest.mark.usefixtures("yaml_reader")
def test_backslash_newlines_outside_quotes_only() -> None:
    assert values("{type: what's this, \\\n b: 'it''s', \\\n}") == {"type": "what's this", "b": "it's"}
    assert values('{type: "a\\\n  b", b: "c \\"\\\n d"}') == {"type": "ab", "b": 'c "d'}
    assert values("{type: 'a \\\n b'}") == {"type": "a \\ b"}
    assert values("{type: C:\\dir\\\n, \\\n b: \\}") == {"type": "C:\\dir\\", "b": "\\"}
    assert values("b: \\\ntype: C:\\dir\\\n") == {"b": "\\", "type": "C:\\dir\\"}
    assert values("{\\\ntype: [a,\\\n'b'\\\n]\\\n}")["type"] == [Scalar("a"), Scalar("b", plain=False)]


def test_the_limits_themselves_are_allowed() -> None:
    assert "type" in parse_params("{type: " + "[" * 15 + "]" * 15 + "}")
    assert len(parse_params("{type: a, " + ", ".join(f"k{i}: 1" for i in range(255)) + "}")) == 256
    assert values("{type: [" + "a, " * 2046 + "]}") == {"type": [Scalar("a")] * 2046}
    assert parse_params("{type: " + "x" * (65536 - 8) + "}")["type"] == Scalar("x" * 65528)


@pytest.mark.usefixtures("yaml_reader")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    text, expected = REFUSED[name]
    assert expected in refusal(text)


@pytest.mark.usefixtures("yaml_reader")
@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("form", ["{type: GADGET }", "{type: a, GADGET: 1}", "GADGET", "- [GADGET ]"])
def test_tags_construct_nothing(gadget: str, form: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    message = refusal(form.replace("GADGET", gadget.replace("CANARY", str(canary))))
    assert "tags not allowed" in message or (form.startswith("{type: a") and "not valid YAML" in message)
    assert not canary.exists()


def test_the_canary_sings_under_an_unsafe_loader(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    yaml.load(GADGETS[0].replace("CANARY", str(canary)), Loader=yaml.UnsafeLoader)
    assert canary.exists()


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML without libyaml is ten times slower")
def test_every_refusal_takes_less_than_50_ms() -> None:
    more = {
        "brackets": ("[]" * 32_000, ""),
        "quotes": ("{a: " + "'" * 65_001, ""),
        "half": (" '" * 32_001 + "\\\n", ""),
    }
    for name, (text, _) in {**REFUSED, **more}.items():
        taken = []
        for _ in range(3):
            start = time.process_time()
            with pytest.raises(UserError):
                parse_params(text)
            taken.append(time.process_time() - start)
        assert min(taken) < 0.05, name


YAML_PIECES = st.sampled_from(
    ["{", "}", "[", "]", ",", ": ", "type", "'", '"', "\\", "\n", "- ", "? ", "&a ", "*a", "!!str ", "!", "<<", "|",
     ">", "#", "%", "---", "...", "null", "\t", "\0", "\\x00", "\\U0011FFFF", "\ufeff", "\ud800", "@", "`", "é", " "]
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.one_of(YAML_PIECES, st.text(max_size=3)), max_size=30).map("".join),
    st.lists(YAML_PIECES, max_size=20).map(lambda pieces: "{type: a, " + "".join(pieces) + "}"),
    st.text(st.characters(codec=None), max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.booleans())
def test_fuzz_gives_a_mapping_or_a_user_error(text: str, pure: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if pure:
            patch.delattr(yaml, "CSafeLoader", raising=False)
        try:
            read = parse_params(text)
        except UserError as error:
            shown = str(error)
        else:
            assert "type" in read
            shown = show(read)
    assert shown.isprintable()


REORDERING = "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
SAFE = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff" + REORDERING)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(SAFE, min_size=1).filter(lambda key: key != "<<"), st.text(SAFE), max_size=5), st.booleans()
)
def test_texts_survive_the_round_trip(texts: dict[str, str], flow: bool) -> None:
    texts = {"type": "a", **texts}
    for style in ('"', "'", None):
        # a width without wrapping: a plain "a \\" wrapped there is what a shell's continuation looks like
        dumped = yaml.safe_dump(texts, default_flow_style=flow, default_style=style, allow_unicode=True, width=math.inf)
        assert values(dumped) == texts
