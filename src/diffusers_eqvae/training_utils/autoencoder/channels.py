"""More latent channels for a trained autoencoder, which begins as the function that it was (--latent_channels)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

logger = logging.getLogger(__name__)
K = TypeVar("K", bound=AutoencoderKL)


@torch.no_grad()
def with_latent_channels(vae: K, channels: int) -> K:
    """A copy with `channels` latent channels, of which the first are what they were and the others are not read yet.

    Encoding gives the same first channels; decoding any latents gives what their first channels gave. The new means
    are random filters of the encoder's last features, as large as the old ones, and their log-variances those of the
    old channels in turn; the decoder's first convolution reads them by zeros, whose gradients the filters give (own
    choice: zeros at both ends would never move). Its normalisation is left out, since it is not that of the new ones.

    Raises:
        ValueError: another class than AutoencoderKL, or not more channels than there are.

    Example:
        >>> vae = with_latent_channels(AutoencoderKLEQ.from_pretrained("stabilityai/sd-vae-ft-mse"), 16)
    """
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"--latent_channels widens an AutoencoderKL, and this is an {type(vae).__name__}; leave it out."
        )
    old = vae.config.latent_channels
    if channels <= old:
        raise ValueError(f"--latent_channels adds to the {old} channels that there are; got {channels}: give more.")
    unknown = ("_name_or_path", "_use_default_values", "latents_mean", "latents_std")
    config = {key: value for key, value in vae.config.items() if key not in unknown}
    wider = type(vae).from_config({**config, "latent_channels": channels})
    filters = wider.encoder.conv_out.weight[old:channels].clone()
    filters *= (vae.encoder.conv_out.weight[:old].square().mean() / filters.square().mean()).sqrt()
    shapes = {name: value.shape for name, value in wider.state_dict().items()}
    same = {name: value for name, value in vae.state_dict().items() if value.shape == shapes[name]}
    wider.load_state_dict(same, strict=False)

    places = torch.eye(channels, old)
    moments = torch.block_diag(places, torch.eye(old).repeat(-(-channels // old), 1)[:channels])
    new = range(old, channels)
    _select(wider.encoder.conv_out, vae.encoder.conv_out, outputs=moments)
    wider.encoder.conv_out.weight[old:channels] = filters
    if vae.quant_conv is not None:
        _select(wider.quant_conv, vae.quant_conv, outputs=moments, inputs=torch.block_diag(places, places))
        wider.quant_conv.weight[new, new] = 1.0
    if vae.post_quant_conv is not None:
        _select(wider.post_quant_conv, vae.post_quant_conv, outputs=places, inputs=places)
        wider.post_quant_conv.weight[new, new] = 1.0
    _select(wider.decoder.conv_in, vae.decoder.conv_in, inputs=places)
    logger.info("%d latent channels in place of %d; networks that were saved beside begin anew.", channels, old)
    return wider.train(vae.training)


def _select(
    ours: nn.Conv2d, theirs: nn.Conv2d, *, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> None:
    """Our outputs are theirs, and our inputs what theirs were, where the matrices (ours, theirs) hold a 1; else 0."""
    outputs = torch.eye(theirs.out_channels) if outputs is None else outputs
    inputs = torch.eye(theirs.in_channels) if inputs is None else inputs
    ours.weight.copy_(torch.einsum("po,oihw,ji->pjhw", outputs, theirs.weight, inputs))
    ours.bias.copy_(outputs @ theirs.bias)


def refuse_unlearned_channels(vae: AutoencoderKL, trainable: Sequence[str], *, normalization: str | None) -> None:
    """Refuses a run that leaves new channels unread or unmeasured.

    Args:
        trainable, normalization: as given.
    """
    ends = {"encoder.conv_out": vae.encoder.conv_out, "decoder.conv_in": vae.decoder.conv_in}
    if frozen := [name for name, layer in ends.items() if not layer.weight.requires_grad]:
        raise ValueError(
            f"--latent_channels needs layers that learn the new channels, and --trainable {' '.join(trainable)} "
            f"leaves {' and '.join(frozen)} frozen; train both halves in full, or leave --latent_channels out."
        )
    if normalization == "config":
        raise ValueError(
            "--normalization config keeps what was measured on the channels before --latent_channels; leave it out, "
            "or give channel or scalar."
        )
