"""What lets a training grow: sharded weights, compiled steps, blocks that are recomputed."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch._dynamo.utils import counters

from diffusers_eqvae.equivariance import TauDistribution
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.objectives.flow_matching import FlowMatchingObjective
from diffusers_eqvae.pipelines import ClassConditionalPipeline
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.channel_prefix import ChannelPrefixRegularizer
from diffusers_eqvae.regularizers.equivariance import EquivarianceRegularizer
from diffusers_eqvae.regularizers.scale_only import ScaleOnlyRegularizer
from diffusers_eqvae.schedulers import FlowMatchODEScheduler

from ..objectives.test_flow_matching import make_model
from .trajectories import torchrun

# A warning of dynamo's own.
NOT_OURS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
TINY_AUTOENCODER = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
    "latent_channels": 4,
}


@pytest.mark.slow
def test_fsdp2_of_the_transformer_has_ddps_losses(tmp_path):
    """The worker asserts first that every parameter is a DTensor, cut over both ranks, each of which holds a half."""
    output = tmp_path / "losses.json"
    finished: subprocess.CompletedProcess = torchrun(
        Path(__file__).with_name("sharded_worker.py"), [str(output)], processes=2
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    losses = json.loads(output.read_text())
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], rel=1e-5)
    assert len(set(losses["ddp"])) == 5


@pytest.fixture
def compiled_graphs():
    """How many graphs dynamo has made since the test began."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@NOT_OURS
def test_a_compiled_step_is_compiled_once(compiled_graphs):
    """Other batches, labels, noise levels and weights of later steps make no new graph, and no other numbers."""
    losses, graphs = {}, []
    for compiled in (False, True):
        torch.manual_seed(0)
        objective = FlowMatchingObjective(make_model())
        if compiled:
            objective.compile(backend="aot_eager")
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        generator, losses[compiled] = torch.Generator().manual_seed(1), []
        for step in range(4):
            batch = {
                "latents": torch.randn(3, 4, 4, 4, generator=generator),
                "class_labels": torch.randint(3, (3,), generator=generator),
            }
            draw = objective.draw(batch, StepRandomness(0).at(step, 0))
            loss, _ = objective.total(objective(batch, draw))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
            if compiled:
                graphs.append(compiled_graphs())
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@NOT_OURS
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_an_autoencoders_step_is_compiled_for_two_kinds_of_size_whatever_is_drawn(compiled_graphs):
    """Once for the first size and once for any: an encoder in one piece, and a decoder in three, since its last layer
    is looked at. Windows, scales of both sides, turns, blends, further decodings and channels make no graph more, nor
    do steps of other shapes."""
    losses, graphs, taus = {}, [], set()
    pixels = torch.rand(2, 3, 80, 80) * 2 - 1
    shapes = [(64, 64), (48, 80), (80, 48), (56, 72)]
    any_tau = TauDistribution(scale="uniform_anisotropic", flip=True, crop=0.5)
    regularizers = {
        "equivariance": EquivarianceRegularizer(2, distribution=any_tau, blend=0.5, per_image=True),
        "scale_only": ScaleOnlyRegularizer(2),
        "channel_prefix": ChannelPrefixRegularizer(1),
    }
    for compiled in (False, True):
        torch.manual_seed(0)
        objective = AutoencoderObjective(AutoencoderTiny(**TINY_AUTOENCODER), regularizers, reduction="mean")
        discriminator = PatchDiscriminator(base_channels=4, num_layers=1, norm="group")
        weights = AutoencoderLossWeights(perceptual=0)
        step = AutoencoderStep(objective, objective, weights=weights, discriminator=discriminator)
        if compiled:
            objective.compile(backend="eager")
        losses[compiled] = []
        for number in range(40):
            height, width = shapes[number % len(shapes)]
            batch = {"pixel_values": pixels[..., :height, :width].contiguous()}
            draw = objective.draw(batch, StepRandomness(0).at(number, 0))
            loss, _, logs = step(batch, draw, number)
            losses[compiled].append((loss.item(), logs["adversarial_weight"].item()))
            if compiled:
                graphs.append(compiled_graphs())
                taus.add(str(draw["regularizers"]["equivariance"].tau))
    assert losses[True] == losses[False]
    assert len(taus) > 20 and graphs[10] == graphs[-1] == 8, str(graphs)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 2.0}, 1),
        ({"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5), "sequential_guidance": True}, 1),
        ({"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}, 2),
    ],
    ids=["unguided", "guided", "interval, one after the other", "interval"],
)
def test_sampling_compiles_once_for_each_batch_size(options, expected, compiled_graphs, tiny_sit, tiny_autoencoder_kl):
    """An interval calls the model with B images outside and 2B inside, unless the two go one after the other."""
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler())
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 6, "output_type": "latent", **options}

    def draw(labels):
        return pipeline(labels, generator=torch.Generator().manual_seed(0), **call).images

    plain = draw([0, 1, 2])
    pipeline.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(draw([0, 1, 2]), plain)
    assert compiled_graphs() == expected
    draw([3, 4, 5])
    assert compiled_graphs() == expected


@pytest.mark.parametrize("kind", ["SiT", "MaskGIT"])
def test_every_nth_block_is_recomputed_and_no_gradient_changes(kind):
    torch.manual_seed(0)
    if kind == "SiT":
        model, inputs = make_model(), (torch.randn(2, 4, 4, 4), torch.tensor([100.0, 900.0]), torch.tensor([0, 1]))
        torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    else:
        sizes = {"sample_size": 4, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
        model = MaskGITTransformer2DModel(**sizes, codebook_size=8, num_classes=3, dropout=0.0, class_dropout_prob=0.0)
        inputs = torch.randint(9, (2, 4, 4)), None, torch.tensor([0, 1])
    calls: Counter[int] = Counter()
    for number, block in enumerate(model.transformer_blocks, start=1):
        block.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    gradients = {}
    for every in (None, 1, 2, 3):
        if every:
            model.enable_gradient_checkpointing()
            model.gradient_checkpointing_every = every
        calls.clear()
        model.zero_grad()
        model(*inputs, drop_labels=torch.zeros(2, dtype=torch.bool)).sample.square().mean().backward()
        twice = [number for number, count in sorted(calls.items()) if count == 2]
        assert twice == [number for number in range(1, 5) if every and number % every == 0]
        gradients[every] = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    for every in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(gradients[every], gradients[None], strict=True))
