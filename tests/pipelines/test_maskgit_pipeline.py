"""MaskGITPipeline: guidance that rises, known tokens that stay, parts that do not fit, and a fresh process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_eqvae.pipelines.pipeline_maskgit import MaskGITPipeline
from diffusers_eqvae.pipelines.sampling import load_pipeline, sample_generators
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_maskgit import MaskGITScheduler
from diffusers_eqvae.tokens import decode_tokens, encode_tokens


@pytest.fixture
def pipeline(tiny_maskgit, tiny_vq_model):
    torch.nn.init.normal_(tiny_maskgit.logit_bias)
    tiny_maskgit.register_to_config(autoencoder=autoencoder_identity(tiny_vq_model))
    made = MaskGITPipeline(tiny_maskgit, tiny_vq_model, MaskGITScheduler(), id2label={0: "cat"})
    made.set_progress_bar_config(disable=True)
    return made


def tokens_of(pipeline, labels=(0, 1, 2), **options):
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": sample_generators(0, [0, 1, 2])} | options
    return pipeline(list(labels), output_type="latent", **options)


def remember_calls(pipeline) -> list[tuple[int, torch.Tensor]]:
    """Batch size and labels of every call of the transformer, from now on."""
    calls, forward = [], pipeline.transformer.forward

    def remembering(tokens, timestep, class_labels, **options):
        calls.append((len(tokens), class_labels))
        return forward(tokens, timestep, class_labels, **options)

    pipeline.transformer.forward = remembering
    return calls


def test_images_are_the_decoded_tokens(pipeline):
    tokens = tokens_of(pipeline).images
    assert tokens.shape == (3, 4, 4) and tokens.dtype == torch.int64 and 0 <= tokens.min() <= tokens.max() < 16
    images = pipeline(
        [0, 1, 2],
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=sample_generators(0, [0, 1, 2]),
        output_type="pt",
    ).images
    with torch.no_grad():
        expected = (decode_tokens(pipeline.vae, tokens) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images, expected)


def test_guidance_rises_from_none_to_all_of_it(pipeline):
    """The first step is the conditional one, and costs half; the last has the whole scale."""
    scales, steps = [], 5
    pipeline.scheduler.set_timesteps(steps)
    scales = [pipeline._guidance_scale(4.0, step) for step in range(steps)]
    assert scales == [1.0, 1.75, 2.5, 3.25, 4.0]
    calls = remember_calls(pipeline)
    output = tokens_of(pipeline, num_inference_steps=steps, guidance_scale=4.0)
    assert [size for size, _ in calls] == [3, 6, 6, 6, 6] and output.nfe == 2 * steps - 1
    assert calls[1][1].tolist() == [0, 1, 2, 3, 3, 3]
    # So one that never rises is the conditional one, and a call of a single step has the whole scale.
    assert tokens_of(pipeline, guidance_scale=1.0).nfe == 4
    assert pipeline._guidance_scale(4.0, 0) == 1.0
    pipeline.scheduler.set_timesteps(1)
    assert pipeline._guidance_scale(4.0, 0) == 4.0


def test_guided_logits_are_the_papers(pipeline):
    """(1 + w) conditional - w unconditional, with w = (guidance_scale - 1) i / (N - 1)."""
    seen, step = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda logits, timestep, tokens, **options: (
        seen.append((logits, tokens)) or step(logits, timestep, tokens, **options)
    )
    tokens_of(pipeline, num_inference_steps=3, guidance_scale=3.0)
    for index, (logits, tokens) in enumerate(seen):
        with torch.no_grad():
            conditional = pipeline.transformer(tokens, None, torch.tensor([0, 1, 2])).sample
            unconditional = pipeline.transformer(tokens, None, torch.tensor([3, 3, 3])).sample
        w = 2.0 * index / 2
        torch.testing.assert_close(logits, (1 + w) * conditional - w * unconditional)
    assert len(seen) == 3


def test_the_interval_is_in_the_share_of_masked_tokens(pipeline):
    calls = remember_calls(pipeline)
    tokens_of(pipeline, num_inference_steps=5, guidance_scale=4.0, guidance_interval=(0.0, 0.5))
    shares = (pipeline.scheduler.timesteps / 1000).tolist()
    assert [size for size, _ in calls] == [6 if share <= 0.5 else 3 for share in shares]
    assert {3, 6} == {size for size, _ in calls}


def test_known_tokens_stay_as_they_are(pipeline):
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    known = encode_tokens(pipeline.vae, image)
    known[:, 2:] = pipeline.transformer.mask_token
    drawn = tokens_of(pipeline, latents=known).images
    assert torch.equal(drawn[:, :2], known[:, :2]) and drawn.max() < 16
    for wrong, words in (
        (known[:2], r"latents must be tokens \(3, 4, 4\), integers; got \(2, 4, 4\)"),
        (known.float(), "got .* of torch.float32"),
        (known + 1, r"Tokens must lie in 0 \.\. 16, where 16 is the mask; got .* 17"),
    ):
        with pytest.raises(ValueError, match=words):
            tokens_of(pipeline, latents=wrong)


def test_what_cannot_be_done_is_refused_before_the_first_step(pipeline, tiny_autoencoder_kl, tiny_vq_model):
    calls = remember_calls(pipeline)
    with pytest.raises(ValueError, match="num_inference_steps must be at most 16, the number of tokens; got 17"):
        tokens_of(pipeline, num_inference_steps=17)
    with pytest.raises(ValueError, match="Tokens have no channels to guide; leave guided_channels out, got 3"):
        tokens_of(pipeline, guided_channels=3)
    with pytest.raises(ValueError, match=r"Class ids must lie in 0\.\.2"):
        tokens_of(pipeline, labels=(0, 1, 3))
    assert not calls
    transformer = pipeline.transformer
    with pytest.raises(ValueError, match="which FlowMatchODEScheduler does not settle: use a MaskGITScheduler"):
        MaskGITPipeline(transformer, tiny_vq_model, FlowMatchODEScheduler())
    with pytest.raises(ValueError, match=r"a codebook \(VQModel\); AutoencoderKL has none"):
        MaskGITPipeline(transformer, tiny_autoencoder_kl, MaskGITScheduler())
    with torch.no_grad():
        tiny_vq_model.quantize.embedding.weight[0] += 1
    with pytest.raises(ValueError, match="does not belong to the transformer: its codebook differ"):
        MaskGITPipeline(transformer, tiny_vq_model, MaskGITScheduler())
    transformer.register_to_config(codebook_size=32)
    with pytest.raises(ValueError, match="knows 32 tokens but the codebook of the VQModel has 16"):
        MaskGITPipeline(transformer, tiny_vq_model, MaskGITScheduler())


def test_an_image_does_not_depend_on_its_batch(pipeline):
    together = tokens_of(pipeline, guidance_scale=3.0).images
    alone = tokens_of(pipeline, labels=(1,), guidance_scale=3.0, generator=sample_generators(0, [1])).images
    assert torch.equal(together[1:2], alone)


def test_a_fresh_process_loads_it_and_draws_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    code = f"""
import numpy as np, torch, diffusers_eqvae
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
assert type(pipeline).__name__ == "MaskGITPipeline" and pipeline.id2label == {{0: ("cat",)}}
images = pipeline(["cat", 2], num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="np")
np.save({str(tmp_path / "images.npy")!r}, images.images)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    options = {"num_inference_steps": 4, "output_type": "np"}
    ours = pipeline(["cat", 2], generator=torch.Generator().manual_seed(3), **options).images
    assert np.array_equal(np.load(tmp_path / "images.npy"), ours)
    for loaded in (
        load_pipeline(str(tmp_path / "pipeline")),
        DiffusionPipeline.from_pretrained(tmp_path / "pipeline"),
    ):
        assert type(loaded) is MaskGITPipeline
