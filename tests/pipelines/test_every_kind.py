"""SiT, DiT, LightningDiT and MaskGIT: saved, loaded in a fresh process without a network, the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

from .kinds import KINDS, make_pipeline

CALL = "class_labels=['otter', 2], num_inference_steps=4, guidance_scale=2.0, output_type='np'"
FRESH_PROCESS = f"""
import socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = refuse
import numpy as np, torch, diffusers_eqvae
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("first", "second"):
        images = pipeline(generator=torch.Generator().manual_seed(3), {CALL}).images
        np.save(f"{{directory}}/{{name}}.npy", images)
"""


def test_a_fresh_offline_process_draws_the_same_bits(tiny_autoencoder_kl, tiny_vq_model, tmp_path):
    expected = {}
    for kind in KINDS:
        pipeline = make_pipeline(kind, tiny_autoencoder_kl, tiny_vq_model)
        pipeline.save_pretrained(tmp_path / kind)
        pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
        expected[kind] = pipeline(["otter", 2], generator=torch.Generator().manual_seed(3), **call).images
    finished = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *(str(tmp_path / kind) for kind in KINDS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for kind, images in expected.items():
        assert images.shape == (2, 16, 16, 3) and images.std() > 0.01
        for name in ("first", "second"):
            assert np.array_equal(np.load(tmp_path / kind / f"{name}.npy"), images), kind
    assert len({images.tobytes() for images in expected.values()}) == len(KINDS)
