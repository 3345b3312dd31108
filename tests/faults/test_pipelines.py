"""What people do with a pipeline: compile its parts, look at it from callbacks, decode with something smaller."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.conversion import from_published, to_published
from diffusers_eqvae.images import comparison_rows, to_image, to_uint8
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.flow_matching import FlowMatchingObjective
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.pipelines.sampling import identities, load_pipeline, sample_block
from diffusers_eqvae.provenance import autoencoder_identity, weights_hash
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

CALL = {"num_inference_steps": 2, "guidance_scale": 1.5}


@pytest.fixture
def pipeline(tiny_sit, tiny_autoencoder_kl) -> ClassConditionalPipeline:
    tiny_sit.register_to_config(autoencoder=autoencoder_identity(tiny_autoencoder_kl))
    made = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label={0: "otter"})
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline, **options) -> np.ndarray:
    return pipeline([0, 1], output_type="np", generator=torch.Generator().manual_seed(0), **CALL, **options).images


@pytest.mark.parametrize("parts", [("transformer",), ("vae",), ("transformer", "vae")], ids="+".join)
def test_compiled_parts_are_the_parts_they_were(parts, pipeline, tmp_path):
    expected, made_by = draw(pipeline), identities(pipeline)
    for part in parts:
        setattr(pipeline, part, torch.compile(getattr(pipeline, part), backend="eager"))
    np.testing.assert_allclose(draw(pipeline), expected, atol=1e-5)
    assert identities(pipeline) == made_by and pipeline.id2label == {0: ("otter",)}
    assert pipeline.resolve_class_labels("otter") == [0]
    assert sample_block(pipeline, range(2), range(10), seed=0, **CALL)["arr_0"].shape == (2, 16, 16, 3)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert np.array_equal(draw(load_pipeline(str(tmp_path))), expected)


def test_callbacks_see_steps_and_guidance(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps, pipe.guidance_scale))
        return tensors

    draw(pipeline, callback_on_step_end=look)
    assert seen == [(0, 2, 1.5), (1, 2, 1.5)]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["NaN", "infinity"])
def test_pixels_that_are_not_numbers_are_no_images(output_type, value, pipeline):
    pipeline.vae.decoder.conv_out.bias.data.fill_(value)
    with pytest.raises(ValueError, match=r"AutoencoderKL in torch\.float32 gave NaN or infinity; use float32"):
        pipeline([0], output_type=output_type, **CALL)
    pipeline([0], output_type="latent", **CALL)  # nothing was decoded


def test_an_overflow_in_half_precision_names_it(pipeline):
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.vae.decoder.conv_in.weight.data.mul_(3e6)
    pipeline.vae.to(torch.float16)
    with pytest.raises(ValueError, match=r"AutoencoderKL in torch.float16 gave NaN .* use float32 or bfloat16"):
        sample_block(pipeline, range(1), range(10), seed=0, **CALL)


@pytest.mark.parametrize("make", [to_uint8, to_image], ids=["uint8", "PIL"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_door_makes_bytes_of_what_is_not_a_number(make, dtype):
    pixels = torch.zeros(3, 4, 4, dtype=dtype)
    pixels[0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=f"in {dtype}, gave NaN or infinity; use float32 or bfloat16"):
        make(pixels)


def test_validation_images_of_a_broken_encoder_end_in_a_sentence(tiny_autoencoder_kl):
    tiny_autoencoder_kl.quant_conv.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"in torch.float32, gave NaN or infinity"):
        comparison_rows(tiny_autoencoder_kl, torch.zeros(1, 3, 16, 16))


@pytest.fixture
def preview(tiny_autoencoder_tiny) -> AutoencoderTiny:
    return tiny_autoencoder_tiny


def test_a_preview_decoder_is_an_explicit_choice_and_stated(pipeline, preview, tmp_path):
    without = identities(pipeline)
    assert "preview_decoder" not in without
    pipeline.preview_decoder = preview
    images = draw(pipeline)
    latents = pipeline([0, 1], output_type="latent", generator=torch.Generator().manual_seed(0), **CALL).images
    with torch.no_grad():
        expected = preview.decode(LatentNormalization.from_vae(preview).denormalize(latents)).sample
    np.testing.assert_allclose(images, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert identities(pipeline) == {**without, "preview_decoder": autoencoder_identity(preview)}
    pipeline.save_pretrained(tmp_path)
    assert "preview_decoder" not in json.loads((tmp_path / "model_index.json").read_text())
    pipeline.preview_decoder = None
    pipeline.vae = preview
    with pytest.raises(ValueError, match="does not belong to the transformer"):
        draw(pipeline)


def test_a_preview_decoder_of_other_channels_is_refused(pipeline):
    options = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipeline.preview_decoder = AutoencoderTiny(latent_channels=16, **options, **widths)
    with pytest.raises(ValueError, match="works on 4 latent channels but the AutoencoderTiny has 16"):
        draw(pipeline)


def test_a_pipeline_saved_in_one_variant_is_loaded(pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert np.array_equal(draw(load_pipeline(str(tmp_path))), draw(pipeline))
    assert "weights of the variant fp16 only" in caplog.text
    load_autoencoder(str(tmp_path))


def published(learn_sigma: bool) -> SiTTransformer2DModel:
    """As a conversion of published weights gives it: trained, with a variance that SiT's forward throws away."""
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "num_layers": 1, "num_attention_heads": 6, "attention_head_dim": 64}
    model = SiTTransformer2DModel(num_classes=10, learn_sigma=learn_sigma, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return from_published(to_published(model, "sit"), layout="sit", num_classes=10)


def test_published_weights_with_a_variance_are_trained_by_their_velocity():
    model = published(learn_sigma=True)
    assert model.config.learn_sigma
    batch = {"latents": torch.randn(3, 4, 4, 4), "class_labels": torch.tensor([0, 3, 9])}
    objective = FlowMatchingObjective(model.train())
    drawn = objective.draw(batch, StepRandomness(seed=0))
    loss, _ = objective.total(objective(batch, drawn))
    with torch.no_grad():
        sigma = drawn["sigmas"].view(-1, 1, 1, 1)
        noisy = (1 - sigma) * batch["latents"] + sigma * drawn["noise"]
        output = model(noisy, 1000 * drawn["sigmas"], batch["class_labels"], drop_labels=drawn["drop_labels"]).sample
        assert output.shape[1] == 8
        expected = (output[:, :4] - (drawn["noise"] - batch["latents"])).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    rows = model.proj_out.weight.grad.view(2, 2, 8, -1)  # patch, patch, channels
    assert rows[:, :, :4].abs().sum() > 0 and rows[:, :, 4:].abs().sum() == 0
    before = weights_hash(model)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    assert weights_hash(model) != before
