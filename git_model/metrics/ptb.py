"""Penn Treebank tokens for caption metrics: the Stanford jar's, or our own reading of its behaviour.

The official COCO scores are defined on the tokens of CoreNLP 3.4.1 (`PTBTokenizer -preserveLines
-lowerCase`). The Python engine is a list of patterns tuned until its output equals the
jar's on real captions and on probes, odd cases included.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from git_model.errors import UserError, one_of

ENGINES = ("auto", "java", "python")
JAR_NAME = "stanford-corenlp-3.4.1.jar"
JAR_SECONDS = 600

# What pycocoevalcap removes. The brackets are upper case there while the tokens are lower case, so
# "-lrb-" and its kin stay in every official score; they stay here too.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Java reads all of these as the end of a line, which would shift every caption that follows.
_LINE_ENDS = re.compile("[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")


def ptb_tokenize(texts: Sequence[str], engine: str = "auto") -> tuple[list[str], str]:
    """Return the texts as lower-case PTB tokens joined by spaces, without punctuation tokens.

    Args:
        texts: captions; line breaks inside a caption count as spaces.
        engine: ``java`` (the jar of pycocoevalcap), ``python`` (no Java needed) or ``auto``
            (``java`` where a Java runtime and the jar are found).

    Returns:
        One string per text, and the engine used: ``java`` or ``python``.

    Raises:
        UserError: unknown engine; ``java`` without Java or jar, or when the jar fails.
    """
    engine, java, jar = _choose(engine)
    if engine == "python":
        return [" ".join(_python_tokens(text)) for text in texts], engine
    if not java:
        raise UserError("tokenizer engine 'java' needs a Java runtime on PATH; 'python' and 'auto' do not")
    if not jar:
        raise UserError(f"tokenizer engine 'java' needs {JAR_NAME} of the package pycocoevalcap")
    return _java_tokenize(texts, java, jar), engine


def cached_ptb_tokenize(texts: Sequence[str], engine: str, folder: Path | None) -> tuple[list[str], str]:
    """Do as `ptb_tokenize`, and keep the tokens in `folder` under a hash of the texts and of what made them."""
    if folder is None:
        return ptb_tokenize(texts, engine)
    engine, _, _ = _choose(engine)
    maker = JAR_NAME if engine == "java" else f"python {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    file = folder / f"{hashlib.sha256(json.dumps([maker, *texts]).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):  # not there, or damaged: made anew
        kept = json.loads(file.read_bytes())
        if isinstance(kept, list) and len(kept) == len(texts):
            return kept, engine
    tokens, engine = ptb_tokenize(texts, engine)
    with suppress(OSError):  # a read-only home is no reason to stop
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(tokens))
        part.replace(file)
    return tokens, engine


def _choose(engine: str) -> tuple[str, str | None, Path | None]:
    """Return the engine that `engine` means here, Java and the jar."""
    if engine not in ENGINES:
        raise one_of("tokenizer engine", engine, ENGINES)
    java, jar = shutil.which("java"), _find_jar()
    if engine == "auto":
        engine = "java" if java and jar else "python"
    return engine, java, jar


def _find_jar() -> Path | None:
    """Return the Stanford jar inside the installed pycocoevalcap, without importing the package."""
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = (spec.submodule_search_locations or []) if spec else []
    jars = (Path(folder) / "tokenizer" / JAR_NAME for folder in folders)
    return next((jar for jar in jars if jar.is_file()), None)


def _java_tokenize(texts: Sequence[str], java: str, jar: Path) -> list[str]:
    """Run the jar once; text goes through pipes, so nothing is written beside the package."""
    if not texts:
        return []
    # "ignore" drops lone surrogates, which UTF-8 cannot carry.
    lines = "".join(_LINE_ENDS.sub(" ", text) + "\n" for text in texts).encode("utf-8", "ignore")
    name = "edu.stanford.nlp.process.PTBTokenizer"
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), name, "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(command, input=lines, capture_output=True, check=True, timeout=JAR_SECONDS)  # noqa: S603
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise UserError(f"the PTB tokenizer failed (exit {error.returncode}): {words[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the PTB tokenizer did not end within {JAR_SECONDS} s") from error
    rows = done.stdout.decode("utf-8").split("\n")
    if len(rows) < len(texts):
        raise UserError(f"the PTB tokenizer returned {len(rows)} lines for {len(texts)} texts")
    kept = (" ".join(w for w in row.rstrip().split(" ") if w not in PUNCTUATION) for row in rows)
    return [row for row, _ in zip(kept, texts, strict=False)]


# --- the Python engine ---------------------------------------------------------------------------
# A text is cut at white space and each piece is scanned: at every position the pattern with the
# longest match wins, the earlier one on a tie (as in the lexer generators such tokenizers come from).

_APOSTROPHES = str.maketrans(
    {"\x92": "'", "\x91": "`", "\u2019": "'", "\u2018": "`", "\u201b": "`", "\u2039": "`", "\u203a": "'"}
)
_REPLACED = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{'"': "''", "\x93": "``", "\x94": "''", "\u201c": "``", "\u201d": "''", "\xab": "``", "\xbb": "''"},
    **dict.fromkeys("\x96\x97\u2013\u2014\u2015", "--"),
    **dict.fromkeys("\x80\xa4\u20a0\u20ac", "$"),
    **{"\u2026": "...", "\xa2": "cents", "\xa3": "#", "\xad": "-"},
    **{"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""},
}
# Kinds of character the jar calls untokenizable and drops; so is all beyond the first 65,536.
_DROPPED = frozenset({"Cc", "Cf", "Co", "Cn", "Cs", "Me", "Nl"})

_ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|drs|prof|rev|gen|sen|rep|reps|gov|sgt|capt|cpl|lt|lieut|col|cmdr|comdr|adm|maj|brig|hon"
    "|pres|pvt|pfc|msgr|supt|asst|atty|sr|jr|st|ste|ave|blvd|rd|mt|ft|ct|rt|sq|dept|det|treas|univ|assn|natl|intl"
    "|bldg|jan|feb|mar|apr|aug|sept|sep|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|etc|vs|v|cf|al|seq|tel|ext|est"
    "|elec|mfg|corp|co|ltd|inc|cos|bros|plc|ph|esq|ala|ariz|calif|colo|conn|dak|fla|ga|ind|kan|kans|ky|md|mich"
    "|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo"
)
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Mass|Ore|Pa|Tex|Wash"  # "wash." is a word, "Wash." a state
_NUMBERED = "no|nos|pp|fig|figs|art|op|ca|prop"  # abbreviations only before a number
_W = r"[^\W\d_]"  # a letter
_WD = r"[^\W_\xb2\xb3\xb9\xbc-\xbe\u2070-\u209c\u2150-\u215e]"  # a letter or digit; no raised one, no ½
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+)*"  # one side of "man/woman"
# Digits in two to four groups, seen as one token with "-" or a space ("_") between them.
_PHONE = r"(?:\(\d{3}\)_?|(?:\d{2,4}[-_]){1,2})\d{3,4}[-_]?\d{3,5}"
_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    for pattern, ignore_case in (
        # Words that are two tokens: every group is one.
        (r"(can)(not)(?![^\W_])|(gon|wan)(na)(?![^\W_])|(got)(ta)(?![^\W_])|(lem|gim)(me)(?![^\W_])", True),
        (r"('t)(is|was)(?![^\W_])|(more)('n)(?![^\W_])", True),
        (r"([a-z]*?)(n't)(?![^\W\d_])", True),
        (r"'(?:[smd]|ll|re|ve)(?![^\W\d_])", True),
        # Apostrophes inside a word: O'Brien, o'clock, d'oh, ma'am, rock 'n' roll, the '90s.
        (rf"(?:[A-HJ-XZdnol]|qu|hors-d)'{_W}{{2,}}", False),
        (rf"{_W}*{_W}[aeiouyAEIOUY]'[aeiouA-Z]{_W}*", False),
        (rf"[jy]'(?={_W})|[dl]'(?={_W})", True),
        (r"(?:e'er|cap'n|nat'l|li'l|ol'|dunkin'|s'mores?|c'est|qu'a)", True),
        (r"'(?:em|til|cause)|'[2-9]0s|'n'|'n(?= |$)", True),
        # Words, with a stop or an underscore inside; hyphens; up to two slashes; R&B in capitals.
        (rf"{_W}{_WD}*(?:[.!?]{_W}{_WD}*)*", False),
        (rf"{_WD}+(?:-{_WD}+)*(?:_{_WD}+)+", False),
        (rf"{_WD}(?:{_WD}|[.,](?={_WD}))*(?:[-\xad\u2010\u2011\u058a]{_WD}+)+", False),
        (rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}", False),
        (r"[A-Z]+(?:[&+][A-Z]+)+", False),
        (rf"{_WD}+", False),
        (rf"(?:{_ABBREVIATIONS})\.|(?:{_NUMBERED})\.(?=\d)", True),
        (rf"(?:{_CAPITAL_ABBREVIATIONS})\.|{_W}+\.(?=[,;:])", False),
        (rf"{_W}\.(?:{_W}\.)*|ph\.d\.", True),
        # Numbers, dates, telephone numbers, fractions; \xa0 marks a space that is part of the token.
        (r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)", False),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", False),
        (r"(?:\d{1,4}[-\xa0])?\d{1,4}/\d{1,4}", False),
        (_PHONE.replace("_", "\xa0"), False),
        # The web: addresses, names, tags.
        (r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]", False),
        (r"(?:www\.(?:[\w-]+\.)+[a-z]{2,4}|(?:[a-z]+\.)+(?:com|net|org|edu))(?:/[^\s\"<>|()]*\w)?", False),
        (r"[A-Za-z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|(){}.@]+\.)*[^\s\"<>|(){}.@,!?:;]+", False),
        (r"@[A-Za-z_]\w*|#[A-Za-z]+", False),
        (r"</?[A-Za-z][^<>]*>", False),
        (r"&(?:amp|lt|gt|quot|apos|nbsp);", True),
        (r"[:;=][-']?[()DPdp](?![^\W_])|\^_\^", False),
        # Runs of marks.
        (r"[!?]+|\.{3,}|-{2,}|_+|''|``|<<|>>|@@+|##+|\*{2,3}|[A-Z]*\$|\u2026", False),
    )
)


def _python_tokens(text: str) -> Iterator[str]:
    """Yield the tokens of one text that are not punctuation."""
    text = _LINE_ENDS.sub(" ", text).translate(_APOSTROPHES)
    text = _glue(" ".join(text.split()))
    if ". " in text:
        text = _SENTENCE_AFTER_LETTER.sub(r"\1", text)
    pieces = text.split(" ")
    for piece, after in zip(pieces, [*pieces[1:], ""], strict=True):
        if after[:1].isdigit() and _BEFORE_NUMBER.fullmatch(piece):
            yield piece.lower()
        else:
            yield from _piece_tokens(piece)


_BEFORE_NUMBER = re.compile(rf"(?:{_NUMBERED})\.", re.IGNORECASE)
# "vitamin C. The" ends a sentence, "Mary C. Smith" does not: these words decide. (The jar also looks
# at the first word of the NEXT caption; here a caption's tokens depend on that caption alone.)
_SENTENCE_AFTER_LETTER = re.compile(
    r"(?<![\w.&'-])([^\W\d_])\.(?= (?:A|About|According|Additionally|After|An|As|At|But|Her?|Here|However|I[fnt]"
    r"|Last|Many|More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This"
    r"|We|What|When|While|Yet|You)(?![\w-]))"
)


# Tokens that hold a space: "3 1/2", "555 1234", "<a href=x>".
_SPACED = re.compile(
    r"(?<![\w.,:/-])\d{1,4} \d{1,4}/\d{1,4}"
    r"|(?<![\w.,:/-])" + _PHONE.replace("_", " ") + r"(?!\d)"
    r"|</?[A-Za-z][^<>]* [^<>]*>"
)
_MAY_BE_SPACED = re.compile(r"\d\)? \d|<")


def _glue(text: str) -> str:
    r"""Return the text with \xa0, the jar's mark, for spaces inside a token."""
    if not _MAY_BE_SPACED.search(text):
        return text
    return _SPACED.sub(lambda match: match.group().replace(" ", "\xa0"), text)


