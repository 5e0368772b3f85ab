"""Recognises text files: pointers to files, what servers send instead of a file, and source code.

Messages quote little of a file, and only printable characters.
"""

import html
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Collection

from streamconv.display import printable
from streamconv.files.error_json import error_message
from streamconv.redaction import redacted

_FAILED = "the download failed"
_HUB_ADVICE = (
    "On the Hub, the URL of a file contains /resolve/, not /blob/; on GitHub, /raw/. Or fetch it with `hf download`"
)
_PAGES = (  # in a page's title, in lower case
    ("virus scan warning", "Google Drive asks for a confirmation: download the file in a browser, or with `gdown`"),
    ("quota exceeded", "Google Drive's download limit for this file is reached: try again in a day"),
    ("google drive", "Google Drive sent a page: share the file with everyone, then download it with `gdown`"),
    ("dropbox", "Replace dl=0 at the end of the URL with dl=1"),
    ("hugging face", _HUB_ADVICE),
    ("github", _HUB_ADVICE),
    ("just a moment", "The server asks for a browser: download it there"),
    ("sign in", "Log in with a browser, and download it there"),
    ("log in", "Log in with a browser, and download it there"),
    ("login", "Log in with a browser, and download it there"),
)
_SUFFIXES = {
    "py": "Python source code",
    "ipynb": "a notebook",
    "yaml": "a YAML file",
    "yml": "a YAML file",
    "toml": "a TOML file",
    "md": "a text file",
    "sh": "a script",
}
_IS_CODE = re.compile(r"^(#!.*python|import \w+$|from [\w.]+ import |def \w+\()", re.MULTILINE)
_TITLE = re.compile(r"<title[^>]{0,200}>(.{0,500}?)</title>", re.IGNORECASE | re.DOTALL)  # bounded: it takes no time
_FILE_PAGE = re.compile(r"(huggingface\.co|github\.com)/[\w./-]{1,200}?/blob/")


def describe_text(start: bytes, name: str, secrets: Collection[str] = ()) -> str:
    """Describe a text file by its first bytes; "" if it is not text. The last character may be cut.

    ``secrets`` are hidden where the text is quoted.
    """
    text = _decode(start)
    if text is None:
        return ""

    def quoted(part: str) -> str:
        return f"'{printable(redacted(' '.join(part[:1000].split()), secrets))}'"

    if found := _pointer(text) or _markup(text, quoted) or _json(text, quoted):
        return found
    kind = _SUFFIXES.get(name.rpartition(".")[2].lower()) or (
        "Python source code" if _IS_CODE.search(text) else "a text file"
    )
    if kind != "a text file":
        return f"is {kind}, not a checkpoint. Give the weights file."
    return f"is a text file that begins {quoted(text)}. If it was downloaded, {_FAILED}."


def _decode(start: bytes) -> str | None:
    is_utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    decoder = getincrementaldecoder("utf-16" if is_utf16 else "utf-8-sig")()
    try:
        text = decoder.decode(start)  # without a character that is cut at the end
    except UnicodeDecodeError:
        return None
    text = text.strip()
    return text if text and not re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f]", text) else None


def _pointer(text: str) -> str:
    """Recognise what version control stores instead of a file."""
    size = re.search(r"^(?:file)?size:? =? ?(\d{1,20})$", text, re.MULTILINE)
    file = f"a file of {int(size[1]):,} bytes" if size is not None else "a file"
    if re.match(r"version https://(git-lfs|hawser)\.github\.com/spec/", text):
        return f"is a Git LFS pointer to {file}, not the file itself. In its repository, run `git lfs pull`."
    if text.startswith("# xet version"):
        return f"is a Xet pointer to {file}, not the file itself. Fetch it with `hf download`."
    if text.startswith("/annex/objects/"):
        return "is a git-annex pointer to a file, not the file itself. In its repository, run `git annex get FILE`."
    if re.search(r"^outs:\s*$", text, re.MULTILINE) and re.search(r"^- (md5|hash|path|size):", text, re.MULTILINE):
        return "is a DVC pointer to a file, not the file itself. In its repository, run `dvc pull`, and give the file."
    return ""


def _markup(text: str, quoted: Callable[[str], str]) -> str:
    if not text.startswith("<"):
        return ""
    title = _TITLE.search(text)
    if title is None and re.match(r"<\?xml|<Error>", text):
        found = dict(re.findall(r"<(Code|Message)>([^<]*)</", text))
        message = ": ".join(found[key] for key in ("Code", "Message") if found.get(key))
        answer = f"the server answered {quoted(html.unescape(message))}"
        return f"is an XML file, not a checkpoint: {answer if message else 'it may be an error message'}. So {_FAILED}."
    if title is None:
        return f"is a web page, not a checkpoint: {_FAILED}."
    shown = " ".join(html.unescape(title[1]).split())
    advice = next((advice for mark, advice in _PAGES if mark in shown.lower()), "")
    if _FILE_PAGE.search(text):
        advice = _HUB_ADVICE
    return f"is a web page ({quoted(shown)}), not a checkpoint: {_FAILED}.{f' {advice}.' if advice else ''}"


def _json(text: str, quoted: Callable[[str], str]) -> str:
    if not text.startswith(("{", "[")) or not re.match(r"[\[{]\s*([\"\[{}\]\d]|true|false|null|-)", text):
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        if "weight_map" in value:
            return "is an index of weight files, not their weights. Give its folder; the index needs its original name."
        if {"model_type", "architectures"} & value.keys():
            return "is the config.json of a model, not its weights. Give its folder or its weights file."
        if message := error_message(value):
            return f"is a JSON file, not a checkpoint: the server answered {quoted(message)}. So {_FAILED}."
    return f"is a JSON file that begins {quoted(text)}, not a checkpoint. If it was downloaded, {_FAILED}."
