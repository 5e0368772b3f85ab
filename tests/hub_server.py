"""A small imitation of the Hub over HTTP on the loopback, for huggingface_hub 0.34 to 2.x. It stores what it receives.

It models access (users by token, read-only and fine-grained tokens, roles in organisations, private and gated
repositories, and questions about all of these), repositories with branches and pull requests, commits that contain
small files and refer to large ones (as ndjson), uploads of large files in one piece or in parts, LFS's batch response,
which lists the files that are already stored, and downloads: small files from the Hub, large ones by a redirect to
another host that acts as a CDN.

It does not model xet (tests set HF_HUB_DISABLE_XET), .gitattributes and .gitignore (a file is large if its name has
the suffix of a weight file), tags, deletions and copies in a commit, the contents of older commits, discussions,
pagination, rate limits, signatures and expiry of upload addresses, S3's error texts, OAuth, resource groups, and the
validation of a model card except that it must have a header with one of a few licences. Error texts are those of the
real Hub, as far as they are known.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN, READ_TOKEN = "ada", "hf_aTokenThatMayWrite1234567890", "hf_aTokenThatMayRead1234567890"
LARGE = re.compile(r".*\.(safetensors|bin|pth|pt|h5|msgpack)")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other")
PART_BYTES = 1 << 20
MISSING = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
    "For instance, this can happen if you used git push --no-verify to push your changes."
)


@dataclass(frozen=True)
class Pointer:
    """A large file, as a commit refers to it."""

    sha256: str
    size: int


@dataclass
class Repo:
    """A repository. Each branch is a list of commits: a name of 40 hexadecimal digits, and files.

    ``titles`` are those of the commits that clients made.
    """

    private: bool
    gated: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes | Pointer]]]] = field(default_factory=dict)
    pull_requests: int = 0
    titles: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes | Pointer]) -> str:
        commits = self.branches.setdefault(branch, [])
        name = hashlib.sha1(f"{branch} {len(commits)} {sorted(files)}".encode()).hexdigest()
        commits.append((name, files))
        return name


@dataclass
class Fault:
    """A fault of the next ``times`` requests whose "METHOD path" matches the pattern.

    Without a ``status``, the connection is cut after ``cut_after`` bytes of the request's body or, if that is None, the
    response is withheld until the server closes. With ``late``, the request takes effect before it fails. With
    ``drips``, the response begins with these bytes and continues with a byte every 50 ms.
    """

    pattern: str
    status: int | None = None
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    cut_after: int | None = None
    late: bool = False
    drips: bytes = b""


class HubServer:
    """The server; see `running`. ``log`` has each request: its host ("hub" or "cdn"), "METHOD path", token or None."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()  # complete large files that were received, by sha256
        self.log: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.multipart = False
        self.users: dict[str, dict[str, Any]] = {
            TOKEN: who({"role": "write"}),
            READ_TOKEN: who({"role": "read"}),
        }
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._parts: dict[tuple[str, int], bytes] = {}
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, part)) for part in ("hub", "cdn")]
        # Two host names: huggingface_hub 1.x does not compare ports to decide which redirects leave the Hub.
        self.url, self.cdn = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )

    def fail(self, pattern: str, **fault: Any) -> None:
        self.faults.append(Fault(pattern, **fault))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision, including the contents of large ones."""
        files = self.repos[repo].branches[revision][-1][1]
        return {n: self.blobs[f.sha256] if isinstance(f, Pointer) else f for n, f in files.items()}

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main", private: bool = False) -> None:
        """Create a revision with these files, the large ones stored as such."""
        made = self.repos.setdefault(repo, Repo(private))
        laid: dict[str, bytes | Pointer] = {}
        for name, data in files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            if LARGE.fullmatch(name):
                self.blobs[sha256] = data
            laid[name] = Pointer(sha256, len(data)) if LARGE.fullmatch(name) else data
        made.add(revision, laid)

    def requests(self, pattern: str) -> list[tuple[str, str, str | None]]:
        return [entry for entry in self.log if re.search(pattern, entry[1])]

    # The effects of requests. Each returns a status, a body (JSON, bytes or None), and headers.

    def answer(
        self, part: str, method: str, path: str, query: dict[str, str], token: str | None, body: bytes, accept: str = ""
    ) -> "Answer":
        if part == "cdn":
            return self._cdn(method, path, body)
        for known, pattern, act in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in known:
                found = match.groupdict()
                if "repo" in found and (refused := self._refused(found["repo"], token, act, "create_pr" in query)):
                    return refused
                return getattr(self, act)(method=method, query=query, token=token, body=body, accept=accept, **found)
        return Answer(404, {"error": f"no such address: {method} {path}"})

    def _refused(self, repo: str, token: str | None, act: str, creates_pr: bool) -> "Answer | None":
        known = self.repos.get(repo)
        can_read, can_write = self._rights(repo, token)
        if known is None or (known.private and not can_read):
            code = 404 if token in self.users else 401
            return Answer(code, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if known.gated and not can_read:
            return Answer(403, {"error": "Access to this model is restricted"}, {"X-Error-Code": "GatedRepo"})
        if act in ("_preupload", "_batch", "_commit", "_branch", "_check_write"):
            if token not in self.users:
                return Answer(401, {"error": "Invalid username or password."})
            # Everybody may propose changes in a pull request, and store the large files for it.
            is_proposal = creates_pr or act == "_batch"
            if not (can_write or (is_proposal and self.users[token]["auth"]["accessToken"]["role"] != "read")):
                return Answer(403, {"error": "You don't have the rights to do that"})
        return None

    def _rights(self, repo: str, token: str | None) -> tuple[bool, bool]:
        """Return whether a token can read a private repository, and whether it can write to it or create it."""
        if token not in self.users:
            return False, False
        user, owner = self.users[token], repo.split("/")[0]
        roles = {user["name"]: "admin", **{each["name"]: each["roleInOrg"] for each in user["orgs"]}}
        access = user["auth"]["accessToken"]
        if access["role"] == "fineGrained":
            scopes = [s for s in access["fineGrained"]["scoped"] if s["entity"]["name"] in (owner, repo)]
            rights = {right for scope in scopes for right in scope["permissions"]}
            return "repo.content.read" in rights, "repo.write" in rights and roles.get(owner, "read") != "read"
        return owner in roles, access["role"] == "write" and roles.get(owner, "read") != "read"

    def _check(self, **_: Any) -> "Answer":
        return Answer(200, {})

    _check_write = _check

    def _whoami(self, token: str | None, **_: Any) -> "Answer":
        if token not in self.users:
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        return Answer(200, self.users[token])

    def _create(self, token: str | None, body: bytes, **_: Any) -> "Answer":
        wanted = json.loads(body)
        if token not in self.users:
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        user = self.users[token]["name"]
        repo = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not self._rights(repo, token)[1]:
            return Answer(403, {"error": f"You don't have the rights to create a model under {repo.split('/')[0]}"})
        url = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repos:
            return Answer(409, {"error": "You already created this model repo", **url})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repos[repo] = Repo(private)
        self.repos[repo].add("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return Answer(200, url)

    def _branch(self, repo: str, revision: str, **_: Any) -> "Answer":
        branches = self.repos[repo].branches
        if unquote(revision) in branches:
            return Answer(409, {"error": "Reference already exists"})
        branches[unquote(revision)] = list(branches["main"])
        return Answer(201, None)

    def _refs(self, repo: str, **_: Any) -> "Answer":
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1][0]}
            for name, commits in self.repos[repo].branches.items()
        ]
        return Answer(200, {"branches": heads, "converts": [], "tags": [], "pullRequests": []})

    def _found(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes | Pointer]] | None:
        revision = unquote(revision or "main")
        branches = self.repos[repo].branches
        if revision in branches:
            return branches[revision][-1]
        return next((commit for commits in branches.values() for commit in commits if commit[0] == revision), None)

    def _info(self, repo: str, query: dict[str, str], revision: str | None = None, **_: Any) -> "Answer":
        commit = self._found(repo, revision)
        if commit is None:
            return Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": name, **(_described(file) if query.get("blobs", "").lower() in ("true", "1") else {})}
            for name, file in commit[1].items()
        ]
        known = self.repos[repo]
        info = {"id": repo, "modelId": repo, "sha": commit[0], "private": known.private, "gated": known.gated}
        return Answer(200, {**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, repo: str, revision: str, folder: str | None = None, **_: Any) -> "Answer":
        commit = self._found(repo, revision)
        if commit is None:
            return Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        if folder:
            return Answer(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
        return Answer(200, [_entry(name, file) for name, file in commit[1].items()])

    def _paths_info(self, repo: str, revision: str, body: bytes, **_: Any) -> "Answer":
        commit = self._found(repo, revision)
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        files = commit[1] if commit else {}
        return Answer(200, [_entry(name, files[name]) for name in asked if name in files])

    def _preupload(self, repo: str, revision: str, body: bytes, **_: Any) -> "Answer":
        commit = self._found(repo, revision)
        files = commit[1] if commit else {}
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if LARGE.fullmatch(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        return Answer(200, {"files": modes})

    def _batch(self, repo: str, body: bytes, **_: Any) -> "Answer":
        objects = []
        for each in json.loads(body)["objects"]:
            at, actions = f"{self.cdn}/upload/{each['oid']}", {}
            if each["oid"] not in self.blobs:
                upload: dict[str, Any] = {"href": f"{at}?X-Amz-Signature=aSecretSignature"}
                if self.multipart:
                    count = -(-each["size"] // PART_BYTES)
                    parts = {f"{i + 1:05}": f"{at}/{i + 1}?X-Amz-Signature=aSecretSignature" for i in range(count)}
                    upload = {
                        "href": f"{self.url}/api/complete_multipart/{each['oid']}",
                        "header": {"chunk_size": str(PART_BYTES), **parts},
                    }
                actions = {"upload": upload, "verify": {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}}
            objects.append({**each, "authenticated": True, **({"actions": actions} if actions else {})})
        return Answer(200, {"transfer": "multipart" if self.multipart else "basic", "objects": objects})

    def _complete(self, oid: str, body: bytes, **_: Any) -> "Answer":
        parts = [self._parts[oid, part["partNumber"]] for part in json.loads(body)["parts"]]
        return self._keep(oid, b"".join(parts))

    def _verify(self, body: bytes, **_: Any) -> "Answer":
        request = json.loads(body)
        kept = self.blobs.get(request["oid"])
        return (
            Answer(200, {})
            if kept is not None and len(kept) == request["size"]
            else Answer(404, {"error": "not there"})
        )

    def _keep(self, oid: str, data: bytes) -> "Answer":
        if hashlib.sha256(data).hexdigest() != oid:
            return Answer(400, {"error": "the sha256 is another"})
        with self.lock:
            self.blobs[oid] = data
            self.uploads[oid] += 1
        return Answer(200, {})

    def _commit(self, repo: str, revision: str, query: dict[str, str], body: bytes, **_: Any) -> "Answer":
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        known, branch = self.repos[repo], unquote(revision)
        commit = self._found(repo, branch)
        if commit is None:
            return Answer(404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"})
        if header.get("parentCommit") not in (None, commit[0]):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(commit[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return Answer(400, {"error": MISSING})
                files[value["path"]] = Pointer(value["oid"], value["size"])
        address = {}
        if query.get("create_pr"):
            known.pull_requests += 1
            branch = f"refs/pr/{known.pull_requests}"
            known.branches[branch] = [commit]
            address = {"pullRequestUrl": f"{self.url}/{repo}/discussions/{known.pull_requests}"}
        name = known.add(branch, files)
        known.titles.append(header["summary"])
        return Answer(200, {"commitUrl": f"{self.url}/{repo}/commit/{name}", "commitOid": name, **address})

    def _yaml(self, body: bytes, accept: str, **_: Any) -> "Answer":
        header = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        if header is None:
            return Answer(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        license = re.search(r"^license: *(.*)$", header[1], re.MULTILINE)
        if license and license[1] not in LICENSES:
            text = f'"license" must be one of [{", ".join(LICENSES)}]'
            plain = f"- Error: {text}".encode()
            return Answer(400, plain if accept == "text/plain" else {"errors": [{"message": text}], "warnings": []})
        return Answer(200, {"errors": [], "warnings": []})

    def _resolve(self, repo: str, revision: str, name: str, **_: Any) -> "Answer":
        commit = self._found(repo, revision)
        if commit is None:
            return Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        file = commit[1].get(unquote(name))
        if file is None:
            return Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit[0], "ETag": f'"{_oid(file)}"', "Accept-Ranges": "bytes"}
        if isinstance(file, bytes):
            return Answer(200, file, headers)
        linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        return Answer(302, None, {**headers, **linked, "Location": f"{self.cdn}/blob/{file.sha256}?Signature=aSecret"})

    def _cdn(self, method: str, path: str, body: bytes) -> "Answer":
        _, kind, oid, *part = path.split("/")
        if kind == "upload" and method == "PUT":
            if not part:
                return self._keep(oid, body)
            self._parts[oid, int(part[0])] = body
            return Answer(200, None, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if kind == "blob" and oid in self.blobs:
            return Answer(200, self.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        return Answer(404, {"error": "no such file"})


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "_whoami"),
    ("POST", r"/api/repos/create", "_create"),
    ("POST", r"/api/validate-yaml", "_yaml"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)", "_branch"),
    ("GET", rf"/api/models/{NAME}/auth-check", "_check"),
    ("GET", rf"/api/models/{NAME}/auth-check/write", "_check_write"),
    ("GET", rf"/api/models/{NAME}/refs", "_refs"),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", "_info"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "_tree"),
    ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>[^/]+)", "_paths_info"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "_preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "_batch"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", "_verify"),
    ("POST", r"/api/complete_multipart/(?P<oid>[0-9a-f]+)", "_complete"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "_commit"),
    (("GET", "HEAD"), rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "_resolve"),
)


def who(token: dict[str, Any], user: str = USER, **roles: str) -> dict[str, Any]:
    """Return the Hub's description of a user who is logged in with ``token``, with ``roles`` in organisations."""
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "createdAt": "2026-01-01", **token}}
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": role} for name, role in roles.items()]
    return {"type": "user", "id": "1", "name": user, "fullname": user, "orgs": orgs, "auth": auth}


