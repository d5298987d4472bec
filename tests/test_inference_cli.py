"""The command `inference.py`: from raw values to a called task, its JSON, its messages and exit codes."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import math
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import inference
from git_model.errors import EXIT_BUG, EXIT_IO, EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_USAGE, UserError
from git_model.tasks.params import parse_params
from git_model.tasks.registry import TASKS, describe, keys_of, resolve, run
from git_model.tasks.values import Range, convert, wanted


def paint(
    *,
    image_path: str | list[str],
    title: str,
    beams: Annotated[int, Range(1, 100)] = 1,
    top_p: Annotated[float, Range(0, 1)] | None = None,
    grid: bool = False,
    bbox: list[float] | None = None,
    size: tuple[int, int] = (64, 64),
    mode: Literal["fast", "slow"] = "fast",
) -> dict[str, Any]:
    """Return what it was asked for.

    grid: a key that is explained.
    """
    print("noise of a library")
    logging.getLogger("paint").info("painting")
    return dict(locals())


def fail(*, how: str) -> dict[str, Any]:
    """Fail in the way that was asked for."""
    failures = {
        "interrupt": KeyboardInterrupt(),
        "disk full": OSError(errno.ENOSPC, "No space left on device"),
        "no checkpoint": UserError("no checkpoint\nverifies \x1b[2J", EXIT_NO_CHECKPOINT),
        "bug": RuntimeError("two\nlines"),
        "denied": PermissionError(errno.EACCES, "Permission denied"),
    }
    if how in failures:
        raise failures[how]
    return {"loss": float(how)}


SMALL = {"paint": paint, "fail": fail}


def read(value: str, annotation: Any) -> Any:
    """Convert what `key: value` holds."""
    return convert(parse_params(f"{{type: a, key: {value}}}")["key"], annotation, "key")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("no", str, "no"),
        ("0123", str, "0123"),
        ("2024-01-01", str, "2024-01-01"),
        ("12:30:45", str, "12:30:45"),
        ("'null'", str, "null"),
        ("''", str, ""),
        ("a b", str | list[str], "a b"),
        ("[a, no, 1e3]", str | list[str], ["a", "no", "1e3"]),
        ("0123", int, 123),
        ("'224'", int, 224),
        ("-5", int, -5),
        ("1e-5", float, 1e-5),
        ("7", float, 7.0),
        (".5", float, 0.5),
        ("'False'", bool, False),
        ("False", bool, False),
        ("yes", bool, True),
        ("OFF", bool, False),
        ("null", str | None, None),
        ("~", int | None, None),
        ("None", bool | None, None),
        ("", float | None, None),
        ("'None'", str | None, "None"),
        ("[1, 2.5]", list[float] | None, [1.0, 2.5]),
        ("[]", list[float], []),
        ("[3, 4]", tuple[int, int], (3, 4)),
        ("[3, 4, 5]", tuple[int, ...], (3, 4, 5)),
        ("slow", Literal["fast", "slow"], "slow"),
        ("8", Literal[4, 8], 8),
        ("100", Annotated[int, Range(1, 100)], 100),
        ("5", int | str, 5),
        ("five", int | str, "five"),
    ],
)
def test_values_become_what_the_signature_says(value: str, annotation: Any, expected: Any) -> None:
    got = read(value, annotation)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("'224x'", int, "key must be a whole number, got '224x'"),
        ("1.0", int, "key must be a whole number, got 1.0"),
        ("1_000", int, "got 1_000"),
        ("0x10", int, "got 0x10"),
        ("12:30", int, "got 12:30"),
        ("٣", int, "got ٣"),
        ("9" * 5000, int, "got 9999"),
        ("true", int, "got true"),
        ("null", int, "key must be a whole number, got null"),
        (".nan", float, "key must be a finite number, got .nan"),
        ("nan", float, "got nan"),
        ("-.inf", float, "got -.inf"),
        ("1e999", float, "got 1e999"),
        ("2", bool, "key must be true or false, got 2"),
        ("falsch", bool, "got falsch"),
        ("null", str, "key must be text, got null (quote it if the word is meant)"),
        ("[1]", str, "key must be text, got [1]"),
        ("{a: 1}", str | None, "key must be text or null, got {a: 1}"),
        ("[a, [b]]", str | list[str], "key[1] must be text, got [b]"),
        ("[1, x]", list[float] | None, "key[1] must be a finite number, got x"),
        ("'1, 2'", list[float], "key must be a list (a finite number each), got '1, 2'"),
        ("[1, 2, 3]", tuple[int, int], "key must be a list of 2 (a whole number, a whole number)"),
        ("slwo", Literal["fast", "slow"], "one of: fast, slow, got slwo (did you mean 'slow'?)"),
        ("0", Annotated[int, Range(1, 100)], "key must be a whole number from 1 to 100, got 0"),
        ("101", Annotated[int, Range(1, 100)] | None, "from 1 to 100 or null, got 101"),
        ('"a\\n\\tb"', int, "got 'a\\n\\tb'"),
    ],
)
def test_a_mistyped_value_is_named_with_what_is_wanted(value: str, annotation: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(value, annotation)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_run_takes_plain_python_values_too(tmp_path: Path) -> None:
    given = {"image_path": [tmp_path, "no"], "title": "null", "top_p": 0.5, "grid": True, "bbox": None, "size": (1, 2)}
    expected = {**given, "image_path": [str(tmp_path), "no"], "beams": 1, "mode": "fast"}
    assert run({"type": "paint", **given}, SMALL) == expected
    with pytest.raises(UserError, match="top_p must be a finite number from 0 to 1 or null, got nan"):
        run({"type": "paint", **given, "top_p": math.nan}, SMALL)


PAINT = "{type: paint, image_path: a, title: b"
WRONG = {
    "": "-p expects a mapping with 'type'",
    "{image_path: a}": "'type' is one of: paint, fail; got only: [image_path]",
    "{type: 5}": "unknown type '5'; one of: paint, fail",
    "{type: null}": "unknown type 'null'",
    "{type: pain}": "unknown type 'pain' (did you mean 'paint'?); one of: paint, fail",
    "{type: os, image_path: a}": "unknown type 'os'",
    "{type: __import__, name: os}": "unknown type '__import__'",
    "{type: write_to_file, contxt: a, file_name: b}": "unknown type 'write_to_file'",
    "{type: fail.__globals__}": "unknown type 'fail.__globals__'",
    f"{PAINT}, beems: 3}}": "unknown key 'beems' for paint (did you mean 'beams'?); one of: image_path, title,",
    f"{PAINT}, __class__: x}}": "unknown key '__class__' for paint; one of:",
    "{type: paint, beams: 3}": "paint needs the keys image_path, title; all its keys: image_path, title, beams",
    "{type: fail}": "fail needs the key how",
    f"{PAINT}, beams: 3x}}": "beams must be a whole number from 1 to 100, got 3x",
    f"{PAINT}, grid: maybe}}": "grid must be true or false, got maybe",
    f"{PAINT}, {'k' * 900}: 1}}": "unknown key 'kkk",
    f"{PAINT}, '\u200b\\e': 1}}": "unknown key '\\u200b\\e'",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_bad_input_is_one_line_and_exit_code_2(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["-p", text], SMALL) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert WRONG[text] in err
    assert len(err) < 400


@pytest.mark.parametrize("argv", [["-p"], [], ["-q", "1"], ["{type: paint}"], ["-p", "{type: a}", "upper"], ["--deb"]])
def test_a_wrong_command_line_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(argv, SMALL) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_result_is_json_alone_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["-p", PAINT + ", bbox: [1, 2, 3, 4], mode: slow, }"], SMALL) == EXIT_OK
    out, err = capfd.readouterr()
    assert "noise of a library" in err
    assert list(json.loads(out)) == list(inspect.signature(paint).parameters)
    assert json.loads(out)["bbox"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("interrupt", 130, "error: interrupted\n"),
        ("disk full", EXIT_IO, "error: [Errno 28] No space left on device\n"),
        ("no checkpoint", EXIT_NO_CHECKPOINT, "error: no checkpoint\\nverifies \\x1b[2J\n"),
        ("bug", EXIT_BUG, "error: our bug, please report it (--debug shows where): RuntimeError: two\\nlines\n"),
        ("denied", EXIT_USAGE, "error: [Errno 13] Permission denied\n"),
        ("nan", EXIT_BUG, "JSON compliant"),
    ],
)
def test_exit_codes(how: str, code: int, message: str) -> None:
    done = python(f"sys.exit(inference.main(['-p', '{{type: fail, how: {how}}}'], test.SMALL))")
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code that may use `sys`, `inference` and this file as `test` in a fresh interpreter."""
    here = Path(__file__).resolve().parent
    start = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    return finish([sys.executable, "-c", f"{start}import inference, test_inference_cli as test\n{code}"], **options)


