"""A small Hub on 127.0.0.1, standard library only: what `huggingface_hub` asks of huggingface.co for models.

    with HubServer(tokens={"hf_...": "alice"}) as hub:
        subprocess.run([...], env={"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_..."})

Repositories live in memory as commits. Reading a public repository needs no token, writing needs the token of the
namespace's owner. Error codes and headers are those that the client turns into its own exceptions. Every file travels
inside the commit: the server decides that, and says that no file is an LFS file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubError(Exception):
    """An answer other than success: HTTP status, a message and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    """Files of every commit by its id, the newest commit of every branch, and the titles of all commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        self.titles.append(title)
        oid = hashlib.sha1(repr((self.titles, sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def oid(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer:
    """Serves until `stop`; `start` listens again on the same port with everything that was stored.

    `failures` maps a word of a request's path to the status that it is answered with, e.g. {"/commit/": 503}.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int] = {}
        self.lock = threading.RLock()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.oid(revision)]

    def start(self) -> HubServer:
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()


class HubRequestHandler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that no connection outlives `HubServer.stop`."""

    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.hub.lock:
                self.hub.requests.append(path)
                path = path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")  # one room for both
                for part, status in self.hub.failures.items():
                    if part in path:
                        raise HubError(status, "made to fail")
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        return action(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                raise HubError(404, f"no such route: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            return self.answer({"error": str(error)}, error.status, **headers)

    do_GET = do_HEAD = do_POST = handle_request

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is not None and header.removeprefix("Bearer ") not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return header and self.hub.tokens[header.removeprefix("Bearer ")]

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        user, owner = self.user(), repo_id.split("/")[0]
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403 if user else 401, f"You have no write access to {repo_id}")
        return repository

    def whoami(self) -> None:
        self.answer({"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        owner = wanted["organization"] or user
        if user is None or owner != user:
            raise HubError(403 if user else 401, f"You have no rights to create a model under {owner}")
        repo_id = f"{owner}/{wanted['name']}"
        exists = repo_id in self.hub.repositories
        if not exists:
            repository = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
            repository.commit("main", "initial commit", {".gitattributes": b""})
            self.hub.repositories[repo_id] = repository
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if exists else 200)

    def branch(self, repo: str, rev: str) -> None:
        repository = self.repository(repo, write=True)
        repository.branches.setdefault(rev, repository.branches["main"])
        self.answer({})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, rev: str) -> None:
        self.repository(repo, write=True).oid(rev)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def commit(self, repo: str, rev: str) -> None:
        repository = self.repository(repo, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line]
        files = dict(repository.commits[repository.oid(rev)])
        for operation in operations:
            if operation["key"] != "file":
                raise HubError(400, f"cannot commit {operation}")
            files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        oid = repository.commit(rev, header["value"]["summary"], files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def info(self, repo: str, rev: str) -> None:
        oid = self.repository(repo).oid(rev or "main")
        siblings = [{"rfilename": path} for path in sorted(self.hub.files(repo, oid))]
        self.answer({"id": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, rev: str) -> None:
        """Of the whole repository; the client always asks for that."""
        files = self.hub.files(repo, self.repository(repo).oid(rev))
        listed = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in sorted(files.items())]
        self.answer([{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in listed])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        oid = self.repository(repo).oid(rev)
        content = self.hub.files(repo, oid).get(path)
        if content is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.answer(content, **{"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


_REPO, _REV = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", HubRequestHandler.whoami),
    ("POST", "/api/repos/create", HubRequestHandler.create),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/{_REV}", HubRequestHandler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REV}", HubRequestHandler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REV}", HubRequestHandler.commit),
    ("GET", rf"/api/models/{_REPO}(?:/revision/{_REV})?", HubRequestHandler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REV}", HubRequestHandler.tree),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", HubRequestHandler.resolve),
)
