"""gFID and its companions, of generated images against a reference, as a metric module of `evaluate`."""

# evaluate reads the imports of a metric module line by line: one module to a line.
import evaluate

from diffusers_eqvae.metrics import generation
from diffusers_eqvae.metrics.evaluate_modules import distances

_DESCRIPTION = """
FID, sFID, Inception score, KID, precision and recall of generated images against a reference, which is given once:
evaluate.load(module_path("gfid"), "inception", weights="weights-inception-2015-12-05-6726825d.pth",
reference="VIRTUAL_imagenet256_labeled.npz").
"""
_INPUTS = """
Args:
    predictions: samples, uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1].
Returns:
    fid, sfid, inception_score, precision, recall, kid: as far as the network and the reference give them, under names
        that say which network it was unless it is FID's Inception.
    num_samples, evaluator, weights_hash, reference, reference_hash: what they were measured with.
    marks: reason by name, for numbers not to be trusted (no more images than feature dimensions, repeated ones).
"""
_CITATION = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017"


class GFID(distances.DistanceMetric):
    """See `_DESCRIPTION` and `_INPUTS`.

    Args:
        reference: what `metrics.generation.load_reference` takes: an ADM .npz, saved statistics, a folder.
        resolution: side in pixels that a folder's images are cropped to.
        options: of `distances.DistanceMetric`.
    """

    def __init__(self, config_name=None, *, reference, resolution=None, **options) -> None:
        super().__init__(config_name, **options)
        self.reference = generation.load_reference(reference, self.extractor, resolution=resolution)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=self._features(),
        )

    def _compute(self, predictions, predictions_digest) -> dict:
        samples = self._collected(predictions, predictions_digest)
        result = generation.evaluate_generation(samples, self.reference, extractor=self.extractor)
        reference = {"reference": self.reference.name, "reference_hash": self.reference.hash}
        return {**self._result(result, len(samples.digests)), **reference}
