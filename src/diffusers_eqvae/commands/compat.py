"""Says whether a generator trained on one autoencoder's latents can go on with another one, and what to do if not.

eqvae compat runs/eq-vae stabilityai/sd-vae-ft-mse --data_dir IMAGES

Measures both on the same images, at the posterior mean and as a generator sees latents: normalised by their own
configs. The limits of the verdict are own choice, and stand in docs/my_unet.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..autoencoders import Autoencoder, decode, downsampling_factor, encode, load_autoencoder, require_fitting
from ..directories import require_replaceable
from ..images import to_uint8
from ..inspection.health import POOR_PSNR_DB
from ..inspection.run import load_images
from ..latents import LatentNormalization, latent_channels
from ..metrics.image_sets import hash_digests, image_digests
from ..metrics.reconstruction import psnr
from ..metrics.result_card import ResultCard, is_card_of
from ..options import Checked, inputs_of
from ..provenance import LATENT_SPACE, autoencoder_identity, hardware
from ..tokens import has_codebook
from ..training_utils.command_line import parse
from ..training_utils.console import start_logging
from ..training_utils.launch import require_device

# Own choice. Distances and residuals are squared, and relative to the variance of BASE's latents.
EQUAL_DISTANCE = 1e-4  # what storing weights or latents in 16 bits does
SWAP_LOSS_DB = 0.5
AFFINE_RESIDUAL = 0.01
NEXT = {
    "drop-in": "Put NEW in the place of BASE; generators, latent stores and adapters stay as they are.",
    "decoder-only swap": "Decode by NEW what the old generator draws, and go on encoding by BASE: only the decoder of "
    "pipe.vae (with post_quant_conv) is NEW's.",
    "affine fit suffices": "Map NEW's latents onto BASE's by the card's fit (details.affine). Per channel it is a "
    "latents_mean and latents_std of NEW's config, printed here; over all channels a 1x1 convolution.",
    "needs adaptation": "Encode the data again and go on training the generator: eqvae encode-latents --vae NEW "
    "--train_data_dir DATA --output_dir LATENTS, then eqvae train-transformer --model OLD --latents_dir LATENTS. A "
    "UNet of SD or SDXL is trained by its own trainer, with NEW as its --vae.",
}
PAGE = "docs/my_unet.md"


@dataclass
class CompatArguments(Checked):
    """Two autoencoders, and the images that they are compared on.

    Example:
        >>> CompatArguments(new="runs/eq-vae", base="madebyollin/taesd", data_dir="kodak").num_images
        24
    """

    new: str = field(metadata={"reads": True, "help": "The autoencoder to use: a directory or Hub name."})
    base: str = field(metadata={"reads": True, "help": "The one that the generator was trained with."})
    data_dir: str = field(metadata={"reads": True, "help": "Folder of images to measure on."})
    resolution: int = field(default=256, metadata={"help": "Side of the centre crops in pixels.", "range": "(0, inf)"})
    num_images: int = field(default=24, metadata={"help": "Images, evenly spaced in data_dir.", "range": "(0, inf)"})
    device: str = field(default="cpu", metadata={"help": "Where the networks run, e.g. cuda."})
    output: str | None = field(default=None, metadata={"help": "Result card to write, a .json file."})


@dataclass(frozen=True)
class Affine:
    """The affine map of latents that comes nearest to others, in the mean of squares.

    Args:
        matrix: (C, C) in float64; diagonal where channels were fitted one by one.
        bias: (C,).
        residual: what it leaves of the distance, squared, relative to the others' variance.
    """

    matrix: Tensor
    bias: Tensor
    residual: float


@dataclass(frozen=True)
class Compatibility:
    """What was measured of NEW against BASE.

    Attributes:
        distance: |E_new - E_base|^2 over the variance of E_base around its channel means, of normalised latents.
        per_channel, one_by_one: from E_new to E_base, by channel, and over all channels.
        psnr: dB of "own_new" D_new(E_new), "own_base", "new_decodes_base" D_new(E_base), "base_decodes_new".
        same_encoder: whether encoder, codebook and normalisation are the same to the bit.

    Example:
        >>> compatibility(new, base, images).verdict
        'needs adaptation'
    """

    distance: float
    per_channel: Affine
    one_by_one: Affine
    psnr: dict[str, float]
    same_encoder: bool

    def explained(self, fit: Affine) -> float | None:
        """Share of the distance that a map takes away; None where there is none. Unrelated latents have about .5."""
        return 1.0 - fit.residual / self.distance if self.distance else None

    @property
    def affine(self) -> Affine | None:
        """The simpler map that suffices, or None."""
        return next((fit for fit in (self.per_channel, self.one_by_one) if fit.residual <= AFFINE_RESIDUAL), None)

    @property
    def swap_loss(self) -> float:
        """dB that NEW's decoder loses on BASE's latents, against BASE's own decoder."""
        return self.psnr["own_base"] - self.psnr["new_decodes_base"]

    @property
    def verdict(self) -> str:
        if self.same_encoder or self.distance < EQUAL_DISTANCE:
            return "drop-in"
        if self.psnr["own_base"] >= POOR_PSNR_DB and self.swap_loss <= SWAP_LOSS_DB:
            return "decoder-only swap"
        return "needs adaptation" if self.affine is None else "affine fit suffices"


