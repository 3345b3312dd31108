"""Every class of autoencoders on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .classes_worker import TINY, gradients
from .trajectories import ROOT, torchrun


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_batch_for_every_class(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "gradients.json"
    finished = torchrun(Path(__file__).with_name("classes_worker.py"), [str(output)], processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found.keys() == TINY.keys()
    for name, norms in found.items():
        assert norms == pytest.approx(gradients(name), rel=1e-3, abs=1e-6), name