def finish(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "timeout": 60, **options}
    return subprocess.run(line, **options)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["-p", "{type: fail, how: bug}", "--debug"], SMALL) == EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


def test_unicode_and_logs_under_an_ascii_locale() -> None:
    call = ascii(["-p", "{type: paint, image_path: '🦖', title: 'naïve'}"])
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = python(f"sys.exit(inference.main({call}, test.SMALL))", env=locale)
    assert done.returncode == EXIT_OK, done.stderr
    assert '"image_path": "🦖"' in done.stdout
    assert "painting\n" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_74() -> None:
    with open("/dev/full", "w") as full:
        done = python("sys.exit(inference.main(['-p', '{type: fail, how: 1}'], test.SMALL))", stdout=full)
    assert done.returncode == EXIT_IO
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_a_wrong_mapping_answers_at_once_and_without_torch(root: Path) -> None:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = finish(
            [sys.executable, str(root / "inference.py"), "-p", "{'type': 'test_git_inference_single_imag', }"]
        )
        taken.append(time.perf_counter() - start)
        assert done.returncode == EXIT_USAGE
        assert "did you mean 'test_git_inference_single_image'?" in done.stderr
    assert min(taken) < 1, taken
    asked = "inference.main(['-p', '{type: test_git_inference_single_image, beam: 1}'])"
    heavy = "sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules))"
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import inference; print({asked}, {heavy})"
    done = finish([sys.executable, "-c", code])
    assert done.stdout == "2 []\n", done.stderr


