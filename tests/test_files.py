"""Files are whole or absent, whatever ends their writing."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_eqvae import files


def test_a_written_file_takes_its_name_and_leaves_no_sibling(tmp_path):
    path = tmp_path / "new" / "folder" / "card.json"
    with files.atomic_path(path) as sibling:
        sibling.write_text("half")
        assert not path.exists() and sibling.suffix == files.UNFINISHED
        sibling.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_halfway_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as sibling:
        sibling.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_halfway_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    halfway = f"""
import os, signal
from diffusers_eqvae.files import atomic_path
with atomic_path({str(path)!r}) as sibling:
    sibling.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", halfway]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".") and left.suffix == files.UNFINISHED


def test_the_content_is_on_disk_before_the_name_is_and_the_name_after_it(tmp_path, monkeypatch):
    order, flush, replace = [], files.flush_to_disk, os.replace
    monkeypatch.setattr(files, "flush_to_disk", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append("renamed"), replace(source, target)))
    files.write_text(tmp_path / "name", "text")
    assert order[1:] == ["renamed", tmp_path.name] and order[0].endswith(files.UNFINISHED)


def test_files_inside_folders_are_flushed_too(tmp_path, monkeypatch):
    (tmp_path / "transformer").mkdir()
    for name in ("config.json", "transformer/weights"):
        (tmp_path / name).write_text("x")
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    files.flush_tree(tmp_path)
    assert len(flushed) == 4  # two files, two folders


def test_many_small_files_are_whole_but_not_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with files.atomic_path(tmp_path / "000000.png", durable=False) as sibling:
        sibling.write_text("whole")
        assert not (tmp_path / "000000.png").exists()
    assert (tmp_path / "000000.png").read_text() == "whole" and not flushed
    files.write_text(tmp_path / "card.json", "{}")
    assert len(flushed) == 2


def test_a_directory_is_replaced_as_a_whole_and_deleted_under_another_name(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, name in ((new, "fresh"), (old, "stale")):
        folder.mkdir()
        (folder / name).touch()
    files.replace_directory(new, old)
    assert [path.name for path in old.iterdir()] == ["fresh"] and list(tmp_path.iterdir()) == [old]
    deleted = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: deleted.append((path.name, old.exists())))
    files.delete(old)
    assert deleted[-1][0].endswith(files.UNFINISHED) and not deleted[-1][1]


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_weights_are_read_as_tensors_only(tmp_path, capsys):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    for suffix in ("pth", "safetensors"):
        read = files.read_weights(tmp_path / f"x.{suffix}")
        assert list(read) == ["a"] and torch.equal(read["a"], tensors["a"])
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"x.{suffix}").read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"cut.* is not read: it is damaged"):
            files.read_weights(cut)
    torch.save({"a": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile\.pth is not read: it needs code"):
        files.read_weights(tmp_path / "hostile.pth")
    assert capsys.readouterr().out == ""
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold tensors by name; it holds a list"):
        files.read_weights(tmp_path / "list.pth")


def test_json_has_no_word_for_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), np.float64(2.0))}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5, None], "b": {"c": [None, 2.0]}}


def test_npz_has_the_arrays_that_were_given(tmp_path):
    files.write_npz(tmp_path / "x.npz", a=np.arange(3), name="three")
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["a"].tolist() == [0, 1, 2] and str(archive["name"]) == "three"


def test_older_and_newer_formats_are_told_apart():
    files.require_format_version(2, 2, path="x.json", remedy="make it again")
    for found in (1, None, "1"):
        with pytest.raises(ValueError, match=f"x.json has format_version {found}, older than 2, .*: make it again"):
            files.require_format_version(found, 2, path="x.json", remedy="make it again")
    with pytest.raises(ValueError, match="format_version 3, newer than 2: update diffusers_eqvae"):
        files.require_format_version(3, 2, path="x.json", remedy="make it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is not a whole JSON file: Expecting value", id="empty"),
        pytest.param(b'{"a": ', "is not a whole JSON file: Expecting value", id="cut short"),
        pytest.param(b"\xff\xfe{}", "is not a whole JSON file: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"[" * 100_000, "is not a whole JSON file: maximum recursion depth", id="nested without end"),
        pytest.param(b"9" * 5000, "is not a whole JSON file: Exceeds the limit", id="a number of 5000 digits"),
        pytest.param(b"[1]", r"must hold a JSON object \({...}\); it holds a list", id="a list"),
        pytest.param(b"null", r"must hold a JSON object \({...}\); it holds a NoneType", id="null"),
    ],
)
def test_json_that_is_not_an_object_is_named(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json {message}"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="it is a folder, a pipe or a device"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"x\.pth is not a file of weights"):
        files.read_weights(tmp_path / "x.pth")
