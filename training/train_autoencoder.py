r"""Fine-tunes any diffusers autoencoder, or trains a new one, with latent-space regularizers.

    eqvae train-autoencoder --pretrained_model_name_or_path stabilityai/sd-vae-ft-mse --train_data_dir IMAGES \
        --regularizers equivariance --output_dir runs/eq-vae

EQ-VAE (arXiv 2502.09509) is `--regularizers equivariance`, ReaLS (arXiv 2502.00359) `alignment`; both compose.
The finished directory loads with plain diffusers, e.g. `AutoencoderKL.from_pretrained("runs/eq-vae")`.
"""

from pathlib import Path

from torch import Tensor

from diffusers_eqvae.images import CAPTIONS, comparison_rows, grid
from diffusers_eqvae.metrics.equivariance import BETTER, measure_equivariance
from diffusers_eqvae.objectives.autoencoder import AutoencoderStep
from diffusers_eqvae.training_utils.autoencoder import build
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderOptions
from diffusers_eqvae.training_utils.autoencoder.save import save_autoencoder
from diffusers_eqvae.training_utils.autoencoder.trainable import keeps_latents
from diffusers_eqvae.training_utils.launch import run_script
from diffusers_eqvae.training_utils.run import TrainingRun


def main(argv: list[str] | None = None) -> None:
    given = AutoencoderOptions.parse(argv, description=__doc__, script=__file__)
    run = TrainingRun(given.run, *given.settings, name="autoencoder")

    objective = build.build_objective(given)
    images, held_out = build.load_images(given, objective, run.global_batch_size)
    examples = build.training_data(given, images, objective)
    smallest_px = build.smallest_image_px(objective, images.shortest_px)
    seen = {"smallest_px": smallest_px, "channels": images.source.channels}
    perceptual = build.build_perceptual(given.losses, **seen)
    discriminator = build.build_discriminator(given.losses, **seen, compiled=given.run.compile)

    # Only wrapped modules are called in the step: DDP and autocast live in the wrapping.
    wrapped_objective = run.add("objective", objective, **given.optimizer.options, ema=True)
    for helper in objective.frozen_modules():
        run.add_frozen(helper)
    wrapped_discriminator = None
    if discriminator is not None:
        rate = given.losses.disc_learning_rate
        wrapped_discriminator = run.add(
            "discriminator", discriminator, **given.optimizer.discriminator_options, learning_rate=rate
        )
    step = AutoencoderStep(
        wrapped_objective,
        objective,
        weights=build.build_loss_weights(given.losses),
        perceptual=None if perceptual is None else run.add_frozen(perceptual),
        discriminator=wrapped_discriminator,
        randomness=run.randomness,
        average=lambda tensor: run.accelerator.reduce(tensor, reduction="mean"),
    )

    run.best.require(BETTER if given.run.validation_steps else {}, by="validation_steps")
    figures: dict[str, float] = {}

    def save(directory: Path) -> None:
        trained = {"discriminator": discriminator, "latents_kept": keeps_latents(objective.model)}
        save_autoencoder(directory, run, given, **trained, images=images, held_out=held_out, figures=figures)

    for batch in run.steps(run.loader(examples)):
        if run.due(given.run.validation_steps, at_start=True):
            figures = validate(run, held_out)
        run.push_meanwhile(save)
        draw = objective.draw(batch, run.randomness)
        loss, discriminator_loss, logs = step(batch, draw, run.step)
        run.backward(loss)
        if discriminator_loss is not None:
            run.backward(discriminator_loss, inputs=list(discriminator.parameters()))
        run.log(logs)

    figures = validate(run, held_out)
    run.finish(save)
    run.push()


def validate(run: TrainingRun, held_out: Tensor) -> dict[str, float]:
    """Reconstruction and equivariance of the averaged weights on images (N, C, S, S), and four of them drawn."""
    if not run.is_main:
        return {}
    vae = run.averaged("objective").model
    held_out = held_out.to(run.device)
    with run.validation():
        figures = measure_equivariance(vae, held_out.split(run.arguments.train_batch_size))
        run.log_figures({f"validation/{name}": value for name, value in figures.items()})
        run.log_images("comparison", [grid(comparison_rows(vae, held_out[:4]), CAPTIONS)])
    return figures


if __name__ == "__main__":
    run_script(main)