def compatibility(new: Autoencoder, base: Autoencoder, images: Tensor) -> Compatibility:
    """Measures two autoencoders of one latent shape on images (N, 3, S, S) in [-1, 1], one at a time.

    Raises:
        ValueError: other latent channels or another stride, a codebook, or latents of BASE that do not vary.

    Example:
        >>> compatibility(new, base, images).psnr["base_decodes_new"]
    """
    require_comparable(new, base)
    normalizations = [LatentNormalization.from_vae(vae) for vae in (new, base)]
    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    quality: dict[str, list[float]] = {}
    with torch.no_grad():
        for image in images.split(1):
            coded = [
                normalization.normalize(encode(vae, image).mode())
                for vae, normalization in zip((new, base), normalizations, strict=True)
            ]
            raw = [[each.denormalize(latent) for latent in coded] for each in normalizations]
            for name, vae, latent in (
                ("own_new", new, raw[0][0]),
                ("own_base", base, raw[1][1]),
                ("new_decodes_base", new, raw[0][1]),
                ("base_decodes_new", base, raw[1][0]),
            ):
                quality.setdefault(name, []).append(psnr(decode(vae, latent), image).item())
            for seen, latent in zip(latents, coded, strict=True):
                seen.append(latent.cpu().double().transpose(0, 1).flatten(1).T)
    x, y = map(torch.cat, latents)
    variance = (y - y.mean(0)).square().sum().item()
    if not variance > 0:
        raise ValueError("BASE gives the same latents everywhere, so no distance to them has a unit; look at BASE.")
    identities = [autoencoder_identity(vae) for vae in (new, base)]
    return Compatibility(
        (x - y).square().sum().item() / variance,
        fit_per_channel(x, y, variance),
        fit_one_by_one(x, y, variance),
        {name: math.fsum(values) / len(values) for name, values in quality.items()},
        all(identities[0][part] == identities[1][part] for part in ("class", *LATENT_SPACE)),
    )


def require_comparable(new: Autoencoder, base: Autoencoder) -> None:
    """Refuses autoencoders whose latents cannot be put beside each other."""
    shapes = [(latent_channels(vae), downsampling_factor(vae)) for vae in (new, base)]
    if shapes[0] != shapes[1]:
        (a, b), (c, d) = shapes
        raise ValueError(
            f"NEW has {a} latent channels of stride {b} and BASE {c} of stride {d}: no generator of the one reads "
            "latents of the other; train one from scratch on NEW's."
        )
    if has_codebook(new) or has_codebook(base):
        raise ValueError(
            "Tokens of a codebook are equal or are not, and have no distance; eqvae compat is for autoencoders "
            "without a codebook."
        )


def fit_per_channel(x: Tensor, y: Tensor, variance: float) -> Affine:
    """Least squares of y on x, both (P, C) in float64, for each channel by itself; `variance` is sum |y - mean|^2."""
    centred = x - x.mean(0)
    squares = centred.square().sum(0)
    slope = torch.where(squares > 0, (centred * (y - y.mean(0))).sum(0) / squares, 0.0)
    bias = y.mean(0) - slope * x.mean(0)
    return Affine(torch.diag(slope), bias, (x * slope + bias - y).square().sum().item() / variance)


def fit_one_by_one(x: Tensor, y: Tensor, variance: float) -> Affine:
    """The same over all channels: a 1x1 convolution."""
    matrix = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution.T
    bias = y.mean(0) - matrix @ x.mean(0)
    return Affine(matrix, bias, (x @ matrix.T + bias - y).square().sum().item() / variance)


