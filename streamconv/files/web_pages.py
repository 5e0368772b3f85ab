"""Recognises URLs of web pages about files, as browsers show them. All knowledge of web sites is in two tables.

On some sites, the URL of a page about a file leads to the URL of the file itself. For the others, an error explains how
to get the file.
"""

import re

from streamconv.files.hub_settings import hub_endpoint_for

_HUB = r"(?:www\.)?huggingface\.co|hf\.co|hf-mirror\.com"  # and HF_ENDPOINT
_GITHUB, _GITLAB = r"(?:www\.)?github\.com", r"(?:[\w.-]+\.)?gitlab\.[\w.]+"
_MODELSCOPE, _ZENODO = r"(?:www\.)?modelscope\.(?:cn|ai)", r"(?:www\.)?zenodo\.org"
_DROPBOX, _FIGSHARE = r"(?:www\.)?dropbox\.com", r"(?:[\w-]+\.)?figshare\.com"
_GOOGLE_DRIVE = r"(?:drive|docs)\.google\.com"
_OTHERS = (
    r"1drv\.ms|onedrive\.live\.com|[\w-]+\.sharepoint\.com|(?:www\.)?mega\.nz|pan\.baidu\.com|(?:www\.)?kaggle\.com"
    r"|we\.tl|wetransfer\.com|(?:www\.)?mediafire\.com"
)
_REPOSITORY = r"/((?:datasets/|spaces/)?[^/?]+/[^/?]+)"
_FILE = r"([^/?]+/[^?]+)"  # after its revision
_IS_FILE_NAME = r"(?!.*\.(?:pth|pt|bin|ckpt|npz|safetensors)$)"
_IS_DOWNLOAD = r"(?!/(?:api|download)\b)(?!.*[?&](?:dl|download|raw)=1)"
_IN_A_BROWSER = "Download the file with a browser, and give the file"

_FILES = (  # host, path and query of the page, and those of the file
    (_HUB, rf"{_REPOSITORY}/(?:blob|raw)/{_FILE}(.*)", r"/\1/resolve/\2\3"),
    (_GITHUB, rf"/([^/?]+/[^/?]+)/blob/{_FILE}.*", r"/\1/raw/\2"),
    (_GITLAB, rf"/([^?]+)/-/blob/{_FILE}.*", r"/\1/-/raw/\2"),
    (_MODELSCOPE, rf"/models/([^/?]+/[^/?]+)/file/view/{_FILE}.*", r"/models/\1/resolve/\2"),
    (_ZENODO, r"/records?/(\d+)/preview/([^?]+).*", r"/records/\1/files/\2"),
    (_DROPBOX, r"(/(?:s|scl/fi)/[^?]+\?(?:.*&)?)dl=0(.*)", r"\1dl=1\2"),
    (_DROPBOX, r"(/(?:s|scl/fi)/[^?]+\?)(?!(?:.*&)?(?:dl|raw)=)(.*)", r"\1dl=1&\2"),
    (_DROPBOX, r"(/(?:s|scl/fi)/[^?]+)", r"\1?dl=1"),
)
_PAGES = (  # host, path and query of the page, and what to do
    (
        _HUB,
        rf"{_IS_FILE_NAME}{_REPOSITORY}(?:/tree/[^?]*)?/?(?:\?.*)?",
        r"Name a file of this repository, such as hf://\1/model.safetensors",
    ),
    (
        _GITHUB,
        r"/([^/?]+/[^/?]+)(?:/tree/[^?]*|/releases(?:/tag/[^?]*)?)?/?(?:\?.*)?",
        r"Give the URL of a file: https://github.com/\1/raw/BRANCH/FILE, or an asset of a release",
    ),
    (
        _MODELSCOPE,
        r"/models/([^/?]+/[^/?]+)(?:/(?:summary|files)[^?]*)?/?(?:\?.*)?",
        r"Give the URL of a file: https://modelscope.cn/models/\1/resolve/master/FILE",
    ),
    (
        _ZENODO,
        r"/records?/(\d+)/?(?:\?.*)?",
        r"Give the URL of a file: https://zenodo.org/records/\1/files/FILE",
    ),
    (
        _GOOGLE_DRIVE,
        r"/(?:file/d/|open\b|drive/).*",
        "Download the file with a browser, or with `pip install gdown` and `gdown --fuzzy URL`, and give the file",
    ),
    (_DROPBOX, rf"{_IS_DOWNLOAD}.*", _IN_A_BROWSER),
    (_OTHERS, rf"{_IS_DOWNLOAD}.*", _IN_A_BROWSER),
    (_FIGSHARE, r"/articles/.*", _IN_A_BROWSER),
)
_HF_FILE = re.compile(r"(?i:hf)://((?:datasets/|spaces/)?[^/]+/[^/@]+)/(?:blob|resolve|raw)/([^/]+)/(.+)")
_HF_PAGE = re.compile(
    _IS_FILE_NAME + r"(?i:hf)://((?:datasets/|spaces/)?[^/]+/[^/@]+)(?:@[^/]*)?(?:/(?:tree|blob)(?:/.*)?)?/?"
)


def direct_url(url: str) -> str:
    """Return the URL of the file that a page is about; any other URL as it is.

    >>> direct_url("https://huggingface.co/facebook/dinov2-base/blob/main/model.safetensors")
    'https://huggingface.co/facebook/dinov2-base/resolve/main/model.safetensors'
    """
    if match := _HF_FILE.fullmatch(url):
        return f"hf://{match[1]}@{match[2]}/{match[3]}"
    origin, host, rest = _parts(url)
    for hosts, page, file in _FILES:
        if _is_host(host, hosts) and (found := re.fullmatch(page, rest)):
            return origin + found.expand(file)
    return url


def page_problem(url: str) -> str:
    """Return what a URL stands for instead of a file, and how to get the file; empty if it may be a file's.

    Such a page is about no file or several, or it does not let programs download the file.
    """
    if match := _HF_PAGE.fullmatch(url):
        return f"is a repository, not a file. Name a file in it, such as hf://{match[1]}/model.safetensors."
    _, host, rest = _parts(url)
    for hosts, page, advice in _PAGES:
        if _is_host(host, hosts) and (found := re.fullmatch(page, rest)):
            return f"is a page, not a file. {found.expand(advice)}."
    return ""


def _parts(url: str) -> tuple[str, str, str]:
    """Return scheme and host, the host alone, and path and query; the host is empty unless the scheme is the web's."""
    match = re.match(r"(?i:https?)://([^/?#]*)", url)
    if match is None:
        return "", "", url
    host = match[1].rpartition("@")[2].lower()
    return match[0], host, url[match.end() :].partition("#")[0]


def _is_host(host: str, pattern: str) -> bool:
    if re.fullmatch(pattern, host):
        return True
    hub = hub_endpoint_for(host) if pattern == _HUB and host else None
    return hub is not None and host == hub.netloc.rpartition("@")[2].lower()
