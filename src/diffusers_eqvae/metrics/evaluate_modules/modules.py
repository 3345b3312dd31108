"""The metric modules of Hugging Face `evaluate`: one class each, described by its docstring."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from ...equivariance import equivariance_error
from ...images import UINT8_RULE, to_uint8
from ..base import Measurement
from ..feature_networks import FeatureNetwork, load_feature_network
from ..generation import evaluate_generation, evaluate_reconstruction, load_reference
from ..image_sets import Features, image_digests, require_one_size, size_of, to_tensor
from ..latent_statistics import channel_statistics, high_frequency_share, intrinsic_dimension_if_defined
from ..members.diffusability import diffusability_figures

FID_PAPER = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017"
# Floats beyond it are not pixels in [-1, 1], which decoders overshoot a little, but 0 .. 255.
LARGEST_PIXEL = 3.0


class _Module(evaluate.Metric):
    """Gives `evaluate` the class's docstring, its `citation` and what `_features` says of a row."""

    citation: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        description, _, inputs = str(inspect.getdoc(type(self))).partition("\n\nArgs:\n")
        return evaluate.MetricInfo(
            description=description,
            citation=self.citation,
            inputs_description=f"Args:\n{inputs}",
            features=datasets.Features(self._features()),
        )


def _latents() -> datasets.Sequence:
    return datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


class EquivarianceError(_Module):
    """Relative squared error |tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2 of latents under a transform tau.

    The mean over images (EQ-VAE, arXiv 2502.09509, table 1), 0 = equivariant; and the same with |E(tau(x))|^2 taken
    around the channel means, which an offset of the latents cannot flatter.

    Args:
        predictions: transformed latents tau(E(x)), (B, C, h, w) as arrays or nested lists.
        references: latents of transformed images E(tau(x)), of the same shapes; shapes may differ between images.

    Returns:
        equivariance_error, equivariance_error_centred.

    Example:
        >>> evaluate.load(module_path("equivariance_error")).compute(predictions=latents, references=latents)
        {'equivariance_error': 0.0, 'equivariance_error_centred': 0.0}
    """

    citation = (
        "Kouzelis et al., EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling, 2025"
    )

    def _features(self) -> dict[str, Any]:
        return {"predictions": _latents(), "references": _latents()}

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        errors = []
        for pair in zip(predictions, references, strict=True):
            transformed, encoded = (torch.from_numpy(np.array(each, dtype=np.float64))[None] for each in pair)
            errors.append([equivariance_error(encoded, transformed, centred=c).item() for c in (False, True)])
        plain, centred = np.mean(errors, axis=0)
        return {"equivariance_error": float(plain), "equivariance_error_centred": float(centred)}


class LatentHealth(_Module):
    """What latents look like to a generator.

    Mean, standard deviation and excess kurtosis per channel, the share of their variance above a quarter cycle per
    position (0 is smooth, white noise has .80), their intrinsic dimension (TwoNN, Facco et al. 2017), and what
    `metrics.diffusability` says of them: viv (over clusters of latents), viv_per_dimension, linear_loss, sec, lds.

    Args:
        predictions: latents (B, C, h, w) of images, all of one shape, as an array or nested lists.

    Returns:
        mean, std, kurtosis (lists per channel), high_frequency, intrinsic_dimension (None below 10 different
        latents), num_samples.

    Example:
        >>> evaluate.load(module_path("latent_health")).compute(predictions=latents)["high_frequency"]
    """

    citation = (
        "Facco et al., Estimating the intrinsic dimension of datasets by a minimal neighborhood information, 2017"
    )

    def _features(self) -> dict[str, Any]:
        return {"predictions": _latents()}

    def _compute(self, predictions: list) -> dict[str, Any]:
        latents = torch.from_numpy(np.array(predictions, dtype=np.float32))
        figures = diffusability_figures(latents)
        return {
            **channel_statistics(latents),
            "high_frequency": high_frequency_share(latents).double().mean().item(),
            "intrinsic_dimension": intrinsic_dimension_if_defined(latents.flatten(1)),
            **{name: figure.value if math.isfinite(figure.value) else None for name, figure in figures.items()},
            "num_samples": len(latents),
            "caveats": {name: figure.caveat for name, figure in figures.items() if figure.caveat},
        }