def fine_grained(*permissions: str, everywhere: Sequence[str] = (), **scopes: Sequence[str]) -> dict[str, Any]:
    """Return the part of a fine-grained token: ``permissions`` on the user's own namespace, others by entity's name.

    An entity's name with "__" is a repository's, with "/".
    """
    scoped = [
        {
            "entity": {"_id": "1", "type": "model" if "__" in name else "org", "name": name.replace("__", "/")},
            "permissions": list(rights),
        }
        for name, rights in scopes.items()
    ]
    if permissions:
        own = {"_id": "1", "type": "user", "name": USER}
        scoped.append({"entity": own, "permissions": list(permissions)})
    rights = {"canReadGatedRepos": False, "global": list(everywhere), "scoped": scoped}
    return {"role": "fineGrained", "fineGrained": rights}


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer_text(file: Pointer) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()


def _oid(file: bytes | Pointer) -> str:
    return file.sha256 if isinstance(file, Pointer) else _git_sha1(file)


def _described(file: bytes | Pointer) -> dict[str, Any]:
    if isinstance(file, bytes):
        return {"size": len(file), "blobId": _git_sha1(file)}
    text = _pointer_text(file)
    lfs = {"size": file.size, "sha256": file.sha256, "pointerSize": len(text)}
    return {"size": file.size, "blobId": _git_sha1(text), "lfs": lfs}


