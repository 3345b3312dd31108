"""From latents to a feature of every cell: through an alignment network, or the latents themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoders import autoencoder_location
from ..latents import LatentNormalization
from ..models.alignment_network import AlignmentNetwork, AlignmentOutput
from ..models.autoencoder_kl_aligned import ALIGNMENT_SUBFOLDER


def load_alignment_network(name: str) -> AlignmentNetwork:
    """The alignment network in a directory or Hub repository, in eval mode.

    Args:
        name: of the network, or of the autoencoder or pipeline that it was saved beside.

    Raises:
        ValueError: a model of another kind with no network beside it, or a directory without a model.
        OSError: no model at all.
    """
    location = autoencoder_location(name)
    _require_local(name, location, "no model")
    kind = AlignmentNetwork.load_config(name, **location).get("_class_name")
    if kind != AlignmentNetwork.__name__:
        location["subfolder"] = "/".join(filter(None, (location.get("subfolder"), ALIGNMENT_SUBFOLDER)))
        _require_local(name, location, f"a {kind} and no alignment network")
    try:
        return AlignmentNetwork.from_pretrained(name, **location).eval()
    except OSError as error:
        raise ValueError(
            f"{name} holds a {kind} and no alignment network that can be loaded from {location.get('subfolder', '.')}"
            f"/: {error} Name another, or train one with --regularizers alignment."
        ) from error


def _require_local(name: str, location: dict[str, str], what: str) -> None:
    """Refuses a directory on this machine that lacks the config; diffusers would ask the Hub for a name like its path.

    `what` says what such a directory holds.
    """
    config = Path(name, location.get("subfolder", "."), AlignmentNetwork.config_name)
    if Path(name).is_dir() and not config.is_file():
        raise ValueError(
            f"{name} holds {what}: there is no {config}. Name another, or train one with --regularizers alignment."
        )


@torch.no_grad()
def latent_features(
    latents: Tensor,
    alignment_network: AlignmentNetwork | None = None,
    *,
    normalization: LatentNormalization | None = None,
    window: int = 1,
) -> AlignmentOutput:
    """Features of every cell of latents (B, C, h, w): patch (B, D, h, w) and, where a network has it, CLS (B, D).

    With a network (ReaLS, arXiv 2502.00359) they are the teacher's features that it predicts from the raw latents;
    without one the latents are their own features, D = C, and there is no CLS.

    Args:
        latents: raw, or normalised by `normalization`.
        alignment_network: trained with the autoencoder that the latents come from.
        normalization: of `latents` (`LatentNormalization.from_vae(pipe.vae)` for what a pipeline gives as "latent");
            None for raw latents. A network's input is denormalised by it; without a network nothing is.
        window: odd; each cell's feature is those of the window x window cells around it, border cells repeated:
            D * window^2 channels. It gives latents that know only their own cell a neighbourhood.

    Returns:
        float32 on the latents' device.

    Raises:
        ValueError: latents that are not (B, C, h, w) or not those of the network, or an even window.
    """
    if latents.ndim != 4:
        raise ValueError(f"Features are those of latents (B, C, h, w); got {tuple(latents.shape)}.")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"The window of cells must be odd and positive, so that it has a middle; got {window}.")
    output = AlignmentOutput(patch=latents.float())
    if alignment_network is not None:
        raw_latents = latents if normalization is None else normalization.denormalize(latents)
        predicted = alignment_network(raw_latents.to(alignment_network.dtype))
        output = AlignmentOutput(predicted.patch.float(), None if predicted.cls is None else predicted.cls.float())
    if window > 1:
        padded = F.pad(output.patch, [window // 2] * 4, mode="replicate")
        output.patch = F.unfold(padded, window).unflatten(2, latents.shape[-2:])
    return output


def pooled_features(features: AlignmentOutput) -> Tensor:
    """One feature per image: the mean of its cells, followed by its CLS where there is one: (B, D) or (B, 2D).

    Example:
        >>> rows = pooled_features(latent_features(latents))
    """
    mean = features.patch.mean((-2, -1))
    return mean if features.cls is None else torch.cat([mean, features.cls], 1)


def to_rows(maps: Tensor) -> Tensor:
    """(B, D, h, w) as one row per cell: (B h w, D)."""
    return maps.movedim(1, -1).flatten(0, -2)


def to_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, K, h, w) resized to (B, K, H, W): bilinear, corners not aligned, as segmentation logits are.

    Example:
        >>> classes = to_size(head(features.patch), (256, 256)).argmax(1)
    """
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Standardization:
    """(x - mean) / std for each channel, so that no channel outweighs the others in a distance or an angle.

    Args:
        mean, std: (D,); a channel that does not vary has std 1.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Standardization:
        """From features (N, D), one row per cell or image."""
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        return cls(mean, torch.where(std > 0, std, torch.ones_like(std)))

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.mean.to(rows)) / self.std.to(rows)
