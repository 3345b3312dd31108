r"""Trains a class-conditional SiT on the latents of any diffusers autoencoder and leaves a complete pipeline.

    accelerate launch training/train_transformer.py training/configs/sit_b_2.yaml \
        --latents_dir stores/imagenet256 --output_dir runs/sit-b-2

The objective is SiT's (arXiv 2401.08740): with x = alpha(sigma) * latents + beta(sigma) * noise, the mean square of
the predicted velocity d x / d sigma. Latents come from a store of training/encode_latents.py (--latents_dir), or are
encoded on the fly (--vae with --train_data_dir or --dataset_name: centre crops, mirrored with --random_flip).
The finished directory loads with `import diffusers_eqvae` and `DiffusionPipeline.from_pretrained`.
"""

from pathlib import Path

from diffusers_eqvae.flow import interpolate, sample_sigmas, velocity_target
from diffusers_eqvae.hub import push_run
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.losses.diffusion import flow_matching_loss
from diffusers_eqvae.training_utils.arguments import DataArguments, RunArguments, parse
from diffusers_eqvae.training_utils.launch import run_script
from diffusers_eqvae.training_utils.run import TrainingRun
from diffusers_eqvae.training_utils.transformer.arguments import (
    FlowArguments,
    GenerationEvaluationArguments,
    SamplingArguments,
    TransformerArguments,
)
from diffusers_eqvae.training_utils.transformer.build import (
    build_pipeline,
    build_transformer,
    check_guidance,
    load_latents,
)
from diffusers_eqvae.training_utils.transformer.evaluate import GenerationEvaluation
from diffusers_eqvae.training_utils.transformer.save import sample_grid, save_pipeline

NUM_TRAIN_TIMESTEPS = 1000


def main(argv: list[str] | None = None) -> None:
    arguments, flow, sampling, evaluating, data, run_arguments = parse(
        TransformerArguments,
        FlowArguments,
        SamplingArguments,
        GenerationEvaluationArguments,
        DataArguments,
        RunArguments,
        argv=argv,
        description=__doc__,
    )
    run = TrainingRun(run_arguments, arguments, flow, sampling, evaluating, data, name="transformer")

    latents = load_latents(arguments, data)
    model = build_transformer(arguments, latents, gradient_checkpointing=run_arguments.gradient_checkpointing)
    check_guidance(model, sampling)
    run.add_frozen(latents.vae)
    normalization = LatentNormalization.from_vae(latents.vae)
    transformer = run.add(
        "transformer",
        model,
        optimizer="adamw",
        betas=(flow.adam_beta1, flow.adam_beta2),
        weight_decay=flow.weight_decay,
        ema=True,
    )
    pipeline = build_pipeline(run.averaged("transformer"), latents, path=flow.path)
    evaluation = GenerationEvaluation(evaluating, sampling, run, pipeline, latents)

    def validate() -> None:
        if run.is_main:
            with run.validation():
                run.log_images("samples", sample_grid(pipeline, sampling, seed=run_arguments.seed))

    for batch in run.steps(run.loader(latents.dataset)):
        if run.due(run_arguments.validation_steps):
            validate()
        if run.due(evaluating.evaluation_steps):
            evaluation.measure()
        posterior = latents.posterior(batch)
        shape = posterior.mean.shape
        clean = normalization.normalize(posterior.sample(run.randomness.randn(shape, device=run.device)))
        noise = run.randomness.randn(shape, device=run.device)
        sigmas = sample_sigmas(
            run.randomness.rand(shape[:1], device=run.device),
            flow.sigma_distribution,
            mean=flow.sigma_mean,
            std=flow.sigma_std,
        )
        drop_labels = run.randomness.rand(shape[:1], device=run.device) < model.config.class_dropout_prob

        prediction = transformer(
            interpolate(clean, noise, sigmas, flow.path),
            timestep=NUM_TRAIN_TIMESTEPS * sigmas,
            class_labels=batch["class_labels"],
            drop_labels=drop_labels,
        ).sample
        loss = flow_matching_loss(prediction, velocity_target(clean, noise, sigmas, flow.path)).mean()
        run.backward(loss)
        run.log({"loss": loss})

    if run_arguments.validation_steps:
        validate()
    evaluation.measure()

    def save(directory: Path) -> None:
        save_pipeline(directory, pipeline, run, arguments=arguments, flow=flow, sampling=sampling, latents=latents)

    run.finish(save)
    if run_arguments.push_to_hub and run.is_main:
        push_run(run.output_dir, run_arguments.hub_model_id or run.output_dir.name)


if __name__ == "__main__":
    run_script(main)
