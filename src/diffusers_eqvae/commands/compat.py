"""Says whether a generator trained on one autoencoder's latents can go on with another one, and what to do if not.

eqvae compat runs/eq-vae stabilityai/sd-vae-ft-mse --data_dir IMAGES

Measures both on the same images, at the posterior mean and as a generator sees latents: normalised by their own
configs. The limits of the verdict are own choice, and stand in docs/my_unet.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from ..autoencoders import Autoencoder, load_autoencoder, require_fitting
from ..directories import require_replaceable
from ..images import require_channels, to_uint8
from ..inspection.compatibility import (
    AFFINE_RESIDUAL,
    EQUAL_DISTANCE,
    SWAP_LOSS_DB,
    Compatibility,
    compatibility,
    require_comparable,
    stated_by,
)
from ..inspection.run import load_images
from ..latents import LatentNormalization
from ..metrics.autoencoder import DEFINITIONS
from ..metrics.image_sets import hash_digests, image_digests
from ..metrics.result_card import ResultCard, is_card_of
from ..options import Checked, inputs_of
from ..provenance import autoencoder_identity, hardware, hub_commit
from ..training_utils.command_line import parse
from ..training_utils.console import start_logging
from ..training_utils.launch import require_device
from ..training_utils.next_steps import NEXT

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
            "definitions": DEFINITIONS,
            "relative_distance.base": reference,
        },
        settings={"model": arguments.new, "model_class": type(new).__name__, "autoencoder": autoencoder_identity(new)},
        provenance={
            "data": Path(arguments.data_dir).name,
            "base": arguments.base,
            "hub_commit": hub_commit(arguments.new),
            **hardware(arguments.device),
        },
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
    channels = require_channels(new)
    require_channels(base, channels)
    require_fitting(arguments.resolution, new)
    images = load_images(
        arguments.data_dir, resolution=arguments.resolution, num_images=arguments.num_images, channels=channels
    )
    found = compatibility(new, base, images.to(device))
    fit = found.affine
    print(report(found, None if fit is None else stated_by(fit, LatentNormalization.from_vae(new))))
    if arguments.output is not None:
        result_card(found, (new, base), arguments, images).save(arguments.output)
    return 0
