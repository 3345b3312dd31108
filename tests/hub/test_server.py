"""The Hub of these tests behaves as huggingface_hub expects of the real one: answers, ranges and error codes."""

import json
import urllib.error
import urllib.request

import pytest

from tests.hub.conftest import OWNER, TOKEN

REPO = f"{OWNER}/notes"


@pytest.fixture(scope="module")
def notes(hub, owner, tmp_path_factory):
    """A repository with a small and a large file."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("small")
    (folder / "sub/large.safetensors").write_bytes(bytes(range(256)))
    owner.call("api", method="create_repo", repo_id=REPO)
    owner.call("api", method="upload_folder", repo_id=REPO, folder_path=str(folder))
    return hub.repositories[REPO]


def ask(hub, path, *, method="GET", body=None, token=None, **headers):
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.endpoint + path, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_the_client_reads_back_what_it_wrote(hub, owner, notes):
    assert set(owner.call("api", method="list_repo_files", repo_id=REPO)) == set(hub.files(REPO))
    assert owner.call("api", method="file_exists", repo_id=REPO, filename="sub/large.safetensors") == "True"
    (info,) = owner.call("api", method="get_paths_info", repo_id=REPO, paths=["sub/large.safetensors", "none"])
    assert "size=256" in info
    assert "lfs" in info
    commits = owner.call("api", method="list_repo_commits", repo_id=REPO)
    assert len(commits) == 2
    assert notes.branches["main"] in commits[0]
    assert "refs/heads/main" in owner.call("api", method="list_repo_refs", repo_id=REPO)


def test_errors_are_those_of_the_hub(owner, stranger, notes):
    assert stranger.call("api", method="model_info", repo_id="nobody/nothing") == "RepositoryNotFoundError"
    assert owner.call("api", method="model_info", repo_id=f"{OWNER}/nothing") == "RepositoryNotFoundError"
    assert owner.call("api", method="model_info", repo_id=REPO, revision="nowhere") == "RevisionNotFoundError"
    download = {"method": "hf_hub_download", "repo_id": REPO}
    assert owner.call("api", **download, filename="nothing.txt") == "RemoteEntryNotFoundError"
    assert stranger.call("api", method="whoami") == "LocalTokenNotFoundError"
    upload = {"method": "upload_file", "path_or_fileobj": "x", "path_in_repo": "x", "repo_id": REPO}
    assert stranger.call("api", **upload | {"path_or_fileobj": __file__}) != "None"
    assert "x" not in notes.at("main").files


def test_private_repositories_are_hidden(hub, owner, stranger):
    owner.call("api", method="create_repo", repo_id=f"{OWNER}/secret", private=True)
    assert stranger.call("api", method="model_info", repo_id=f"{OWNER}/secret") == "RepositoryNotFoundError"
    assert f"{OWNER}/secret" in owner.call("api", method="model_info", repo_id=f"{OWNER}/secret")


def test_ranges_etags_and_redirects(hub, notes):
    head = notes.branches["main"]
    status, headers, content = ask(hub, f"/{REPO}/resolve/main/a.txt", Range="bytes=1-2")
    assert (status, content, headers["Content-Range"]) == (206, b"ma", "bytes 1-2/5")
    assert headers["X-Repo-Commit"] == head
    assert headers["ETag"] == f'"{notes.at("main").files["a.txt"].oid}"'
    status, _, content = ask(hub, f"/{REPO}/resolve/{head}/sub%2Flarge.safetensors", Range="bytes=250-")
    assert (status, content) == (206, bytes(range(250, 256)))
    assert ask(hub, f"/{REPO}/resolve/main/a.txt", Range="bytes=9-")[0] == 416
    assert ask(hub, f"/{REPO}/resolve/main/a.txt", method="HEAD")[2] == b""


def test_wrong_content_wrong_parent_and_unknown_objects_are_refused(hub, notes):
    assert ask(hub, f"/lfs/{'0' * 64}", method="PUT", body=b"something else")[0] == 400
    assert "0" * 64 not in hub.large_files
    path = f"/api/models/{REPO}/commit/main"

    def commit(operation, **header):
        lines = [{"key": "header", "value": {"summary": "s", **header}}, operation]
        body = "\n".join(map(json.dumps, lines)).encode()
        return ask(hub, path, method="POST", body=body, token=TOKEN)[0]

    file = {"key": "file", "value": {"path": "b.txt", "content": "YQ=="}}
    assert commit(file, parentCommit="f" * 40) == 412
    assert commit({"key": "lfsFile", "value": {"path": "c", "oid": "0" * 64}}) == 400
    assert commit(file, parentCommit=notes.branches["main"]) == 200
    assert hub.files(REPO)["b.txt"] == b"a"
