"""Whose a directory is, who writes there now, and what may be replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from diffusers_eqvae import directories
from diffusers_eqvae.directories import (
    LOCK,
    RECORD,
    DirectoryLock,
    OutputDirectory,
    require_apart,
    require_replaceable,
    written_names,
)

HOLDS_IT = """
import sys, time
from diffusers_eqvae.directories import DirectoryLock
lock = DirectoryLock(sys.argv[1]); lock.acquire(); print("held", flush=True); sys.stdin.readline(); raise RuntimeError
"""


@pytest.fixture
def holder(tmp_path):
    """Another program that holds the lock of tmp_path, as far as the lock says."""
    process = subprocess.Popen(["sleep", "60"])
    owner = {**directories._this_process(), "pid": process.pid, "token": "its own", "since": "today"}
    owner["start_time"] = directories._start_time(process.pid)
    (tmp_path / LOCK).write_text(json.dumps(owner))
    yield process
    process.kill()
    process.wait()


def change(lock, **changes):
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))


def test_a_second_program_is_refused_with_the_first_ones_name(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"written to by process {holder.pid} on .*break_lock=True"):
        DirectoryLock(tmp_path).acquire()
    assert holder.poll() is None and [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_owner_is_followed_at_once(tmp_path, holder, reaped):
    holder.kill()
    time.sleep(0.2)
    if reaped:
        holder.wait()
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "changes",
    [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": None}],
    ids=["another machine", "another container", "a system that does not say"],
)
def test_an_owner_elsewhere_is_followed_when_it_has_been_silent_for_long(tmp_path, holder, changes):
    lock = tmp_path / LOCK
    change(lock, pid=2**22 + 1, **changes)
    with pytest.raises(ValueError, match="is being written to by"):
        DirectoryLock(tmp_path).acquire()
    os.utime(lock, (time.time() - 590,) * 2)
    with pytest.raises(ValueError, match=r"last heard of 5\d\d s ago"):
        DirectoryLock(tmp_path).acquire()
    os.utime(lock, (time.time() - 610,) * 2)
    DirectoryLock(tmp_path).acquire()


def test_a_new_process_of_the_same_number_is_not_the_owner(tmp_path, holder):
    change(tmp_path / LOCK, start_time="1")
    DirectoryLock(tmp_path).acquire()


def test_a_lock_without_a_word_is_one_still_being_written(tmp_path):
    (tmp_path / LOCK).write_text("")
    with pytest.raises(ValueError, match="has not said its name"):
        DirectoryLock(tmp_path).acquire()
    DirectoryLock(tmp_path).acquire(break_lock=True)


def test_a_lock_is_touched_and_one_that_was_broken_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "HEARTBEAT_SECONDS", 0.01)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    time.sleep(0.2)
    assert (tmp_path / LOCK).stat().st_mtime > 1
    lock.require()
    DirectoryLock(tmp_path).acquire()  # the same program began anew
    with pytest.raises(ValueError, match="taken over by another program"):
        lock.require()
    lock.release()
    assert (tmp_path / LOCK).exists()


def test_two_programs_and_the_end_of_the_first(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", HOLDS_IT, tmp_path], text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"written to by process {process.pid} on "):
            DirectoryLock(tmp_path).acquire()
    assert process.returncode == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../precious", "/etc", "a/b", "..", "", 3, "a\0b"])
def test_a_record_that_names_what_is_not_in_its_directory_is_refused(tmp_path, name):
    """What a record names may be deleted, and a directory may be anybody's."""
    (tmp_path / "precious").mkdir()
    run = tmp_path / "run"
    OutputDirectory(run, kind="run").claim("vae")
    content = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps({**content, "names": ["vae", name]}))
    with pytest.raises(ValueError, match=r"which is not in its directory; choose another directory"):
        OutputDirectory(run, kind="run")
    with pytest.raises(ValueError, match=r"which is not in its directory"):
        written_names(run)


def test_what_cannot_be_read_is_not_ones_own(tmp_path):
    (tmp_path / "x.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.md exists, and is not what this command wrote before"):
        require_replaceable(tmp_path / "x.md", ours=lambda path: path.read_text().startswith("ours"))


@pytest.mark.parametrize("name", ["vae", "notes.txt", ".git"])
def test_a_directory_of_somebody_else_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds {name} and no {RECORD}.*choose a new or an empty directory"):
        OutputDirectory(tmp_path, kind="run")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "empty"])
