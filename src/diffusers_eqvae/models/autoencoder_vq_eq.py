"""diffusers' VQModel with the losses of the paper, a choice of padding, and tokens at its surface."""

from __future__ import annotations

from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..tokens import decode_tokens, encode_tokens
from .autoencoder_kl_eq import PaddingMode, set_padding_mode, stock_kinds


class VQModelEQ(VQModel):
    """VQModel whose losses are those of VQ-VAE (arXiv 1711.00937, eq. 3), for training with `decode_with_terms`.

    What `encode` gives is not quantised yet, so whatever is done to raw latents (EQ-VAE's tau) is done before
    quantising; `decode` quantises. A saved model is a stock one: plain `diffusers.VQModel` loads its directory and
    gives the same images where `padding_mode` is "zeros", and this class loads any VQModel directory.

    Args:
        commitment_weight: beta, the factor of |z - sg(e)|^2; the codebook's |sg(z) - e|^2 has factor 1.
        padding_mode: of encoder and decoder, as `AutoencoderKLEQ` takes it.
        latents_mean, latents_std, shift_factor: the normalisation of the raw latents (`LatentNormalization`), for a
            generator of latents before quantising; tokens do not depend on it.

    The other arguments are VQModel's.

    Differs from the reference: diffusers and taming-transformers give the factor beta to the other of the two losses.

    Example:
        >>> vae = VQModelEQ(norm_num_groups=4, block_out_channels=(8,), num_vq_embeddings=16)
        >>> tokens = vae.encode_tokens(torch.zeros(1, 3, 16, 16))
        >>> vae.decode_tokens(tokens).shape
        torch.Size([1, 3, 16, 16])

    Raises:
        ValueError: on an unknown padding mode.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        commitment_weight: float = 0.25,
        padding_mode: PaddingMode = "zeros",
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        shift_factor: float | None = None,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=stock_kinds(down_block_types),
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        self.quantize.beta, self.quantize.legacy = commitment_weight, False
        set_padding_mode(self, padding_mode)

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """Tokens (B, h, w) int64 of pixels (B, 3, H, W) in [-1, 1]: what a MaskGIT sees."""
        return encode_tokens(self, pixels)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), nominally in [-1, 1] and not clamped, of tokens (B, h, w)."""
        return decode_tokens(self, tokens)
