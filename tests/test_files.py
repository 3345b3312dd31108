"""Files are whole or absent, whatever ends their writing."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from diffusers_eqvae import files


def test_a_written_file_takes_its_name_and_leaves_no_sibling(tmp_path):
    path = tmp_path / "new" / "folder" / "card.json"
    with files.written_aside(path) as sibling:
        sibling.write_text("half")
        assert not path.exists() and sibling.suffix == files.UNFINISHED
        sibling.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_halfway_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.written_aside(path) as sibling:
        sibling.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_halfway_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    halfway = f"""
import os, signal
from diffusers_eqvae.files import written_aside
with written_aside({str(path)!r}) as sibling:
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
    assert order == [f".name.{os.getpid()}.tmp", "renamed", tmp_path.name]


def test_json_has_no_word_for_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), np.float64(2.0))}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5, None], "b": {"c": [None, 2.0]}}


def test_npz_has_the_arrays_that_were_given(tmp_path):
    files.write_npz(tmp_path / "x.npz", a=np.arange(3), name="three")
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["a"].tolist() == [0, 1, 2] and str(archive["name"]) == "three"


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    files.require_writable(tmp_path / "new" / "card.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "card.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be written"):
            files.require_writable(path)