@lru_cache(maxsize=1 << 16)
def _piece_tokens(piece: str) -> tuple[str, ...]:
    """Return the tokens of one piece without white space, less punctuation; pieces repeat a lot."""
    if piece.isalpha() and piece.isascii() and len(piece) > 1 and not _IRREGULAR.fullmatch(piece):
        return (piece.lower(),)
    return tuple(word for word in map(str.lower, _scan(piece)) if word and word not in PUNCTUATION)


_IRREGULAR = re.compile(r"cannot|gonna|wanna|gotta|lemme|gimme", re.IGNORECASE)


def _scan(piece: str) -> Iterator[str]:
    """Yield the tokens of one piece as written: at each position the longest pattern."""
    place = 0
    while place < len(piece):
        best: re.Match[str] | None = None
        for pattern in _PATTERNS:
            match = pattern.match(piece, place)
            if match and match.end() > (best.end() if best else place):
                best = match
        if best is None:
            yield _character(piece[place])
            place += 1
            continue
        yield from (_spelled(token) for token in best.groups() or (best.group(),) if token)
        place = best.end()


def _character(char: str) -> str:
    """Return a lone character as the jar prints it, "" where it drops it."""
    if char in _REPLACED:
        return _REPLACED[char]
    return "" if ord(char) > 0xFFFF or unicodedata.category(char) in _DROPPED else char


def _spelled(token: str) -> str:
    """Return a token as the jar prints it."""
    if token in _REPLACED:
        return _REPLACED[token]
    if len(token) > 1 and not any(c.isalnum() for c in token.strip("-.()[]{}:;=")):
        if set(token) == {"-"}:
            return "--"
        if set(token) == {"."}:
            return "..."
    if "(" in token or ")" in token:
        return token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token
