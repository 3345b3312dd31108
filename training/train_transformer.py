r"""Trains a class-conditional generator on the latents of any diffusers autoencoder and leaves a complete pipeline.

    eqvae train-transformer sit_b_2 --latents_dir stores/imagenet256 --output_dir runs/sit-b-2

The objective follows the model; a SiT's (arXiv 2401.08740) is the mean square of the predicted velocity
d x / d sigma, with x = alpha(sigma) * latents + beta(sigma) * noise. Latents come from a store of
`eqvae encode-latents` (--latents_dir), or are encoded on the fly (--vae with --train_data_dir or --dataset_name:
centre crops, mirrored with --random_flip).
The finished directory loads with `import diffusers_eqvae` and `DiffusionPipeline.from_pretrained`.
"""

from pathlib import Path

from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.training_utils.arguments import DataArguments, OptimizerArguments, RunArguments
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.launch import run_script
from diffusers_eqvae.training_utils.lora import LoraArguments
from diffusers_eqvae.training_utils.run import TrainingRun
from diffusers_eqvae.training_utils.transformer import arguments as cli
from diffusers_eqvae.training_utils.transformer.build import (
    build_objective,
    build_pipeline,
    check_sampling,
    load_latents,
)
from diffusers_eqvae.training_utils.transformer.evaluate import GenerationEvaluation, linear_predictor_line
from diffusers_eqvae.training_utils.transformer.save import sample_grid, save_pipeline


def main(argv: list[str] | None = None) -> None:
    model, optimizer, lora, sampling, evaluation_arguments, data, run_arguments, methods = parse(
        cli.TransformerArguments,
        OptimizerArguments,
        LoraArguments,
        cli.SamplingArguments,
        cli.GenerationEvaluationArguments,
        DataArguments,
        RunArguments,
        argv=argv,
        description=__doc__,
        script=__file__,
        choices=cli.transformer_choices,
    )
    groups = (model, optimizer, lora, sampling, evaluation_arguments, data, *methods.values())
    run = TrainingRun(run_arguments, *groups, name="transformer")

    latents = load_latents(model, data)
    checkpointing = run_arguments.gradient_checkpointing
    objective = build_objective(model, methods, latents, lora=lora, gradient_checkpointing=checkpointing)
    check_sampling(objective.model, sampling)
    for helper in (latents.vae, *objective.frozen_modules()):
        run.add_frozen(helper)
    wrapped = run.add("objective", objective, **optimizer.options, ema=True)
    averaged = run.averaged("objective")
    pipeline = build_pipeline(averaged, latents, sampling)
    evaluation = GenerationEvaluation(evaluation_arguments, sampling, run, pipeline, latents)
    run.best.require(evaluation.measured, by="evaluation_steps")
    line = linear_predictor_line(latents, objective)

    def save(directory: Path) -> None:
        save_pipeline(
            directory, pipeline, run, arguments=model, objective=averaged, sampling=sampling, latents=latents
        )

    for stored in run.steps(run.loader(latents.dataset)):
        if run.due(run_arguments.validation_steps):
            validate(run, pipeline, sampling)
        if run.due(evaluation_arguments.evaluation_steps):
            evaluation.measure()
        run.push_meanwhile(save)
        batch = latents.read(stored, run.randomness)
        draw = objective.draw(batch, run.randomness)
        loss, logs = objective.total(wrapped(batch, draw))
        run.backward(loss)
        run.log(logs | line)

    if run_arguments.validation_steps:
        validate(run, pipeline, sampling)
    evaluation.measure()
    run.finish(save)
    run.push()


def validate(run: TrainingRun, pipeline: ClassConditionalPipeline, sampling: cli.SamplingArguments) -> None:
    """Samples of the averaged weights, from the same noise each time."""
    if run.is_main:
        with run.validation():
            run.log_images("samples", sample_grid(pipeline, sampling, seed=run.arguments.seed))


if __name__ == "__main__":
    run_script(main)
