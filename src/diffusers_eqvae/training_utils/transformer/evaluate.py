"""Samples measured while a transformer trains: always the same noise and labels, so that the curve is the model's."""

from __future__ import annotations

import math

import torch

from ...data.latent_data import LatentData
from ...data.latent_store import LatentStore
from ...metrics.base import Better, build_metrics, measure
from ...metrics.diffusability import linear_predictor_loss
from ...metrics.feature_networks import FeatureNetwork, load_feature_network
from ...metrics.generation import (
    GENERATION_METRICS,
    OFFERS,
    Reference,
    load_reference,
    require_same_classes,
    sample_batches,
)
from ...objectives.base import Objective
from ...objectives.flow_matching import FlowMatchingObjective
from ...pipelines.generated import GeneratedImages
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ...pipelines.sampling import sampled_classes
from ..run import TrainingRun
from .arguments import GenerationEvaluationArguments, SamplingArguments

LINE_LATENTS = 5000  # of the store, evenly spaced, that the loss of a linear predictor is computed from
LINE_SIGMAS = 200  # middles of as many equal shares of the noise levels
LINE_VALUES = 2**27  # beyond so many in the covariance (1 GB) the line is left out


def linear_predictor_line(latents: LatentData, objective: Objective) -> dict[str, float]:
    """The loss that a linear predictor would have on the latents of a store, for the logs beside the model's own.

    "loss_of_linear_predictor" is `metrics.diffusability.linear_predictor_loss` under the objective's noise levels. A
    model that learns goes below it; it says nothing of other latents. Empty where there is none: images encoded on
    the way, tokens, another path or prediction than the velocity on the linear path, too few latents, or so large
    ones that their covariance would not fit.
    """
    store = latents.dataset
    velocity = isinstance(objective, FlowMatchingObjective) and objective.prediction_type == "flow_prediction"
    if not (isinstance(store, LatentStore) and velocity and objective.arguments.flow_path == "linear"):
        return {}
    channels, height, width = latents.latent_shape
    if channels * (channels + 1) // 2 * (height * width) ** 2 > LINE_VALUES:
        return {}
    count = min(LINE_LATENTS, len(store))
    batch = store.get_many(torch.linspace(0, len(store) - 1, count).round().long().tolist())
    raw_latents = store.posterior(batch["moments"].float()).sample(generator=torch.Generator().manual_seed(0))
    sigmas = objective.sigmas((torch.arange(LINE_SIGMAS) + 0.5) / LINE_SIGMAS)
    values = latents.normalization.normalize(raw_latents)
    found = linear_predictor_loss(values, batch.get("class_labels"), sigmas=sigmas)
    return {} if math.isnan(found.value) else {"loss_of_linear_predictor": found.value}


class GenerationEvaluation:
    """Fréchet distances, KID, precision and recall of samples, written to metrics.jsonl and the tracker.

    Samples are 0 .. N-1 of the run's seed, as `training/evaluate_generation.py` draws them from the finished pipeline,
    and shared by the processes: neither their number nor measuring itself changes anything.

    Args:
        arguments: where `evaluation_steps` is 0, nothing is loaded and `measure` does nothing.
        sampling: guidance and steps of the sampler.
        run: whose seed, processes and trackers are used.
        pipeline: around the averaged transformer.
        latents: whose size decides how reference images are cropped.
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
        self.references: dict[FeatureNetwork, Reference] = {}
        if not arguments.evaluation_steps:
            return
        networks = [load_feature_network(name) for name in arguments.feature_networks]
        for network in networks:
            run.add_frozen(network, measures_only=True)
        num_processes = run.accelerator.num_processes
        if arguments.num_evaluation_samples < num_processes:
            raise ValueError(
                f"--num_evaluation_samples must be at least the number of processes, {num_processes}; got "
                f"{arguments.num_evaluation_samples}."
            )
        # Every process takes part in at least one call of the pipeline.
        self.batch_size = min(run.arguments.train_batch_size, arguments.num_evaluation_samples // num_processes)
        options = {"batch_size": self.batch_size, "resolution": latents.resolution_px, "processes": run.accelerator}
        self.references = {
            network: load_reference(str(arguments.evaluation_reference), network, **options) for network in networks
        }
        seed, count = run.arguments.seed, arguments.num_evaluation_samples
        require_same_classes(self.references.values(), sampled_classes(pipeline, count, pipeline.class_ids, seed=seed))

    @property
    def measured(self) -> dict[str, Better]:
        """The figures that `measure` gives, and whether higher or lower ones are better."""
        found: dict[str, Better] = {}
        for network, reference in self.references.items():
            names: dict[str, Better] = {"fid": "lower", "inception_score": "higher"}
            if reference.spatial_mean is not None:
                names["sfid"] = "lower"
            if reference.features is not None:
                names |= {"kid": "lower", "precision": "higher", "recall": "higher"}
            found |= {network.metric_name(name): better for name, better in names.items()}
        return found

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
            metrics = [
                metric
                for network, reference in self.references.items()
                for metric in build_metrics(GENERATION_METRICS, offers=OFFERS, network=network, reference=reference)
            ]
            batches = sample_batches(
                zip(images.blocks, images, strict=True), self.references, references=self.references.values()
            )
            measured = measure(metrics, batches, self.run.accelerator)
            if self.run.is_main:
                self.run.log_figures({f"evaluation/{name}": value for name, value in measured.values().items()})
