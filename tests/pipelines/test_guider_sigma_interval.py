"""The guider of diffusers that counts in noise levels: what it computes, when, and that it survives a save."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ClassifierFreeGuidance

import diffusers_eqvae
from diffusers_eqvae.guidance import IntervalGuidance
from diffusers_eqvae.pipelines import SigmaIntervalGuidance

NULL = 10
LABELS = torch.tensor([3, 5])


def denoiser(latents, timestep, labels):
    return torch.sin(latents * labels.view(-1, 1, 1, 1)) + timestep.view(-1, 1, 1, 1) / 1000


def predict(guider, latents, timestep, calls):
    """One step of a loop as Modular Diffusers' denoising blocks write it."""
    guider.set_state(step=0, num_inference_steps=4, timestep=timestep)
    batches = guider.prepare_inputs({"class_labels": (LABELS, torch.full_like(LABELS, NULL))})
    for batch in batches:
        calls.append(batch.class_labels.tolist())
        batch.noise_pred = denoiser(latents, timestep.expand(2), batch.class_labels)
    return guider(batches).pred


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.8])
@pytest.mark.parametrize("interval", [(0.0, 0.75), (0.25, 0.5), (0.0, 1.0), (0.5, 0.5)])
def test_it_computes_what_interval_guidance_does_and_skips_what_that_skips(scale, interval):
    guider = SigmaIntervalGuidance(guidance_scale=scale, guidance_interval=interval)
    ours = IntervalGuidance(denoiser, guidance_scale=scale, guidance_interval=interval, null_class=NULL, batched=False)
    latents, calls = torch.randn(2, 4, 3, 3), []
    for timestep in torch.tensor([1000.0, 750.0, 500.0, 250.0, 249.0, 0.0]):
        assert torch.equal(predict(guider, latents, timestep, calls), ours(latents, float(timestep) / 1000, LABELS))
    assert len(calls) == ours.nfe
    assert {tuple(call) for call in calls} <= {tuple(LABELS.tolist()), (NULL, NULL)}


def test_it_goes_by_the_noise_level_wherever_the_step_is():
    guider = SigmaIntervalGuidance(guidance_interval=(0.0, 0.75), num_train_timesteps=4000)
    for step in (0, 49):
        for timestep, conditions in ((3001, 1), (3000, 2)):
            guider.set_state(step=step, num_inference_steps=50, timestep=torch.tensor(timestep))
            assert guider.num_conditions == conditions
    guider.disable()
    assert guider.num_conditions == 1


def test_it_is_saved_and_loaded_with_its_interval(tmp_path, caplog):
    guider = SigmaIntervalGuidance(guidance_scale=1.8, guidance_interval=(0.1, 0.7))
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    options = {key: value for key, value in saved.items() if not key.startswith("_")}
    expected = {"guidance_scale": 1.8, "guidance_interval": [0.1, 0.7], "num_train_timesteps": 1000, "enabled": True}
    assert options == expected and saved["_class_name"] == "SigmaIntervalGuidance"
    for loaded in (SigmaIntervalGuidance.from_pretrained(tmp_path), guider.new()):
        assert (loaded.guidance_scale, loaded.guidance_interval) == (1.8, (0.1, 0.7))
    assert guider.new(guidance_interval=(0.0, 1.0)).guidance_interval == (0.0, 1.0)
    assert isinstance(loaded, ClassifierFreeGuidance)
    assert diffusers_eqvae.SigmaIntervalGuidance is SigmaIntervalGuidance
    with pytest.raises(ValueError, match=r"0 <= lo <= hi <= 1; got \(0\.9, 0\.1\)"):
        SigmaIntervalGuidance(guidance_interval=(0.9, 0.1))
