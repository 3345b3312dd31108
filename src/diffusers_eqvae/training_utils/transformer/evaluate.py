"""Samples measured while a transformer trains: always the same noise and labels, so that the curve is the model's."""

from __future__ import annotations

from accelerate.utils import gather_object

from ...data.latent_data import LatentData
from ...metrics.feature_networks import load_extractor
from ...metrics.generation import evaluate_generation, load_reference
from ...metrics.image_sets import Collected, Processes, collect
from ...pipelines.generated import GeneratedImages
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..run import TrainingRun
from .arguments import GenerationEvaluationArguments, SamplingArguments


class GenerationEvaluation:
    """Fréchet distance and its company of samples to a reference, written to metrics.jsonl and the tracker.

    Samples are 0 .. N-1 of the run's seed, as `training/evaluate_generation.py` draws them from the finished pipeline,
    and shared by the processes: neither their number nor measuring itself changes anything.

    Args:
        arguments: where `evaluation_steps` is 0, nothing is loaded and `measure` does nothing.
        sampling: guidance and steps of the sampler.
        run: whose seed, processes and trackers are used.
        pipeline: around the averaged transformer.
        latents: whose size decides how reference images are cropped.

    Raises:
        ValueError: fewer samples than processes.
    """

    def __init__(
        self,
        arguments: GenerationEvaluationArguments,
        sampling: SamplingArguments,
        run: TrainingRun,
        pipeline: ClassConditionalPipeline,
        latents: LatentData,
    ) -> None:
        self.arguments, self.sampling, self.run, self.pipeline = arguments, sampling, run, pipeline
        if not arguments.evaluation_steps:
            return
        self.extractor = load_extractor(arguments.evaluator, arguments.evaluator_weights)
        run.add_frozen(self.extractor)
        ranks = (run.accelerator.process_index, run.accelerator.num_processes)
        if arguments.num_evaluation_samples < ranks[1]:
            raise ValueError(
                f"--num_evaluation_samples must be at least the number of processes, {ranks[1]}; got "
                f"{arguments.num_evaluation_samples}."
            )
        # Every process takes part in at least one call of the pipeline.
        self.batch_size = min(run.arguments.train_batch_size, arguments.num_evaluation_samples // ranks[1])
        self.reference = load_reference(
            str(arguments.evaluation_reference),
            self.extractor,
            batch_size=self.batch_size,
            resolution=latents.resolution_px,
            processes=Processes(*ranks, gather_object),
        )

    def measure(self) -> None:
        """Samples and measures; every process must call it."""
        if not self.arguments.evaluation_steps:
            return
        with self.run.validation():
            images = GeneratedImages(
                self.pipeline,
                self.arguments.num_evaluation_samples,
                batch_size=self.batch_size,
                seed=self.run.arguments.seed,
                rank=self.run.accelerator.process_index,
                world_size=self.run.accelerator.num_processes,
                guidance_scale=self.sampling.guidance_scale,
                guidance_interval=self.sampling.guidance_interval,
                num_inference_steps=self.sampling.num_inference_steps,
            )
            samples = Collected.join(gather_object([collect(self.extractor, images)]))
            if self.run.is_main:
                result = evaluate_generation(samples, self.reference, extractor=self.extractor)
                self.run.log_figures({f"evaluation/{name}": value for name, value in result.metrics.items()})