def test_help_teaches_every_task(root: Path) -> None:
    done = finish([sys.executable, str(root / "inference.py"), "--help"])
    assert done.returncode == EXIT_OK
    for name, task in TASKS.items():
        assert f"'type': '{name}'" in done.stdout
        assert all(f"      {key} " in done.stdout for key in keys_of(task))
    one = finish([sys.executable, str(root / "inference.py"), "--help", "embed_prompt"]).stdout
    assert "'type': 'embed_prompt'" in one
    assert "'type': 'demo'" not in one
    assert describe({"paint": paint}).splitlines()[:6] == [
        "'type': 'paint'",
        "    Return what it was asked for.",
        "    grid: a key that is explained.",
        "      image_path           text or a list (text each) [required]",
        "      title                text [required]",
        "      beams                a whole number from 1 to 100 [1]",
    ]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_asked_for_by_keys(name: str) -> None:
    keys = keys_of(TASKS[name])
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(TASKS[name]).parameters.values())
    for key, told in keys.items():
        assert wanted(told.annotation) != "null", f"{key}: no words for {told.annotation}"
        if not told.required:  # the default must be a value its own reader accepts
            plain = {k: typing.get_origin(other.annotation) for k, other in keys.items() if other.required}
            others = {k: {"a": "1"} if kind is dict else "1" for k, kind in plain.items()}
            arguments = resolve({"type": name, **others, key: told.default})[1]
            read = getattr(arguments[told.group], key) if told.group else arguments[key]
            assert read == told.default