class _FeatureModule(_Module):
    """Runs images through a feature network when they come, and keeps rows of features."""

    citation = FID_PAPER
    sides: ClassVar[tuple[str, ...]] = ("predictions",)

    def __init__(
        self,
        config_name: str | None = None,
        *,
        weights: str | None = None,
        network: FeatureNetwork | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        config_name = config_name or "inception"
        self.network = (load_feature_network(config_name, weights) if network is None else network).to(device)
        self._widths: dict[str, int] = {}
        self._size: tuple[int, ...] | None = None
        super().__init__(config_name=config_name, **options)

    def _features(self) -> dict[str, Any]:
        # Bytes: `evaluate` would give lists of floats back as Python numbers, 2048 and more an image.
        names = [*self.sides, *(f"{side}_digest" for side in self.sides)]
        return dict.fromkeys(names, datasets.Value("binary"))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Adds images of one size: uint8 (B, H, W, 3), or floats (B, 3, H, W) in [-1, 1]."""
        if others or (references is not None) != ("references" in self.sides):
            names = [name for name, value in {"references": references, **others}.items() if value is not None]
            raise ValueError(
                f"This metric takes {' and '.join(self.sides)}; got {', '.join(['predictions', *names])}."
            )
        given = {"predictions": predictions, "references": references}
        batch = {side: as_images_uint8(given[side], side) for side in self.sides}
        if len({each.shape for each in batch.values()}) > 1:
            shapes = " and ".join(str(each.shape) for each in batch.values())
            raise ValueError(f"Each reconstruction needs its own image, equally large; got {shapes}.")
        self._size = require_one_size(batch["predictions"], self._size)
        self._image_size = size_of(batch["predictions"])
        columns = {side: self._rows(each) for side, each in batch.items()}
        columns |= {f"{side}_digest": [row.tobytes() for row in image_digests(batch[side]).numpy()] for side in batch}
        super().add_batch(**columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Adds one image, uint8 (H, W, 3) or floats (3, H, W): a batch of one, which is slower than larger ones."""
        sides = {"predictions": prediction, "references": reference, **others}
        self.add_batch(**{name: value[None] if hasattr(value, "ndim") else value for name, value in sides.items()})

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any] | None:
        """The numbers of all images since the last call, with those given here; None on other processes than 0."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            raise ValueError("At least one image is needed; call add_batch first.")
        self._size = None
        return super().compute(**options)

    def _rows(self, images_uint8: np.ndarray) -> list[bytes]:
        """Everything the network gives of an image, side by side in float32: B rows of bytes."""
        outputs = self.network(to_tensor(images_uint8))
        self._widths = {name: value.shape[1] for name, value in outputs.items()}
        return [row.tobytes() for row in torch.cat([value.cpu() for value in outputs.values()], dim=1).numpy()]

    def _read(self, rows: list[bytes], digests: list[bytes]) -> Features:
        values = _table(rows, torch.float32).split(list(self._widths.values()), dim=1)
        return Features(dict(zip(self._widths, values, strict=True)), _table(digests, torch.uint8), self._image_size)

    def _result(self, measured: Measurement, count: int) -> dict[str, Any]:
        parts = measured.card_parts()
        network = {"feature_network": self.network.name, "feature_network_weights": self.network.weights_hash}
        return {**parts["metrics"], "num_samples": count, **network, "caveats": parts["caveats"]}


class RFID(_FeatureModule):
    """Fréchet distance of an autoencoder's reconstructions to the images they are of (rFID).

    `rfid` and `rsfid` with FID's Inception, `rfd_NAME` with another network; 0 = equal in mean and covariance. Options
    of `load`: the network's name, `weights` (its file; dinov2: directory or Hub name) or `network` (one of your own,
    `metrics.feature_networks.ModuleFeatures`), `device`.

    Args:
        predictions: reconstructions, uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1].
        references: the images, likewise, of the same sizes.

    Returns:
        The distances; num_samples, feature_network, feature_network_weights: what they were measured with; caveats:
        reason by name, for numbers not to be trusted (no more images than feature dimensions, repeated ones).

    Example:
        >>> rfid = evaluate.load(module_path("rfid"), "inception", weights="weights-inception-2015-12-05-6726825d.pth")
    """

    sides = ("predictions", "references")

    def _compute(
        self, predictions: list, references: list, predictions_digest: list, references_digest: list
    ) -> dict[str, Any]:
        reconstructions = self._read(predictions, predictions_digest)
        images = self._read(references, references_digest)
        return self._result(evaluate_reconstruction(reconstructions, images, self.network), len(images))


class GFID(_FeatureModule):
    """FID, sFID, Inception score, KID, precision and recall of generated images against a reference.

    Options of `load`: those of `RFID`; `reference`: what `metrics.generation.load_reference` takes (an ADM .npz, saved
    statistics, a folder); `resolution`: side in pixels that a folder's images are cropped to.

    Args:
        predictions: samples, uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1].

    Returns:
        fid, sfid, inception_score, precision, recall, kid, as far as the network and the reference give them, under
        names that say which network it was unless it is FID's Inception; num_samples, feature_network,
        feature_network_weights, reference, reference_hash: what they were measured with; caveats as in `RFID`.

    Example:
        >>> gfid = evaluate.load(module_path("gfid"), "inception", weights=FILE, reference="reference.npz")
    """

    def __init__(
        self, config_name: str | None = None, *, reference: Any, resolution: int | None = None, **options: Any
    ) -> None:
        super().__init__(config_name, **options)
        self.reference = load_reference(reference, self.network, resolution=resolution)

    def _compute(self, predictions: list, predictions_digest: list) -> dict[str, Any]:
        samples = self._read(predictions, predictions_digest)
        reference = {"reference": self.reference.name, "reference_hash": self.reference.hash}
        return {**self._result(evaluate_generation(samples, self.reference, self.network), len(samples)), **reference}


def as_images_uint8(images: Any, name: str) -> np.ndarray:
    """uint8 (B, H, W, 3) of a batch that may also be floats (B, 3, H, W), nominally in [-1, 1]; arrays or tensors.

    Example:
        >>> as_images_uint8(torch.zeros(1, 3, 2, 2), "predictions")[0, 0, 0]
        array([128, 128, 128], dtype=uint8)
    """
    batch = images.detach() if isinstance(images, Tensor) else torch.from_numpy(np.asarray(images))
    if batch.is_floating_point() and batch.ndim == 4 and batch.shape[1] == 3:
        if len(batch) and batch.abs().max() > LARGEST_PIXEL:
            raise ValueError(
                f"Float {name} must lie in [-1, 1]; got floats up to {batch.abs().max().item():.4g}. Give 0 .. 255 as "
                f"uint8 ({UINT8_RULE})."
            )
        return to_uint8(batch).permute(0, 2, 3, 1).cpu().numpy()
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(
            f"{name} must be uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1]; got {batch.dtype} "
            f"{tuple(batch.shape)}."
        )
    return batch.cpu().numpy()


def _table(rows: list[bytes], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=dtype).view(len(rows), -1)