def _entry(name: str, file: bytes | Pointer) -> dict[str, Any]:
    if isinstance(file, bytes):
        return {"type": "file", "path": name, "size": len(file), "oid": _git_sha1(file)}
    text = _pointer_text(file)
    lfs = {"oid": file.sha256, "size": file.size, "pointerSize": len(text)}
    return {"type": "file", "path": name, "size": file.size, "oid": _git_sha1(text), "lfs": lfs}


def _handler(hub: HubServer, part: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each body would wait 40 ms for the acknowledgement of its headers

        def log_message(self, *args: Any) -> None:
            pass

        def do_any(self) -> None:
            split = urlsplit(self.path)
            word = f"{self.command} {split.path}"
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            with hub.lock:
                hub.log.append((part, word, token))
                fault = next((f for f in hub.faults if f.times and re.search(f.pattern, word)), None)
                if fault is not None:
                    fault.times -= 1
            size = int(self.headers.get("Content-Length") or 0)
            if fault is not None and fault.status is None and not fault.late:
                if fault.drips:
                    self.rfile.read(size)
                    self._drip(fault.drips)
                elif fault.cut_after is None:
                    hub.closing.wait(30)
                else:
                    self.rfile.read(min(size, fault.cut_after))
                self.close_connection = True
                return
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
            query = {key: values[-1] for key, values in parse_qs(split.query).items()}
            if fault is None or fault.late:
                accept = self.headers.get("Accept") or ""
                answer = hub.answer(part, self.command, split.path, query, token, body, accept)
            if fault is not None:
                if fault.status is None:
                    self.close_connection = True
                    return
                text = json.dumps(fault.body).replace("{authorization}", self.headers.get("Authorization") or "")
                answer = Answer(fault.status, json.loads(text), fault.headers)
            self._send(answer)

        do_GET = do_HEAD = do_POST = do_PUT = do_any

        def _drip(self, data: bytes) -> None:
            with suppress(OSError):
                while not hub.closing.wait(0.05):
                    self.wfile.write(data)
                    data = b"x"

        def _chunks(self) -> bytes:
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _send(self, answer: Answer) -> None:
            status, headers = answer.status, dict(answer.headers)
            body = answer.body
            data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if isinstance(body, bytes) and wanted:
                first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                status, data = 206, data[first : last + 1]
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            # A redirect from which clients read the file's own headers has the file's length, too, but no body.
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            if self.headers.get("X-Request-Id"):
                self.send_header("X-Request-Id", self.headers["X-Request-Id"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@contextmanager
def running() -> Iterator[HubServer]:
    hub = HubServer()
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in hub._servers]
    for server in hub._servers:
        server.daemon_threads = True
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        for server, thread in zip(hub._servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
