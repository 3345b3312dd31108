"""ClassConditionalPipeline: closed forms with analytic velocities, counted calls, parts that do not fit."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_flow_match_sde import FlowMatchSDEScheduler

NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "otter", 3: "crane, construction crane"}


class AnalyticTransformer(ModelMixin, ConfigMixin):
    """Velocity slope * x + label (null class: 0.5); remembers the batch size and timestep of every call."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 4,
        num_classes: int = 10,
        slope: float = 0.7,
        objective: str = "flow_matching",
        learn_sigma: bool = False,
        autoencoder: dict | None = None,
    ):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, float]] = []

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        assert timestep.shape == class_labels.shape == hidden_states.shape[:1]
        self.calls.append((len(hidden_states), timestep[0].item()))
        offset = torch.where(class_labels == self.config.num_classes, 0.5, class_labels.float())
        velocity = self.config.slope * hidden_states + offset[:, None, None, None]
        if self.config.learn_sigma:
            velocity = torch.cat([velocity, torch.full_like(velocity, 0.25)], dim=1)
        return (velocity,)


@pytest.fixture
def analytic(tiny_autoencoder_kl):
    pipeline = ClassConditionalPipeline(
        AnalyticTransformer(), tiny_autoencoder_kl, FlowMatchODEScheduler(solver="euler"), id2label=NAMES
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def noise():
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheduler", [FlowMatchODEScheduler(solver="euler"), FlowMatchEulerDiscreteScheduler()])
def test_euler_equals_the_closed_form(analytic, noise, scheduler):
    analytic.scheduler = scheduler
    steps, slope, label = 5, 0.7, 3.0
    output = analytic(
        3, num_images_per_label=2, guidance_scale=1.0, num_inference_steps=steps, latents=noise, output_type="latent"
    )
    factor = (1 - slope / steps) ** steps
    # x <- x - (slope x + label) / N has the fixed point -label / slope.
    expected = (noise + label / slope) * factor - label / slope
    torch.testing.assert_close(output.images, expected, atol=1e-5, rtol=1e-5)
    assert [level for _, level in analytic.transformer.calls] == pytest.approx([1000, 800, 600, 400, 200])
    assert output.nfe == steps and output.seconds > 0


def test_guidance_equals_the_velocity_of_the_extrapolated_label(analytic, noise):
    """uncond + w (cond - uncond) of offsets 0.5 and 3 is the offset 0.5 + 2.5 w."""
    steps, slope, offset = 4, 0.7, 0.5 + 2.5 * 2.0
    output = analytic(
        3, num_images_per_label=2, guidance_scale=2.0, num_inference_steps=steps, latents=noise, output_type="latent"
    )
    expected = (noise + offset / slope) * (1 - slope / steps) ** steps - offset / slope
    torch.testing.assert_close(output.images, expected, atol=1e-4, rtol=1e-4)
    assert output.nfe == 2 * steps


@pytest.mark.parametrize("sequential", [False, True])
def test_interval_skips_the_unconditional_forward(analytic, sequential):
    output = analytic(
        [1, 2, 3],
        guidance_scale=3.0,
        guidance_interval=(0.0, 0.75),
        num_inference_steps=8,
        sequential_guidance=sequential,
        output_type="latent",
    )
    # Noise levels 1, 7/8, 6/8, ..., 1/8: the first two lie outside.
    batches = [batch for batch, _ in analytic.transformer.calls]
    assert batches == [3, 3] + ([3, 3] * 6 if sequential else [6] * 6)
    assert output.nfe == 2 + 2 * 6


def test_empty_interval_equals_no_guidance(analytic, noise):
    options = {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    outside = analytic([1, 2], guidance_scale=3.0, guidance_interval=(0.1, 0.2), **options)
    plain = analytic([1, 2], guidance_scale=1.0, **options)
    assert torch.equal(outside.images, plain.images) and outside.nfe == plain.nfe == 4


def test_guided_channels_leave_the_others_conditional(analytic, noise):
    options = {"num_inference_steps": 3, "latents": noise, "output_type": "latent"}
    first = analytic([1, 2], guidance_scale=3.0, guided_channels=3, **options).images
    everything = analytic([1, 2], guidance_scale=3.0, **options).images
    nothing = analytic([1, 2], guidance_scale=1.0, **options).images
    assert torch.equal(first[:, :3], everything[:, :3]) and torch.equal(first[:, 3], nothing[:, 3])
    assert not torch.equal(everything[:, 3], nothing[:, 3])


def test_normalisation_is_applied_once_before_decoding(analytic, noise):
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    analytic.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    latents = analytic([1, 2], num_inference_steps=2, latents=noise, output_type="latent").images
    images = analytic([1, 2], num_inference_steps=2, latents=noise, output_type="pt").images
    raw = latents * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1)
    with torch.no_grad():
        pixels = analytic.vae.decode(raw).sample
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_output_types_show_the_same_images(analytic, noise):
    outputs = {
        kind: analytic([1, 2], num_inference_steps=2, latents=noise, output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["pil"][0].size == (16, 16) and outputs["np"].shape == (2, 16, 16, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    pixels = analytic.decode_latents(outputs["latent"]).detach()
    expected = (127.5 * pixels + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([np.asarray(image) for image in outputs["pil"]]), expected)
    as_tuple = analytic([1, 2], num_inference_steps=2, latents=noise, output_type="pt", return_dict=False)
    assert torch.equal(as_tuple[0], outputs["pt"]) and as_tuple[1] == 4.0


def test_the_images_of_one_label_lie_side_by_side(analytic):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": torch.zeros(4, 4, 4, 4)}
    images = analytic([["otter"], [5]], num_images_per_label=2, output_type="latent", **options).images
    # One Euler step from 0 ends at minus the velocity, which is the label there.
    assert images[:, 0, 0, 0].tolist() == [-2, -2, -5, -5]
    with pytest.raises(ValueError, match=r"crane.*id"):
        analytic("crane")


def test_id2label_must_fit_the_classes(tiny_autoencoder_kl):
    with pytest.raises(ValueError, match=r"0\.\.9.*'10'"):
        ClassConditionalPipeline(
            AnalyticTransformer(), tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label={"10": "x"}
        )


def test_list_of_generators_makes_every_image_its_own(analytic):
    analytic.scheduler = FlowMatchSDEScheduler()
    options = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = analytic([1, 2], generator=generators(5, 6), **options).images
    alone = analytic([2], generator=generators(6), **options).images
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)
    again = analytic([1, 2], generator=generators(5, 6), **options).images
    assert torch.equal(together, again)
    with pytest.raises(ValueError, match="one per image; got 1 for 2"):
        analytic([1, 2], generator=generators(5), **options)


def test_callback_may_replace_the_latents(analytic):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, round(float(timestep)), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    output = analytic([1], num_inference_steps=3, output_type="latent", callback_on_step_end=callback)
    assert seen == [(0, 1000, (1, 4, 4, 4)), (1, 667, (1, 4, 4, 4)), (2, 333, (1, 4, 4, 4))]
    assert not output.images.any()
    with pytest.raises(ValueError, match="noise"):
        analytic([1], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (0.8, 0.2)}, "interval"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guided_channels": 5}, r"1 \.\. 4"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"latents": torch.zeros(3, 4, 4, 4)}, r"\(1, 4, h, w\)"),
    ],
)
def test_arguments_out_of_range(analytic, options, message):
    with pytest.raises(ValueError, match=message):
        analytic(1, **options)


def test_channels_must_agree(tiny_autoencoder_kl):
    with pytest.raises(ValueError, match="works on 16 latent channels but the AutoencoderKL has 4"):
        ClassConditionalPipeline(AnalyticTransformer(in_channels=16), tiny_autoencoder_kl, FlowMatchODEScheduler())


def test_fingerprint_must_agree(tiny_autoencoder_kl):
    transformer = AnalyticTransformer(autoencoder=autoencoder_identity(tiny_autoencoder_kl))
    pipeline = ClassConditionalPipeline(transformer, tiny_autoencoder_kl, FlowMatchODEScheduler())
    other = AutoencoderKL.from_config(tiny_autoencoder_kl.config)
    pipeline.vae = other
    with pytest.raises(ValueError, match="belong to the transformer: its encoder weights differ"):
        pipeline(1, num_inference_steps=1)
    LatentNormalization(mean=(0.5,), std=(2.0,)).apply_to(tiny_autoencoder_kl)
    with pytest.raises(ValueError, match=r"belong to the transformer: its latent normalisation .* differ"):
        ClassConditionalPipeline(transformer, tiny_autoencoder_kl, FlowMatchODEScheduler())


def test_scheduler_must_integrate_what_the_transformer_predicts(tiny_autoencoder_kl):
    with pytest.raises(ValueError, match="DDIMScheduler does not integrate"):
        ClassConditionalPipeline(AnalyticTransformer(), tiny_autoencoder_kl, DDIMScheduler())
    with pytest.raises(ValueError, match="use a DDPM-style scheduler"):
        ClassConditionalPipeline(
            AnalyticTransformer(objective="denoising"),
            tiny_autoencoder_kl,
            FlowMatchEulerDiscreteScheduler(),
        )


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_diffusion_transformer_with_learned_variance(tiny_autoencoder_kl, scheduler_class, variance_type):
    options = {} if scheduler_class is DDIMScheduler else {"variance_type": variance_type}
    transformer = AnalyticTransformer(objective="denoising", learn_sigma=True, slope=0.1)
    pipeline = ClassConditionalPipeline(
        transformer, tiny_autoencoder_kl, scheduler_class(clip_sample=False, **options)
    )
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline([1, 2], num_inference_steps=4, guidance_interval=(0.0, 0.5), output_type="latent")
    assert output.images.shape == (2, 4, 4, 4) and output.images.isfinite().all()
    # The steps 750, 500, 250, 0 are noise levels 0.75, ..., 0, and the transformer sees them as they are.
    assert transformer.calls == [(2, 750.0), (4, 500.0), (4, 250.0), (4, 0.0)]


@pytest.mark.parametrize("force_upcast", [True, False])
def test_float16_vae_is_decoded_in_float32_where_its_config_says_so(analytic, monkeypatch, force_upcast):
    analytic.vae.to(torch.float16)
    analytic.vae.register_to_config(force_upcast=force_upcast)
    seen = []
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z: (seen.append((z.dtype, vae.dtype)), decode(vae, z))[1])
    images = analytic([1], num_inference_steps=1, output_type="pt").images
    assert seen == [(torch.float32 if force_upcast else torch.float16,) * 2]
    assert analytic.vae.dtype == torch.float16 and images.dtype == torch.float32


def test_real_transformer_ten_classes_any_autoencoder(tiny_sit, tiny_autoencoder_kl, tiny_autoencoder_tiny):
    for vae in (tiny_autoencoder_kl, tiny_autoencoder_tiny):
        pipeline = ClassConditionalPipeline(tiny_sit, vae, FlowMatchODEScheduler(solver="heun"))
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline([0, 9], num_inference_steps=2, guidance_scale=2.0, output_type="pt")
        assert output.images.isfinite().all() and output.nfe == 2 * 2 * 2


@pytest.mark.parametrize("channels", [16, 32])
def test_wide_latents(channels):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    transformer = SiTTransformer2DModel(
        sample_size=(4, 6),
        in_channels=channels,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        num_classes=3,
    )
    pipeline = ClassConditionalPipeline(transformer.eval(), vae.eval(), FlowMatchODEScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=1, output_type="np").images.shape == (1, 8, 12, 3)
