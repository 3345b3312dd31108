"""Autoguidance in a pipeline: the weaker model's prediction, and models that were not trained for the same task."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.pipelines.guide import check_guide
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.pipelines.pipeline_maskgit import MaskGITPipeline
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_maskgit import MaskGITScheduler

SIZES = {"sample_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "num_classes": 10}
NAMES = {"id2label": {"0": "otter", "1": "swan"}}


def weak(**options) -> SiTTransformer2DModel:
    model = SiTTransformer2DModel(**{**SIZES, **options})
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    return model.eval()


def test_its_prediction_takes_the_place_of_the_one_without_a_class(tiny_sit, tiny_autoencoder_kl):
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guide = guide = weak(learn_sigma=True)  # whose further channels do not count
    noise, labels = torch.randn(2, 4, 4, 4), torch.tensor([3, 7])
    call = {"num_inference_steps": 1, "guidance_scale": 2.5, "output_type": "latent"}
    output = pipeline(labels, latents=noise, **call)
    with torch.no_grad():
        strong, weaker = (model(noise, 1000.0, labels).sample[:, :4] for model in (tiny_sit, guide))
    torch.testing.assert_close(output.images, noise - (weaker + 2.5 * (strong - weaker)))
    assert output.nfe == 2
    pipeline.guide = None
    assert not torch.allclose(pipeline(labels, latents=noise, **call).images, output.images)


def test_tokens_are_guided_too(tiny_maskgit, tiny_vq_model):
    """The last step has the whole scale: weak + 3 (strong - weak), both of the same tokens and labels."""
    weaker = copy.deepcopy(tiny_maskgit)
    torch.nn.init.normal_(weaker.logit_bias)
    pipeline = MaskGITPipeline(tiny_maskgit, tiny_vq_model, MaskGITScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guide = weaker
    seen, step = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda logits, timestep, tokens, **options: (
        seen.append((logits, tokens)) or step(logits, timestep, tokens, **options)
    )
    assert pipeline([0, 1], num_inference_steps=4, guidance_scale=3.0, output_type="latent").nfe == 7
    logits, tokens = seen[-1]
    with torch.no_grad():
        strong, weak_ = (model(tokens, None, torch.tensor([0, 1])).sample for model in (tiny_maskgit, weaker))
    torch.testing.assert_close(logits, weak_ + 3 * (strong - weak_))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "denoising"}, "has objective 'denoising' and the transformer 'flow_matching': take an earlier"),
        ({"prediction_type": "epsilon"}, "has prediction_type 'epsilon' and the transformer 'flow_prediction'"),
        ({"in_channels": 8}, "has in_channels 8 and the transformer 4"),
        ({"sample_size": 8}, r"has sample_size \(8, 8\) and the transformer \(4, 4\)"),
        ({"num_classes": 9}, "has num_classes 9 and the transformer 10"),
        ({"id2label": {"0": "otter", "1": "goose"}}, "knows class 1 as 'goose' and the transformer as 'swan': take"),
    ],
    ids=["objective", "prediction", "channels", "size", "classes", "names"],
)
def test_a_model_of_another_task_is_refused(changes, message, tiny_autoencoder_kl):
    pipeline = ClassConditionalPipeline(weak(**NAMES), tiny_autoencoder_kl, FlowMatchODEScheduler())
    pipeline.guide = weak(**{**NAMES, **changes})
    with pytest.raises(ValueError, match=message):
        pipeline(0)


def test_depth_width_and_the_form_of_a_size_are_its_own():
    check_guide(weak(num_layers=2, attention_head_dim=16, sample_size=(4, 4), patch_size=4), weak(sample_size=[4, 4]))
    sizes = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "codebook_size": 16,
        "num_classes": 10,
    }
    with pytest.raises(ValueError, match="has objective 'masked_tokens' and the transformer 'flow_matching'"):
        check_guide(MaskGITTransformer2DModel(sample_size=4, **sizes), weak())


def test_a_class_may_have_another_of_its_names():
    check_guide(weak(id2label={"0": "n1, Otter"}), weak(id2label={"0": "otter"}))


def test_of_other_latents_it_is_refused(tiny_autoencoder_kl):
    mine = autoencoder_identity(tiny_autoencoder_kl)
    tiny_autoencoder_kl.register_to_config(scaling_factor=0.7)
    check_guide(weak(autoencoder=mine), weak(autoencoder=mine))
    check_guide(weak(), weak(autoencoder=mine))  # it does not say
    with pytest.raises(ValueError, match=r"of other latents than the transformer: take an earlier .*normalisation"):
        check_guide(weak(autoencoder=autoencoder_identity(tiny_autoencoder_kl)), weak(autoencoder=mine))
