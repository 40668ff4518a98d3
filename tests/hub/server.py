"""A small Hub on loopback: as much of the Hugging Face Hub's HTTP interface as its client uses for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_for_tests"
USER = "user"
# The Hub's default .gitattributes sends these to large-file storage.
LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Repository:
    """A model repository: commits, each a whole tree of files, and the branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{branch}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Hub:
    """What the server holds, and which requests it got."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@contextmanager
def serve() -> Iterator[tuple[str, Hub]]:
    """Run a Hub on a free port of the loopback interface; gives its address and what it holds."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{method} {path}")
        try:
            for route_method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in route_method.split("|"):
                    large_file = path.startswith("/large/")  # its address is a signed one on the real Hub
                    if method in ("POST", "PUT") and not large_file:
                        self._check_token()
                    action(self, **{key: value for key, value in match.groupdict().items() if value is not None})
                    return
            self.hub.unknown.append(f"{method} {path}")
            raise HubError(404, "RouteNotFound", f"This server does not know {method} {path}.")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "InvalidToken", "Invalid credentials in Authorization header")

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if repo not in self.hub.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        repository = self.hub.repositories[repo]
        sha = repository.sha(revision)
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[repo] = Repository()
            self.hub.repositories[repo].commit("main", {})
        self._json({"url": f"{self._address}/{repo}", "name": repo, "id": repo}, status)

    def branch(self, repo: str, revision: str) -> None:
        sha, _ = self._tree(repo, json.loads(self.body).get("startingPoint", "main"))
        branches = self.hub.repositories[repo].branches
        status = 409 if revision in branches else 200
        branches.setdefault(revision, sha)
        self._json({}, status)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        warnings = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        try:
            yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": str(error)}], "warnings": warnings}, 400)
            return
        self._json({"errors": [], "warnings": warnings})

    def preupload(self, repo: str, revision: str) -> None:
        self._tree(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def large_batch(self, repo: str) -> None:
        self._tree(repo, "main")
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = (
                {} if item["oid"] in self.hub.large else {"upload": {"href": f"{self._address}/large/{item['oid']}"}}
            )
            objects.append({**item, **({"actions": upload} if upload else {})})
        self._json({"transfer": "basic", "objects": objects})

    def large_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadObject", "The content is not what was announced")
        self.hub.large[oid] = self.body
        self._send(200)

    def large_file(self, oid: str) -> None:
        self._send(200, self.hub.large[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo: str, revision: str) -> None:
        _, tree = self._tree(repo, revision)
        files = dict(tree)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repositories[repo].commit(revision, files)
        self._json({"commitUrl": f"{self._address}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _info(self, repo: str, revision: str) -> dict[str, Any]:
        sha, files = self._tree(repo, revision)
        block = re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL)
        card = (yaml.safe_load(block[1]) if block else None) or {}
        tags = [*card.get("tags", []), *([card["library_name"]] if "library_name" in card else [])]
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {"id": repo, "sha": sha, "siblings": siblings, "tags": tags, "cardData": card, "private": False}

    def info(self, repo: str, revision: str = "main") -> None:
        self._json(self._info(repo, revision))

    def models(self) -> None:
        infos = [self._info(repo, "main") for repo in self.hub.repositories]
        self._json([info for info in infos if set(self.query.get("filter", [])) <= set(info["tags"])])

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self._tree(repo, revision)
        inside = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self._json([_entry(name, data) for name, data in sorted(inside.items())])

    def paths(self, repo: str, revision: str) -> None:
        _, files = self._tree(repo, revision)
        wanted = json.loads(self.body)["paths"]
        self._json([_entry(name, files[name]) for name in wanted if name in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self._tree(repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            self._send(200, data, {**headers, "ETag": f'"{_blob_id(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        # On the real Hub, this is another host: asking for metadata, the client follows redirects within one host only.
        port = self.headers["Host"].rpartition(":")[2]
        self._send(302, b"", {**headers, **linked, "Location": f"http://localhost:{port}/large/{oid}"})


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/models", _Handler.models),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.large_batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", _Handler.large_upload),
    ("GET|HEAD", "/large/(?P<oid>[0-9a-f]{64})", _Handler.large_file),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
