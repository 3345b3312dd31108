r"""Measures an autoencoder on exactly N centre-cropped images of a data set and writes a result card (JSON).

    accelerate launch training/evaluate_autoencoder.py --vae runs/eq-vae --train_data_dir IMAGES \
        --resolution 256 --num_images 5000 --output eq-vae.json
    accelerate launch training/evaluate_autoencoder.py --vae runs/eq-vae --train_data_dir IMAGES \
        --rfid --weights weights-inception-2015-12-05-6726825d.pth --output eq-vae.json

PSNR, SSIM, LPIPS (where its weights are given), rFID (with --rfid), equivariance errors and what transforming latents
costs, intrinsic dimension, spectrum and channel statistics of the latents, all from one reconstruction per image.
`eqvae compare` reads the cards. The number of processes changes no bit, the batch size changes last digits.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.files import require_writable
from diffusers_eqvae.images import UINT8_RULE
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.metrics.autoencoder import DEFINITIONS, AutoencoderPass, split_summary, summarize
from diffusers_eqvae.metrics.feature_networks import EvaluatorName, load_extractor
from diffusers_eqvae.metrics.generation import GenerationResult, evaluate_reconstruction, network_facts
from diffusers_eqvae.metrics.inputs import ImageSet
from diffusers_eqvae.metrics.result_card import ResultCard
from diffusers_eqvae.provenance import hardware, model_revision, weights_hash
from diffusers_eqvae.training_utils.arguments import DataArguments, warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.launch import build_state, run_script


@dataclass
class ImageArguments(DataArguments):
    """Which images to measure on; always ADM's centre crop."""

    center_crop: bool = field(init=False, default=True)
    random_flip: bool = field(init=False, default=False)


@dataclass
class EvaluateArguments:
    """What to measure, and where the figures go."""

    vae: str = field(metadata={"help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."})
    output: str = field(metadata={"help": "The card, a JSON file."})
    num_images: int | None = field(
        default=None, metadata={"help": "Measure on the first so many images; unset measures on all."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images per forward; changes last digits."})
    sample_posterior: bool = field(
        default=False, metadata={"help": "Reconstruct a sample of the posterior instead of its mean."}
    )
    seed: int = field(default=0, metadata={"help": "Of the samples; every image has noise of its own."})
    max_points: int = field(default=10_000, metadata={"help": "Latents that the intrinsic dimension is taken of."})
    lpips_net: Literal["vgg", "alex", "squeeze"] = field(default="vgg", metadata={"help": "LPIPS network."})
    lpips_backbone_weights: str | None = field(
        default=None, metadata={"help": "Its ImageNet weights; LPIPS is measured if these are given."}
    )
    lpips_linear_weights: str | None = field(default=None, metadata={"help": "Its linear heads, v0.1."})
    rfid: bool = field(default=False, metadata={"help": "Measure rFID, by the network of --evaluator."})
    evaluator: EvaluatorName = field(
        default="inception", metadata={"help": "inception gives rfid; the others name themselves in the number."}
    )
    weights: str | None = field(
        default=None, metadata={"help": "File of that network's weights; for dinov2 a directory or Hub name."}
    )


def warn_of_unused(arguments: EvaluateArguments) -> None:
    """Flags that need another one, which is not there."""
    if not arguments.rfid:
        warn_without_effect(arguments, ("evaluator", "weights"), "--rfid is not given")
    if arguments.lpips_backbone_weights is None:
        warn_without_effect(arguments, ("lpips_net", "lpips_linear_weights"), "--lpips_backbone_weights is not given")
    if not arguments.sample_posterior:
        warn_without_effect(arguments, ("seed",), "the posterior's mean is reconstructed")


def main(argv: list[str] | None = None) -> ResultCard | None:
    arguments, data = parse(EvaluateArguments, ImageArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    state = build_state()
    require_writable(arguments.output)
    if state.is_main_process:
        warn_of_unused(arguments)
    vae = load_autoencoder(arguments.vae).requires_grad_(False)
    facts = {"model": arguments.vae, "model_class": type(vae).__name__, "weights": weights_hash(vae)}
    facts |= {"vae_revision": model_revision(vae), "dtype": "float32"}
    facts |= {"seed": arguments.seed} if arguments.sample_posterior else {}
    with state.main_process_first():
        images = ImageSet(data.load(), name=data.name, resolution=data.resolution, limit=arguments.num_images)

    perceptual, extractor = None, None
    if arguments.lpips_backbone_weights is not None:
        files = {"backbone_weights": arguments.lpips_backbone_weights}
        files["linear_weights"] = arguments.lpips_linear_weights
        perceptual = LPIPS.from_pretrained(arguments.lpips_net, **files).to(state.device)
    if arguments.rfid:
        extractor = load_extractor(arguments.evaluator, arguments.weights).to(state.device)

    noise_seed = arguments.seed if arguments.sample_posterior else None
    own = AutoencoderPass(vae.to(state.device), perceptual=perceptual, extractor=extractor, noise_seed=noise_seed)
    ranks = {"rank": state.process_index, "world_size": state.num_processes}
    for block in tqdm(images.blocks(arguments.batch_size, **ranks), disable=not state.is_main_process):
        own.add(images.read(block), first_index=block.start)
    measured = own.join(gather_object)

    if state.is_main_process:
        metrics, marks, details = split_summary(summarize(measured.figures, max_points=arguments.max_points))
        protocol = {"data_hash": measured.hash, "num_images": len(images), "resize_rule": images.resize_rule}
        protocol |= {"posterior": "sample" if arguments.sample_posterior else "mean", "definitions": DEFINITIONS}
        protocol["intrinsic_dimension_points"] = details["intrinsic_dimension_points"]
        if perceptual is not None:
            protocol |= {"lpips_net": arguments.lpips_net, "lpips_weights_hash": weights_hash(perceptual)}
        result = GenerationResult({})
        if extractor is not None:
            result = evaluate_reconstruction(measured.reconstructions, measured.images, extractor=extractor)
            protocol |= {**network_facts(extractor), "uint8_rule": UINT8_RULE}
        provenance = {"data": images.name, "split": data.split}
        provenance |= hardware(state.device)
        card = ResultCard(
            {**metrics, **result.metrics}, protocol, facts, marks | result.marks, provenance, "reconstruction", details
        )
        card.save(arguments.output)
        print(card.summary(), f"card: {arguments.output}", sep="\n")
    state.wait_for_everyone()
    state.destroy_process_group()
    return card if state.is_main_process else None


if __name__ == "__main__":
    run_script(main)
