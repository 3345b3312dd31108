"""DINOv2's linear heads: the published mathematics in float64 NumPy, the published keys, and the image of it all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_eqvae import AlignmentNetwork, ClassConditionalPipeline, FlowMatchODEScheduler, LatentNormalization
from diffusers_eqvae.autoencoders import decode
from diffusers_eqvae.images import to_image
from diffusers_eqvae.models.alignment_network import AlignmentOutput
from diffusers_eqvae.perception import (
    LatentFeatures,
    LinearDepthHead,
    LinearSegmentationHead,
    cluster_positions,
    perception_image,
    to_size,
)
from diffusers_eqvae.perception.visualize import draw_labels

SIZE, CLASSES, BINS = 6, 5, 256


def segmentation_tensors() -> dict[str, torch.Tensor]:
    """Keys and shapes of dinov2_vit*14_ade20k_linear_head.pth, small and random."""
    generator = torch.Generator().manual_seed(0)
    return {
        "decode_head.conv_seg.weight": torch.randn(CLASSES, SIZE, 1, 1, generator=generator),
        "decode_head.conv_seg.bias": torch.randn(CLASSES, generator=generator),
        "decode_head.bn.weight": torch.randn(SIZE, generator=generator),
        "decode_head.bn.bias": torch.randn(SIZE, generator=generator),
        "decode_head.bn.running_mean": torch.randn(SIZE, generator=generator),
        "decode_head.bn.running_var": torch.rand(SIZE, generator=generator) + 0.5,
        "decode_head.bn.num_batches_tracked": torch.tensor(7),
    }


def depth_tensors() -> dict[str, torch.Tensor]:
    """Keys and shapes of dinov2_vit*14_nyu_linear_head.pth, small and random."""
    generator = torch.Generator().manual_seed(1)
    return {
        "decode_head.conv_depth.weight": torch.randn(BINS, 2 * SIZE, 1, 1, generator=generator),
        "decode_head.conv_depth.bias": torch.randn(BINS, generator=generator),
    }


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, SIZE, 3, 4, generator=generator), torch.randn(2, SIZE, generator=generator)


def saved(tmp_path, tensors, *, wrapped: bool = True):
    path = tmp_path / "head.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": tensors} if wrapped else tensors, path)
    return path


def test_segmentation_is_batch_norm_and_a_matrix(tmp_path, features):
    tensors = segmentation_tensors()
    head = LinearSegmentationHead.from_file(saved(tmp_path, tensors)).train()
    w, b, gamma, beta, mean, var = (t.double().numpy() for t in list(tensors.values())[:6])
    f = features[0].double().numpy()
    shape = (1, SIZE, 1, 1)
    normed = (f - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5) * gamma.reshape(shape)
    expected = np.einsum("kd,bdhw->bkhw", w[:, :, 0, 0], normed + beta.reshape(shape)) + b.reshape(1, -1, 1, 1)
    assert np.allclose(head(features[0]), expected, atol=1e-5)
    assert torch.equal(head.bn.running_mean, tensors["decode_head.bn.running_mean"])  # train() moved no statistics
    assert not any(parameter.requires_grad for parameter in head.parameters())


def upsampled(maps: np.ndarray) -> np.ndarray:
    """Bilinear x 4 without aligned corners, as a matrix per axis, in float64."""

    def matrix(n: int) -> np.ndarray:
        places = np.clip((np.arange(4 * n) + 0.5) / 4 - 0.5, 0, n - 1)
        low = np.minimum(places.astype(int), n - 1)
        rows = np.zeros((4 * n, n))
        rows[np.arange(4 * n), low] += 1 - (places - low)
        rows[np.arange(4 * n), np.minimum(low + 1, n - 1)] += places - low
        return rows

    return np.einsum("yh,bdhw,xw->bdyx", matrix(maps.shape[2]), maps, matrix(maps.shape[3]))


def test_depth_is_the_mean_of_bins_over_patch_and_cls(tmp_path, features):
    tensors = depth_tensors()
    head = LinearDepthHead.from_file(saved(tmp_path, tensors))
    weight, bias = (tensor.double().numpy() for tensor in tensors.values())
    patch, cls = (tensor.double().numpy() for tensor in features)
    joined = np.concatenate([patch, np.broadcast_to(cls[:, :, None, None], patch.shape)], 1)
    # The published order: features are enlarged first, then classified.
    logits = np.einsum("kd,bdhw->bkhw", weight[:, :, 0, 0], upsampled(joined)) + bias.reshape(1, -1, 1, 1)
    share = np.maximum(logits, 0) + 0.1
    expected = (share / share.sum(1, keepdims=True) * np.linspace(0.001, 10, BINS).reshape(1, -1, 1, 1)).sum(1)
    depth = head(*features)
    assert depth.shape == (2, 1, 12, 16)
    assert np.allclose(depth[:, 0], expected, atol=1e-5)


def test_equal_logits_give_the_middle_of_the_bins():
    head = LinearDepthHead(SIZE, max_depth=80.0)
    torch.nn.init.zeros_(head.conv_depth.weight)
    for level in (-3.0, 0.0, 5.0):
        torch.nn.init.constant_(head.conv_depth.bias, level)
        depth = head(torch.randn(1, SIZE, 2, 2), torch.randn(1, SIZE))
        assert torch.allclose(depth, torch.tensor(80.001 / 2), atol=1e-4)


def test_heads_read_their_own_kind_of_features(tmp_path, features):
    seen = LatentFeatures(*(value + 1 for value in features), before_norm=AlignmentOutput(*features))
    segmentation = LinearSegmentationHead.from_file(saved(tmp_path, segmentation_tensors()))
    assert torch.equal(segmentation.read(seen), segmentation(seen.patch))
    depth = LinearDepthHead.from_file(saved(tmp_path, depth_tensors()), max_depth=80.0)
    assert torch.equal(depth.read(seen), depth(*features)) and depth.centres[-1] == 80.0


def test_a_higher_bin_is_farther_and_the_cls_counts(features):
    head = LinearDepthHead(SIZE)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    depths = []
    for chosen in (0, 100, 255):
        head.conv_depth.bias.zero_()[chosen] = 1e5
        depths.append(head(*features).mean().item())
    assert depths == pytest.approx([0.001, 0.001 + 100 / 255 * 9.999, 10.0], abs=5e-3)
    head.conv_depth.bias.zero_()
    head.conv_depth.weight[255, SIZE] = 1e6  # reads the CLS' first channel
    far = head(features[0], torch.ones_like(features[1]))
    assert far.min() > 9.9 and head(features[0], -torch.ones_like(features[1])).max() < 5.1


def test_heads_rotate_with_the_features(tmp_path, features):
    patch, cls = features
    rotated = torch.rot90(patch, 1, (2, 3))
    segmentation = LinearSegmentationHead.from_file(saved(tmp_path, segmentation_tensors()))
    depth = LinearDepthHead.from_file(saved(tmp_path, depth_tensors()))
    size = (12, 16)
    classes = to_size(segmentation(patch), size).argmax(1)
    assert torch.equal(to_size(segmentation(rotated), size[::-1]).argmax(1), torch.rot90(classes, 1, (1, 2)))
    assert torch.allclose(depth(rotated, cls), torch.rot90(depth(patch, cls), 1, (2, 3)), atol=1e-5)


def test_keys_are_read_with_and_without_prefix_from_both_formats(tmp_path, features):
    tensors = segmentation_tensors()
    bare = {name.removeprefix("decode_head."): value for name, value in tensors.items()}
    save_file(bare, tmp_path / "head.safetensors")
    expected = LinearSegmentationHead.from_file(saved(tmp_path, tensors))(features[0])
    for path in (saved(tmp_path, bare, wrapped=False), tmp_path / "head.safetensors"):
        assert torch.equal(LinearSegmentationHead.from_file(path)(features[0]), expected)


class Surprise:
    """What weights_only refuses to build."""


def test_files_that_are_no_linear_head_are_refused(tmp_path):
    segmentation, depth = segmentation_tensors(), depth_tensors()
    without_bias = {name: value for name, value in segmentation.items() if not name.endswith("conv_seg.bias")}
    odd = {"conv_depth.weight": torch.ones(8, 5, 1, 1), "conv_depth.bias": torch.ones(8)}
    for load, tensors, message in (
        (LinearSegmentationHead.from_file, depth, "must hold decode_head.conv_seg.weight"),
        (LinearDepthHead.from_file, segmentation, "must hold decode_head.conv_depth.weight"),
        (LinearSegmentationHead.from_file, without_bias, "conv_seg.bias"),
        (LinearSegmentationHead.from_file, segmentation | {"backbone.x": torch.ones(1)}, "backbone.x"),
        (LinearDepthHead.from_file, odd, "even number of channels"),
        (LinearDepthHead.from_file, {"x": Surprise()}, "needs code to be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load(saved(tmp_path, tensors))
    with pytest.raises(FileNotFoundError, match="is not a file of weights"):
        LinearDepthHead.from_file(tmp_path / "absent.pth")
    cut = saved(tmp_path, depth)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        LinearDepthHead.from_file(cut)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"x", b"no tensors at all, but some text", bytes(range(256)) * 8])
def test_files_that_are_no_weights_are_named(tmp_path, suffix, content):
    path = tmp_path / f"head.{suffix}"
    path.write_bytes(content)
    for load in (LinearSegmentationHead.from_file, LinearDepthHead.from_file):
        with pytest.raises(ValueError, match=rf"head\.{suffix} is not read: it is damaged"):
            load(path)


@pytest.mark.parametrize("content", [{"state_dict": [torch.ones(1)]}, [torch.ones(1)], {3: torch.ones(1)}])
def test_tensors_without_names_are_no_head(tmp_path, content):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head\.pth must hold (decode_head\.conv_seg|tensors by name)"):
        LinearSegmentationHead.from_file(tmp_path / "head.pth")


def test_heads_of_another_teacher_are_refused():
    def network(**options) -> AlignmentNetwork:
        return AlignmentNetwork(**{"latent_channels": 4, "hidden_size": 8, "feature_size": SIZE, **options})

    registers = {"teacher": "facebook/dinov2-with-registers-large", "teacher_type": "dinov2_with_registers"}
    for head in (LinearSegmentationHead(SIZE, CLASSES), LinearDepthHead(SIZE)):
        head.check_network(network())
        head.check_network(network(teacher="facebook/dinov2-large", teacher_type="dinov2"))
        for alien, message in (
            (None, "give the alignment_network"),
            (network(feature_size=SIZE + 1), rf"features of size {SIZE}, .* size {SIZE + 1}\)"),
            (network(**registers), r"type dinov2 .* of facebook/dinov2-with-registers-large \(type dinov2_with_reg"),
        ):
            with pytest.raises(ValueError, match=message):
                head.check_network(alien)
    LinearDepthHead(SIZE, teacher_type="dinov2_with_registers").check_network(network(**registers))
    LinearSegmentationHead(SIZE, CLASSES).check_network(network(global_feature=False))
    with pytest.raises(ValueError, match="global_feature=False"):
        LinearDepthHead(SIZE).check_network(network(global_feature=False))
    with pytest.raises(ValueError, match="min_depth < max_depth"):
        LinearDepthHead(SIZE, max_depth=0.0)


def test_the_image_shows_samples_and_what_their_latents_say(tmp_path, tiny_autoencoder_kl):
    torch.manual_seed(0)
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=SIZE)
    heads = {
        "segmentation_head": LinearSegmentationHead.from_file(saved(tmp_path, segmentation_tensors())),
        "depth_head": LinearDepthHead.from_file(saved(tmp_path, depth_tensors())),
    }
    latents = torch.randn(2, 4, 4, 4)
    drawn = perception_image(tiny_autoencoder_kl, latents, alignment_network=network, num_clusters=3, **heads)
    assert drawn.size == (5 * 20 - 4, 16 + 2 * 20 - 4)
    plain = perception_image(tiny_autoencoder_kl, latents, num_clusters=3)
    assert plain.size == (3 * 20 - 4, 16 + 2 * 20 - 4)
    raw = LatentNormalization.from_vae(tiny_autoencoder_kl).denormalize(latents)
    given = perception_image(
        tiny_autoencoder_kl, latents, num_clusters=3, pixels=decode(tiny_autoencoder_kl, raw).detach()
    )
    assert np.array_equal(np.asarray(given), np.asarray(plain))
    with pytest.raises(ValueError, match="give the alignment_network"):
        perception_image(tiny_autoencoder_kl, latents, **heads)


def test_samples_of_a_pipeline_are_drawn_from_their_latents(tiny_sit, tiny_autoencoder_kl):
    LatentNormalization(mean=(1.0, -2.0, 0.5, 0.0), std=(0.5, 1.0, 2.0, 3.0)).apply_to(tiny_autoencoder_kl)
    pipe = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    latents = pipe([1], output_type="latent", generator=torch.Generator().manual_seed(0), **options).images
    sample = pipe([1], generator=torch.Generator().manual_seed(0), **options).images[0]
    drawn = perception_image(pipe.vae, latents, num_clusters=2)
    assert np.array_equal(np.asarray(drawn.crop((0, 16, 16, 32))), np.asarray(sample))

    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=SIZE)
    raw_latents = LatentNormalization.from_vae(pipe.vae).denormalize(latents)
    clusters = cluster_positions(network.normalize(network(raw_latents)).patch.detach(), 2)
    drawn = perception_image(pipe.vae, latents, alignment_network=network, num_clusters=2)
    expected = to_image(draw_labels(clusters)[0].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert np.array_equal(np.asarray(drawn.crop((40, 16, 56, 32))), np.asarray(expected))
