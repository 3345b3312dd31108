"""A small Hub on 127.0.0.1, standard library only: what `huggingface_hub` asks of huggingface.co for models.

    with HubServer(tokens={"hf_...": "alice"}) as hub:
        subprocess.run([...], env={"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_..."})

Repositories live in memory as commits; large files travel by the LFS protocol and are checked against their sha256.
Reading a public repository needs no token, writing needs the token of the namespace's owner. Error codes and headers
are those that the client turns into RepositoryNotFoundError, RevisionNotFoundError and EntryNotFoundError.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repository import Blob, HubError, Repository

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
MAX_REGULAR_BYTES = 10 * 2**20


class HubServer:
    """Serves until `stop`; `start` listens again on the same ports with everything that was stored.

    `failures` maps a word of a request's path to the status that it is answered with, e.g. {"/commit/": 503}.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: dict[str, int] = {}
        self.lock = threading.RLock()
        self.ports = [0, 0]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def storage(self) -> str:
        """Where large files lie: another address, as on the Hub; the client does not take its token there."""
        return f"http://127.0.0.1:{self.ports[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repositories[repo_id].at(revision).files.items()}

    def start(self) -> HubServer:
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", port), handler) for port in self.ports]
        self.ports = [server.server_address[1] for server in self._servers]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()


class HubRequestHandler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that no connection outlives `HubServer.stop`."""

    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.status = 0
        try:
            with self.hub.lock:
                for part, status in self.hub.failures.items():
                    if part in url.path:
                        raise HubError(status, message="made to fail")
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method:
                        action(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                        break
                else:
                    raise HubError(404, message=f"no such route: {self.command} {url.path}")
        except HubError as error:
            self.answer({"error": error.message}, error.status, code=error.code, message=error.message)
        self.hub.requests.append((self.command, url.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, value: object, status: int = 200, *, code: str = "", message: str = "", **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.status = status
        self.send_response(status)
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message} if message else {}
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return user

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        user, owner = self.user(), repo_id.split("/")[0]
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise HubError(403 if user else 401, message=f"You have no write access to {repo_id}")
        return repository

    # Account and repository

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        owner = wanted["organization"] or user
        if user is None or owner != user:
            raise HubError(403 if user else 401, message=f"You have no rights to create a model under {owner}")
        repo_id = f"{owner}/{wanted['name']}"
        exists = repo_id in self.hub.repositories
        if not exists:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[repo_id] = Repository(repo_id, private)
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if exists else 200)

    def branch(self, repo: str, rev: str) -> None:
        repository = self.repository(repo, write=True)
        if rev in repository.branches:
            raise HubError(409, message=f"Reference already exists: {rev}")
        repository.branches[rev] = repository.at(json.loads(self.body or b"{}").get("startingPoint", "main")).oid
        self.answer({})

    def validate_yaml(self) -> None:
        has_metadata = json.loads(self.body)["content"].startswith("---\n")
        warnings = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer({"errors": [], "warnings": warnings})

    # Upload

    def preupload(self, repo: str, rev: str) -> None:
        files = self.repository(repo, write=True).at(rev).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or path.endswith(".safetensors") or file["size"] > MAX_REGULAR_BYTES else "regular"
            oid = {"oid": files[path].sha256 if files[path].lfs else files[path].oid} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.repository(repo, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                item["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, message=f"content does not have the sha256 {oid}")
        self.hub.large_files[oid] = self.body
        self.answer(b"")

    def commit(self, repo: str, rev: str) -> None:
        repository = self.repository(repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header, operations = lines[0]["value"], lines[1:]
        head = repository.at(rev)
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in self.hub.large_files:
                files[value["path"]] = Blob(self.hub.large_files[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise HubError(400, message=f"cannot commit {key} {value['path']}")
        commit = repository.commit(rev, header["summary"], files)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"
        self.answer({"success": True, "commitOid": commit.oid, "commitUrl": url})

    # Look and download

    def info(self, repo: str, rev: str) -> None:
        repository = self.repository(repo)
        commit = repository.at(rev or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"id": repo, "modelId": repo, "sha": commit.oid, "private": repository.private, "tags": []}
        self.answer(answer | {"siblings": siblings, "lastModified": commit.date})

    def tree(self, repo: str, rev: str, path: str) -> None:
        files = self.repository(repo).at(rev).files
        inside = {name: blob for name, blob in sorted(files.items()) if name.startswith(f"{path}/" if path else "")}
        deep = self.query.get("recursive", "").lower() == "true"
        depth = path.count("/") + 1 if path else 0
        self.answer([blob.describe(name) for name, blob in inside.items() if deep or name.count("/") == depth])

    def paths_info(self, repo: str, rev: str) -> None:
        files = self.repository(repo).at(rev).files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.answer([files[path].describe(path) for path in wanted if path in files])

    def refs(self, repo: str) -> None:
        branches = self.repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self.answer({"branches": listed, "converts": [], "tags": []})

    def commits(self, repo: str, rev: str) -> None:
        history = self.repository(repo).history(rev)
        shared = {"authors": [{"user": repo.split("/")[0]}], "message": ""}
        self.answer([{"id": c.oid, "title": c.title, "date": c.date, **shared} for c in history])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.repository(repo).at(rev)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        blob = commit.files[path]
        if not blob.lfs:
            return self.send_content(blob.content, ETag=f'"{blob.oid}"', **headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return self.answer(b"", 302, Location=f"{self.hub.storage}/lfs/{blob.sha256}", **headers)

    def lfs_get(self, oid: str) -> None:
        if oid not in self.hub.large_files:
            raise HubError(404, message="no such object")
        self.send_content(self.hub.large_files[oid], ETag=f'"{oid}"')

    def send_content(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(content, Accept_Ranges="bytes", **headers)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            return self.answer(b"", 416, Content_Range=f"bytes */{len(content)}")
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(content[first : last + 1], 206, **headers)


_REV, _PATH, _OID = r"(?P<rev>[^/]+)", r"(?P<path>.+)", r"(?P<oid>[0-9a-f]{64})"
_MODEL = rf"/api/models/{REPO}"
ROUTES = (
    ("GET", "/api/whoami-v2", HubRequestHandler.whoami),
    ("POST", "/api/repos/create", HubRequestHandler.create),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_yaml),
    ("POST", rf"{_MODEL}/branch/{_REV}", HubRequestHandler.branch),
    ("POST", rf"{_MODEL}/preupload/{_REV}", HubRequestHandler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REV}", HubRequestHandler.commit),
    ("POST", rf"{_MODEL}/paths-info/{_REV}", HubRequestHandler.paths_info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", HubRequestHandler.lfs_batch),
    ("PUT", f"/lfs/{_OID}", HubRequestHandler.lfs_put),
    ("GET HEAD", f"/lfs/{_OID}", HubRequestHandler.lfs_get),
    ("GET", rf"{_MODEL}(?:/revision/{_REV})?", HubRequestHandler.info),
    ("GET", rf"{_MODEL}/tree/{_REV}(?:/{_PATH})?", HubRequestHandler.tree),
    ("GET", rf"{_MODEL}/refs", HubRequestHandler.refs),
    ("GET", rf"{_MODEL}/commits/{_REV}", HubRequestHandler.commits),
    ("GET HEAD", rf"/{REPO}/resolve/{_REV}/{_PATH}", HubRequestHandler.resolve),
)
