"""A sweep is the pipeline's own calls from one noise."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_eqvae.pipelines.sampling import sample_generators
from diffusers_eqvae.pipelines.sweep import guidance_sweep
from tests.pipelines.kinds import make_pipeline


def test_each_cell_is_a_call_with_its_scale_and_interval(tiny_autoencoder_kl, tiny_vq_model):
    pipeline = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "np"}
    sweep = guidance_sweep(pipeline, ["otter", 2], guidance_scales=[1, 3], interval_ends=[0.5, 1.0], seed=5, **options)
    for scale, row in zip([1.0, 3.0], sweep, strict=True):
        for end, cell in zip([0.5, 1.0], row, strict=True):
            generator = sample_generators(5, range(2))
            alone = pipeline(
                [0, 2], guidance_scale=scale, guidance_interval=(0.0, end), generator=generator, **options
            )
            assert np.array_equal(alone.images, cell.images) and alone.nfe == cell.nfe
    # Levels 1, .75, .5, .25: two of the four steps lie in [0, .5].
    assert [[cell.nfe for cell in row] for row in sweep] == [[4.0, 4.0], [6.0, 8.0]]
    assert not np.array_equal(sweep[0][1].images, sweep[1][1].images)


def test_an_end_beyond_pure_noise_is_refused(tiny_autoencoder_kl, tiny_vq_model):
    pipeline = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model)
    with pytest.raises(ValueError, match="with 0 <= lo <= hi <= 1"):
        guidance_sweep(pipeline, 1, guidance_scales=[1], interval_ends=[1.5], num_inference_steps=1)
