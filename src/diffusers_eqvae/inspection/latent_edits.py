"""One image, its latent edited, and what is decoded of it beside the edited image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoders import Autoencoder, decode, downsampling_factor, encode, evaluating
from ..equivariance import SMALLEST_SCALE, Tau, scaling
from ..images import latent_pca, to_image
from ..metrics.reconstruction import psnr
from ..options import Checked
from .card import Tile

EDIT_COLUMNS = (
    "the edited image",
    "the latent edited, then decoded",
    "the edited image, encoded and decoded",
    "the latent",
    "the edited latent",
)


@dataclass
class LatentEdit(Checked):
    """What is done alike to a latent and to its image: mixed with another, then scaled, turned and mirrored.

    Example:
        >>> LatentEdit(quarter_turns=1, scale=0.5).tau((32, 32)).latent_size
        (16, 16)
    """

    quarter_turns: int = field(default=0, metadata={"help": "Counter-clockwise.", "range": "[0, 3]"})
    flip: bool = field(default=False, metadata={"help": "Mirror left and right, after turning."})
    scale: float = field(default=1.0, metadata={"help": "Factor of both sides.", "range": f"[{SMALLEST_SCALE}, 1]"})
    share: float = field(default=0.0, metadata={"help": "Of the other image in the mixture.", "range": "[0, 1]"})

    def tau(self, latent_size: tuple[int, int]) -> Tau:
        """All but the mixture, for latents of (h, w) cells."""
        return Tau(scaling(latent_size, self.scale).latent_size, self.quarter_turns, flip=self.flip)

    def mix(self, first: Tensor, other: Tensor | None) -> Tensor:
        """(1 - share) first + share other; `first` where there is no other."""
        return first if other is None else torch.lerp(first, other, self.share)


@dataclass(frozen=True)
class EditedLatents:
    """What an autoencoder makes of one edit, for each image of a batch.

    Attributes:
        edited_pixels: (B, 3, H', W'), what decoding the edited latents should give.
        decoded: of the edited latents, (B, 3, H', W').
        bound: of the edited pixels, encoded and decoded: what the autoencoder's reconstruction allows.
        psnr, psnr_bound: (B,) in dB, of `decoded` and `bound` against `edited_pixels`.
        colours, edited_colours: first three components of the latents before and after, in one basis, (B, 3, h, w).

    Example:
        >>> edited = edit_latents(vae, pixels, LatentEdit(quarter_turns=1))
        >>> edited.lost  # dB
        tensor([8.6])
    """

    edited_pixels: Tensor
    decoded: Tensor
    bound: Tensor
    psnr: Tensor
    psnr_bound: Tensor
    colours: Tensor
    edited_colours: Tensor

    @property
    def lost(self) -> Tensor:
        """dB lost by editing the latent in place of the image, (B,); 0 = equivariant."""
        return self.psnr_bound - self.psnr

    def tiles(self, index: int = 0) -> list[Tile]:
        """One image's, as `EDIT_COLUMNS` names them."""
        size = self.edited_pixels.shape[-2:]
        colours, edited_colours = (
            F.interpolate(each[index : index + 1], size, mode="nearest-exact")[0]
            for each in (self.colours, self.edited_colours)
        )
        return [
            Tile(to_image(self.edited_pixels[index])),
            Tile(to_image(self.decoded[index]), f"{self.psnr[index].item():.1f} dB"),
            Tile(to_image(self.bound[index]), f"{self.psnr_bound[index].item():.1f} dB"),
            Tile(to_image(colours)),
            Tile(to_image(edited_colours)),
        ]


@torch.no_grad()
def edit_latents(
    vae: Autoencoder, pixels: Tensor, edit: LatentEdit, *, other_pixels: Tensor | None = None
) -> EditedLatents:
    """Edits the raw latents of pixels (B, 3, H, W) in [-1, 1] and decodes them; the images are edited alike.

    Args:
        other_pixels: mixed in by `edit.share`, of the same shape.

    Raises:
        ValueError: sides that are not multiples of the autoencoder's stride; a share without another image.

    Example:
        >>> edit_latents(vae, pixels, LatentEdit(share=0.5), other_pixels=others).psnr
    """
    if edit.share and other_pixels is None:
        raise ValueError(f"A mixture of share {edit.share:g} needs a second image; give one, or a share of 0.")
    stride = downsampling_factor(vae)
    with evaluating(vae):
        raw_latents = encode(vae, pixels).mode()
        other = None if other_pixels is None else encode(vae, other_pixels).mode()
        tau = edit.tau((raw_latents.shape[-2], raw_latents.shape[-1]))
        edited_latents = tau.apply_to_latents(edit.mix(raw_latents, other))
        edited_pixels = tau.apply_to_pixels(edit.mix(pixels, other_pixels), stride)
        decoded = decode(vae, edited_latents).clamp(-1, 1)
        bound = decode(vae, encode(vae, edited_pixels).mode()).clamp(-1, 1)
    colours, basis = latent_pca(raw_latents)
    return EditedLatents(
        edited_pixels,
        decoded,
        bound,
        psnr(decoded, edited_pixels),
        psnr(bound, edited_pixels),
        colours,
        latent_pca(edited_latents, basis)[0],
    )
