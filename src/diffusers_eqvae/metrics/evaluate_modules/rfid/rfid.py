"""rFID, the Fréchet distance of reconstructions to their images, as a metric module of Hugging Face `evaluate`."""

# evaluate reads the imports of a metric module line by line: one module to a line.
import evaluate

from diffusers_eqvae.metrics import generation
from diffusers_eqvae.metrics.evaluate_modules import distances

_DESCRIPTION = """
Fréchet distance of an autoencoder's reconstructions to the images they are of (rFID). Load it with the network's
name and weights: evaluate.load(module_path("rfid"), "inception", weights="weights-inception-2015-12-05-6726825d.pth").
"""
_INPUTS = """
Args:
    predictions: reconstructions, uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1].
    references: the images, likewise, of the same sizes.
Returns:
    rfid, rsfid: with FID's Inception; rfd_NAME with another network. 0 = equal in mean and covariance.
    num_samples, evaluator, weights_hash: what they were measured with.
    marks: reason by name, for numbers not to be trusted (no more images than feature dimensions, repeated ones).
"""
_CITATION = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017"


class RFID(distances.DistanceMetric):
    """See `_DESCRIPTION` and `_INPUTS`."""

    SIDES = ("predictions", "references")

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=self._features(),
        )

    def _compute(self, predictions, references, predictions_digest, references_digest) -> dict:
        reconstructions = self._collected(predictions, predictions_digest)
        images = self._collected(references, references_digest)
        result = generation.evaluate_reconstruction(reconstructions, images, extractor=self.extractor)
        return self._result(result, len(images.digests))