def stated_by(fit: Affine, normalization: LatentNormalization) -> LatentNormalization | None:
    """The normalisation by which NEW's latents are mapped by a fit per channel; None where it turns a sign.

    slope (raw - mean) / std + bias  =  (raw - (mean - bias std / slope)) / (std / slope)
    """
    slope = fit.matrix.diagonal()
    if not torch.equal(fit.matrix, torch.diag(slope)) or not bool((slope > 0).all()):
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization.mean_and_std)
    shifted, scaled = mean - fit.bias * std / slope, std / slope
    return LatentNormalization(tuple(shifted.tolist()), tuple(scaled.tolist()))


def report(found: Compatibility, stated: LatentNormalization | None) -> str:
    """Figures, verdict and the next step, in words."""
    lines = [f"latents: relative distance {found.distance:.3g}{' (the same encoder)' if found.same_encoder else ''}"]
    for name, fit in (("each channel", found.per_channel), ("all channels (1x1)", found.one_by_one)):
        share = found.explained(fit)
        if share is not None:
            lines.append(f"  an affine map of {name} explains {share:.2%} of it and leaves {fit.residual:.3g}")
    quality = found.psnr
    lines += [
        f"own reconstructions: NEW {quality['own_new']:.2f} dB, BASE {quality['own_base']:.2f} dB",
        f"D_base(E_new): {quality['base_decodes_new']:.2f} dB; D_new(E_base): {quality['new_decodes_base']:.2f} dB",
        f"verdict: {found.verdict}",
        f"next: {NEXT[found.verdict]} See {PAGE}.",
    ]
    if found.verdict == "affine fit suffices" and stated is not None:
        lines.append(f"  for NEW's config.json: {stated.to_config()}")
    return "\n".join(lines)


def result_card(
    found: Compatibility, vaes: Sequence[Autoencoder], arguments: CompatArguments, images: Tensor
) -> ResultCard:
    """The figures as a result card of NEW, with the identity of BASE."""
    new, base = vaes
    pixels = to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()
    side, reference = arguments.resolution, autoencoder_identity(base)
    metrics = {f"psnr_{name}" if name != "own_new" else "psnr": value for name, value in found.psnr.items()}
    shares = {"per_channel": found.per_channel, "one_by_one": found.one_by_one}
    explained = {
        f"explained_{name}": share for name, fit in shares.items() if (share := found.explained(fit)) is not None
    }
    return ResultCard(
        {"relative_distance": found.distance, **explained, **metrics},
        {
            "data_hash": hash_digests(image_digests(pixels)),
            "num_images": len(images),
            "image_size": f"{side}x{side}",
            "resize_rule": f"ADM centre crop to {side} px",
            "posterior": "mean",
            "relative_distance.base": reference,
        },
        settings={"model": arguments.new, "model_class": type(new).__name__, "autoencoder": autoencoder_identity(new)},
        provenance={"data": Path(arguments.data_dir).name, "base": arguments.base, **hardware(arguments.device)},
        task="reconstruction",
        details={
            "base": reference,
            "verdict": found.verdict,
            "limits": {"distance": EQUAL_DISTANCE, "swap_loss_db": SWAP_LOSS_DB, "affine_residual": AFFINE_RESIDUAL},
            "affine": {
                name: {"matrix": fit.matrix.tolist(), "bias": fit.bias.tolist(), "residual": fit.residual}
                for name, fit in shares.items()
            },
        },
    )


def main(argv: Sequence[str]) -> int:
    argv = list(argv)
    if len(argv) > 1 and not argv[0].startswith("-") and not argv[1].startswith("-"):
        argv[:2] = ["--new", argv[0], "--base", argv[1]]
    description = f"{__doc__}\n`eqvae compat NEW BASE ...` is short for `eqvae compat --new NEW --base BASE ...`."
    (arguments,) = parse(CompatArguments, argv=argv, description=description)
    start_logging(format="%(levelname)s: %(message)s")
    if arguments.output is not None:
        own = partial(is_card_of, model=arguments.new, base=arguments.base, data=Path(arguments.data_dir).name)
        require_replaceable(arguments.output, inputs=inputs_of(arguments), ours=own)
    device = require_device(arguments.device)
    new, base = (load_autoencoder(name).to(device) for name in (arguments.new, arguments.base))
    require_comparable(new, base)
    require_fitting(arguments.resolution, new)
    images = load_images(arguments.data_dir, resolution=arguments.resolution, num_images=arguments.num_images)
    found = compatibility(new, base, images.to(device))
    fit = found.affine
    print(report(found, None if fit is None else stated_by(fit, LatentNormalization.from_vae(new))))
    if arguments.output is not None:
        result_card(found, (new, base), arguments, images).save(arguments.output)
    return 0
