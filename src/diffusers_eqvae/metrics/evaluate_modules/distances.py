"""What the metric modules rfid and gfid share: images become features at once, and only these are kept."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..feature_networks import FeatureExtractor, load_extractor
from ..generation import GenerationResult
from ..image_sets import Collected, as_levels, image_digests, one_size


class DistanceMetric(evaluate.Metric):
    """Takes images in batches, runs each through a feature network when it comes, and keeps rows of features.

    Args:
        config_name: the network: inception (the default, and the only one that gives FID), dinov2, squeezenet or
            cifar_resnet.
        weights: file of its weights (dinov2: directory or Hub name).
        extractor: a network of your own instead of these two, `metrics.feature_networks.ModuleFeatures(...)`.
        device: where it runs.
        options: of `evaluate.EvaluationModule`: num_process, process_id, experiment_id, cache_dir ...

    Raises:
        ValueError, FileNotFoundError: as `metrics.feature_networks.load_extractor`.
    """

    SIDES: tuple[str, ...] = ("predictions",)

    def __init__(
        self,
        config_name: str | None = None,
        *,
        weights: str | None = None,
        extractor: FeatureExtractor | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        network = load_extractor(config_name or "inception", weights) if extractor is None else extractor
        self.extractor = network.to(device)
        self._widths: dict[str, int] = {}
        self._size: tuple[int, ...] | None = None
        super().__init__(config_name=config_name or "inception", **options)

    def _features(self) -> datasets.Features:
        # Bytes: `evaluate` would give lists of floats back as Python numbers, 2048 and more a image.
        names = [*self.SIDES, *(f"{side}_digest" for side in self.SIDES)]
        return datasets.Features(dict.fromkeys(names, datasets.Value("binary")))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Adds images: uint8 (B, H, W, 3), or floats (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: another shape, dtype or range, NaN, sides of unequal length, or another size than before.
        """
        if others or (references is not None) != ("references" in self.SIDES):
            given = [name for name, value in {"references": references, **others}.items() if value is not None]
            raise ValueError(
                f"This metric takes {' and '.join(self.SIDES)}; got {', '.join(['predictions', *given])}."
            )
        sides = {"predictions": predictions, "references": references}
        levels = {side: as_levels(sides[side], side) for side in self.SIDES}
        if len({each.shape for each in levels.values()}) > 1:
            shapes = " and ".join(str(each.shape) for each in levels.values())
            raise ValueError(f"Each reconstruction needs its own image, equally large; got {shapes}.")
        self._size = one_size(levels["predictions"], self._size)
        columns = {side: self._rows(each) for side, each in levels.items()}
        columns |= {f"{side}_digest": image_digests(each) for side, each in levels.items()}
        super().add_batch(**columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Adds one image, uint8 (H, W, 3) or floats (3, H, W): a batch of one, which is slower than larger ones.

        Raises:
            ValueError: as `add_batch`.
        """
        sides = {"predictions": prediction, "references": reference, **others}
        batch = {name: value[None] if hasattr(value, "ndim") else value for name, value in sides.items()}
        self.add_batch(**batch)

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any] | None:
        """The numbers of all images since the last call, with those given here; None on other processes than 0."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            raise ValueError("At least one image is needed; call add_batch first.")
        self._size = None
        return super().compute(**options)

    def _rows(self, levels: np.ndarray) -> list[bytes]:
        """Everything the network gives of a image, side by side in float32: B rows of bytes."""
        outputs = self.extractor(torch.from_numpy(np.array(levels, order="C")).permute(0, 3, 1, 2))
        self._widths = {name: value.shape[1] for name, value in outputs.items()}
        return [row.tobytes() for row in torch.cat([value.cpu() for value in outputs.values()], dim=1).numpy()]

    def _collected(self, rows: list[bytes], digests: list[bytes]) -> Collected:
        values = torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.float32).reshape(len(rows), -1).copy())
        parts = values.split(list(self._widths.values()), dim=1)
        outputs = dict(zip(self._widths, parts, strict=True))
        return Collected(outputs["features"], outputs.get("logits"), outputs.get("spatial"), list(digests))

    def _result(self, result: GenerationResult, count: int) -> dict[str, Any]:
        network = {"evaluator": self.extractor.name, "weights_hash": self.extractor.weights_hash}
        return {**result.metrics, "num_samples": count, **network, "marks": result.marks}
