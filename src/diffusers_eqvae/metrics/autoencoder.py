"""One pass of an autoencoder over a set of images: one reconstruction each serves every metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..autoencoders import decode, downsampling_factor, encode, evaluating, is_deterministic, latent_channels
from ..images import require_finite, to_uint8
from ..randomness import torch_generator
from .base import Measurement, Metric, build_metrics, measure
from .feature_networks import FeatureNetwork
from .image_sets import image_digests, to_tensor
from .result_card import ResultCard

# What `training/evaluate_autoencoder.py` computes by default, of what it has the weights for.
RECONSTRUCTION_METRICS = (
    "psnr",
    "ssim",
    "lpips",
    "equivariance",
    "latent_statistics",
    "intrinsic_dimension",
    "diffusability",
    "rfid",
)
OFFERS = frozenset({"images", "reconstructions", "posteriors", "autoencoder", "features", "reconstructed_features"})
# What the figures mean, as a result card states it; changes when the same images would give other numbers.
DEFINITIONS = "1 (PSNR and SSIM clamped to [-1, 1] with range 2; SSIM in a Gaussian window of 11 px, sigma 1.5)"


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: Tensor, *, noise: Tensor | None = None) -> dict[str, Any]:
    """What metrics of reconstructions are updated with, of pixels (B, 3, H, W) in [-1, 1].

    "images", "reconstructions" (clamped), "posteriors" and "autoencoder".

    Args:
        vae: any diffusers autoencoder, in eval mode.
        noise: (B, C, h, w): reconstruct the posterior sample mean + std * noise; None reconstructs the mean.

    Example:
        >>> batch = reconstruct(vae, pixels)
        >>> psnr(batch["reconstructions"], batch["images"])
    """
    posterior = encode(vae, pixels)
    decoded = decode(vae, posterior.mode() if noise is None else posterior.sample(noise))
    require_finite(decoded, whose=f"{type(vae).__name__} in {decoded.dtype}")
    return {
        "images": pixels,
        "reconstructions": decoded.clamp(-1, 1),
        "posteriors": posterior,
        "autoencoder": vae,
    }


def reconstruction_batches(
    vae: nn.Module,
    batches: Iterable[tuple[Sequence[int], np.ndarray]],
    *,
    networks: Iterable[FeatureNetwork] = (),
    noise_seed: int | None = None,
    labels: np.ndarray | None = None,
    masks: Callable[[Sequence[int]], Tensor] | None = None,
) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
    """`reconstruct` of (places in the set, uint8 (B, H, W, 3)), with the features of images and reconstructions.

    Args:
        vae: any diffusers autoencoder in eval mode, on the device where it is to run.
        noise_seed: reconstruct samples of the posterior, each with noise of its own (`image_noise`); None
            reconstructs the mean.
        labels: class ids of the whole set, by place, where it has them.
        masks: what gives (B, H, W) of places in the set, such as `ImageMasks`.

    Example:
        >>> measured = measure(metrics, reconstruction_batches(vae, images.batches(16)))
    """
    if noise_seed is not None and is_deterministic(vae):
        raise ValueError(
            f"The posterior of {type(vae).__name__} is a point and has no samples; leave sample_posterior out."
        )
    networks = list(networks)
    device, factor = next(vae.parameters()).device, downsampling_factor(vae)
    for index, images_uint8 in batches:
        tensor, noise = to_tensor(images_uint8), None
        if noise_seed is not None:
            shape = (latent_channels(vae), tensor.shape[-2] // factor, tensor.shape[-1] // factor)
            noise = torch.stack([image_noise(place, noise_seed, shape) for place in index]).to(device)
        batch = reconstruct(vae, tensor.to(device).contiguous() / 127.5 - 1, noise=noise)
        batch["digests"] = image_digests(images_uint8)
        if labels is not None:
            batch["labels"] = torch.from_numpy(labels[list(index)])
        if masks is not None:
            batch["masks"] = masks(index)
        reconstructed = to_uint8(batch["reconstructions"])
        batch["features"] = {network.name: _on_cpu(network(tensor)) for network in networks}
        batch["reconstructed_features"] = {network.name: _on_cpu(network(reconstructed)) for network in networks}
        yield index, batch


def _on_cpu(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in outputs.items()}


def measure_autoencoder(
    vae: nn.Module,
    batches: Iterable[Tensor],
    *,
    metrics: Sequence[Metric] | None = None,
    annotations: Mapping[str, Tensor] | None = None,
) -> Measurement:
    """Figures of an autoencoder over all `batches`, each (B, 3, H, W) in [-1, 1], with the posterior mean.

    Args:
        metrics: default: all that need no further weights.
        annotations: "labels" (N,) and "masks" (N, H, W) of all images, as far as there are any.

    Example:
        >>> measure_autoencoder(vae, [pixels]).figures["psnr"]
    """
    if metrics is None:
        names = [name for name in RECONSTRUCTION_METRICS if name not in ("lpips", "rfid")]
        metrics = build_metrics(names, offers=OFFERS)

    def reconstructed() -> Iterator[tuple[range, dict[str, Any]]]:
        start = 0
        for pixels in batches:
            index = slice(start, start + len(pixels))
            of_these = {name: values[index] for name, values in (annotations or {}).items()}
            yield range(start, index.stop), {**reconstruct(vae, pixels), **of_these}
            start = index.stop

    with evaluating(vae):
        return measure(metrics, reconstructed())


def reconstruction_card(
    measured: Measurement,
    *,
    data_hash: str,
    num_images: int,
    image_size: str,
    resize_rule: str,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    posterior: str = "mean",
) -> ResultCard:
    """The card of one pass; `posterior` says whether its "mean" or a "sample" was reconstructed.

    Example:
        >>> card = reconstruction_card(measured, data_hash=digests.hash, num_images=5000, image_size="256x256",
        ...     resize_rule="none", settings={"model": "runs/eq-vae"}, provenance=hardware())
    """
    protocol: dict[str, Any] = {"data_hash": data_hash, "num_images": num_images}
    protocol |= {"image_size": image_size, "resize_rule": resize_rule}
    return ResultCard(
        protocol={**protocol, "posterior": posterior, "definitions": DEFINITIONS, **measured.protocol},
        settings=dict(settings),
        provenance=dict(provenance),
        task="reconstruction",
        details={"num_images": num_images, **measured.details},
        **measured.card_parts(),
    )


def image_noise(index: int, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise that depends on the seed and the image's place in its set alone.

    Example:
        >>> image_noise(17, seed=0, shape=(4, 32, 32)).shape
        torch.Size([4, 32, 32])
    """
    return torch.randn(shape, generator=torch_generator(seed, index))
