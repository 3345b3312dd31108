"""The blocks for Modular Diffusers draw what the pipeline draws, and load what it saves."""

from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance

from diffusers_eqvae import FlowMatchSDEScheduler
from diffusers_eqvae.pipelines import ClassConditionalBlocks, ClassConditionalPipeline, SigmaIntervalGuidance

from .kinds import make_pipeline


def blocks_of(pipeline, guider=None):
    modular = ClassConditionalBlocks().init_pipeline()
    modular.update_components(**{name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler")})
    modular.update_components(guider=guider or SigmaIntervalGuidance(1.8, (0.0, 0.75)))
    return modular


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(4)]


CALL = {"class_labels": ["otter", 1], "num_images_per_label": 2, "num_inference_steps": 5, "output_type": "pt"}


@pytest.mark.parametrize("kind", ["SiT", "DiT"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_it_draws_what_the_pipeline_draws(kind, stochastic, tiny_autoencoder_kl, tiny_vq_model):
    pipeline = make_pipeline(kind, tiny_autoencoder_kl, tiny_vq_model)
    pipeline.transformer.register_to_config(id2label={0: "otter", 1: "swan"})  # as training leaves it
    if stochastic and kind == "SiT":
        pipeline.scheduler = FlowMatchSDEScheduler()
    guided = {"guidance_scale": 1.8, "guidance_interval": (0.0, 0.75), "sequential_guidance": True}
    expected = pipeline(**CALL, **guided, generator=generators()).images
    drawn = blocks_of(pipeline)(**CALL, generator=generators(), output="images")
    assert torch.equal(drawn, expected) and drawn.std() > 0
    other = blocks_of(pipeline, ClassifierFreeGuidance(guidance_scale=3.0))
    assert not torch.equal(other(**CALL, generator=generators(), output="images"), expected)


def test_it_loads_what_the_pipeline_saves(tmp_path, tiny_autoencoder_kl, tiny_vq_model):
    pipeline = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model)
    pipeline.save_pretrained(tmp_path)
    modular = ClassConditionalBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    assert isinstance(modular.guider, SigmaIntervalGuidance) and modular.guider.guidance_scale == 4.0
    expected = pipeline(**CALL | {"class_labels": [0, 1]}, generator=generators(), sequential_guidance=True).images
    drawn = modular(**CALL | {"class_labels": [0, 1]}, generator=generators(), output="images")
    assert torch.equal(drawn, expected)


def test_parts_are_checked_once_until_one_is_replaced(tiny_autoencoder_kl, tiny_vq_model, monkeypatch):
    """The check hashes the autoencoder's weights, which takes longer than a step."""
    checked = []
    monkeypatch.setattr(ClassConditionalPipeline, "_check_names", lambda self: checked.append(self.scheduler))
    pipeline = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model)
    modular = blocks_of(pipeline)
    checked.clear()
    for _ in range(2):
        modular(**CALL | {"class_labels": [0]}, output="images")
    assert checked == [pipeline.scheduler]
    scheduler = FlowMatchSDEScheduler()
    modular.update_components(scheduler=scheduler)
    modular(**CALL | {"class_labels": [0]}, output="images")
    assert checked[1:] == [scheduler]


def test_a_scheduler_that_chooses_its_steps_and_wrong_parts_are_refused(tiny_autoencoder_kl, tiny_vq_model):
    pytest.importorskip("torchode")
    from diffusers_eqvae.schedulers import FlowMatchAdaptiveScheduler

    pipeline = make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model)
    modular = blocks_of(pipeline)
    modular.update_components(scheduler=FlowMatchAdaptiveScheduler())
    with pytest.raises(ValueError, match=r"FlowMatchAdaptiveScheduler chooses its steps .* take another scheduler"):
        modular(**CALL | {"class_labels": [0, 1]}, output="images")
    with pytest.raises(ValueError, match="class_labels"):
        blocks_of(pipeline)(num_inference_steps=2, output="images")