def test_nothing_is_written_before_the_claim_and_only_ones_own_is_replaced_after_it(tmp_path, absent):
    path = tmp_path / "new" / "run" if absent else tmp_path
    output = OutputDirectory(path, kind="run")
    assert not list(tmp_path.iterdir())
    output.claim("vae")
    (path / "vae").mkdir()
    (path / "config.json").write_text("yours")
    with pytest.raises(ValueError, match=r"holds config.json, which this program has not written"):
        output.add("vae", "config.json")
    output.delete("vae", "config.json")
    assert (path / "config.json").read_text() == "yours" and not (path / "vae").exists()
    output.release()
    again = OutputDirectory(path, kind="run")
    assert again.names == ["vae"] and not again.is_new


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 1, "kind": "store", "names": []}', "is a store, and this would be a run"),
        ('{"format_version": 2, "kind": "run", "names": []}', "newer than 1"),
        ('{"format_version": 1', "is damaged"),
        ('["run"]', "is damaged"),
    ],
    ids=["another kind", "newer", "cut", "another shape"],
)
def test_a_record_that_says_something_else_is_believed(tmp_path, content, message):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=message):
        OutputDirectory(tmp_path, kind="run")


def test_what_a_killed_program_was_writing_is_removed_by_its_heir_only(tmp_path):
    OutputDirectory(tmp_path, kind="run").claim()
    for name in (".0123456789abcdef.tmp", "notes.tmp"):
        (tmp_path / name).write_text("")
    output = OutputDirectory(tmp_path, kind="run")
    assert (tmp_path / ".0123456789abcdef.tmp").exists()
    output.claim()
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, LOCK, "notes.tmp"]


@pytest.fixture
def places(tmp_path):
    """A folder of images, a model, a run of ours with a model inside, and links to them."""
    for folder in ("images/cats", "model", "run/vae"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / RECORD).write_text("{}")
    (tmp_path / "weights.pth").write_text("")
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "source", "relation"),
    [
        ("images", "images", "is"),
        ("images/../images", "images", "is"),
        ("images", "linked", "is"),
        ("linked", "images", "is"),
        ("linked/run", "images", "lies in"),
        ("images/run", "images", "lies in"),
        ("model/samples", "model", "lies in"),
        ("run", "run/vae", "holds"),
        ("weights.pth", "weights.pth", "is"),
        ("run/samples", "run", None),
        ("images2", "images", None),
        ("absent", "absent", None),
    ],
)
def test_what_is_read_is_never_written_to(places, output, source, relation):
    inputs = {"vae": places / source, "nothing": None}
    if relation is None:
        require_apart(places / output, inputs)
    else:
        with pytest.raises(ValueError, match=rf"{relation} .*which is read here \(vae\)"):
            require_apart(places / output, inputs)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["there.json"], "exists, and is not what this command wrote"),
        (["new.json", "there.json"], "exists, and is not what this command wrote"),
        (["new.json", "./new.json"], "written twice"),
        (["folder"], "it is a folder"),
        (["there.json/card.json"], "is not a directory"),
        (["x" * 300 + ".json"], "File name too long"),
        (["null\0byte.json"], "cannot be written"),
        (["read.json"], r"is read here \(config\)"),
    ],
    ids=["foreign", "foreign beside", "twice", "folder", "below a file", "too long", "null byte", "input"],
)
def test_a_file_is_replaced_only_by_its_own_program(tmp_path, paths, message):
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "read.json").write_text("ours")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        require_replaceable(
            f"{tmp_path}/{paths[0]}",
            companions=[f"{tmp_path}/{path}" for path in paths[1:]],
            inputs={"config": tmp_path / "read.json"},
            ours=lambda path: path.read_text() == "ours",
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_of_ones_own_is_replaced_with_what_lies_beside_it(tmp_path):
    card, image = tmp_path / "card.json", tmp_path / "card.png"
    card.write_text("ours")
    image.write_text("")
    require_replaceable(card, companions=[image], ours=lambda path: path.read_text() == "ours")
    require_replaceable(tmp_path / "new" / ("x" * 250 + ".json"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [".card.json.{pid}.tmp", ".card.json.tmp"])
def test_a_link_under_a_foreseeable_name_is_not_followed(tmp_path, name):
    from diffusers_eqvae.files import write_json

    (tmp_path / "precious").write_text("precious")
    (tmp_path / name.format(pid=os.getpid())).symlink_to(tmp_path / "precious")
    write_json(tmp_path / "card.json", {})
    assert (tmp_path / "precious").read_text() == "precious"
