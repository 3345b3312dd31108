from __future__ import annotations

from dataclasses import replace

from ...autoencoders import decode, downsampling_factor
from ...equivariance import ROTATIONS, SCALES, scaling
from ...images import UINT8_RULE, to_uint8
from ..base import Figure, register_metric
from ..distances import frechet_distance
from ..errors import jackknife_error, without_each
from ..generation import FeatureMetric, feature_statistics, join_caveats, network_protocol, too_few


@register_metric("transformed_rfid")
class TransformedRFID(FeatureMetric):
    """`rfid_at_0.25`, `_0.5`, `_0.75`: Fréchet distances of D(tau(E(x))) to tau(x) (EQ-VAE, figure 3).

    tau scales both sides by that much and turns by 90, 180 or 270 degrees; a figure is the mean of the three
    distances, its error a delete-d jackknife over images. Of another network than FID's Inception they are called
    `rfd_NAME_at_...`. Nine decodings and eighteen forwards of the network an image, so not among the defaults.
    """

    needs = frozenset({"images", "posteriors", "autoencoder", "features"})
    what = "images"

    def rows(self, batch):
        vae, pixels, raw_latents = batch["autoencoder"], batch["images"], batch["posteriors"].mode()
        rows = {"digests": batch["digests"]}
        for scale in SCALES:
            for turns in ROTATIONS:
                tau = replace(scaling((raw_latents.shape[-2], raw_latents.shape[-1]), scale), quarter_turns=turns)
                images = tau.apply_to_pixels(pixels, downsampling_factor(vae))
                for side, values in (("x", images), ("d", decode(vae, tau.apply_to_latents(raw_latents)))):
                    rows[f"{side}{scale}_{turns}"] = self.network(to_uint8(values))["features"]
        return rows

    def compute(self):
        rows = self.joined()
        return {f"r{self.network.metric_name('fid')}_at_{scale}": self._figure(rows, scale) for scale in SCALES}

    def _figure(self, rows, scale):
        pairs = [(rows[f"d{scale}_{turns}"], rows[f"x{scale}_{turns}"]) for turns in ROTATIONS]

        def mean(statistics):
            each = [frechet_distance(d.mean, d.covariance, x.mean, x.covariance) for d, x in statistics]
            return sum(each) / len(each)

        whole = [(feature_statistics(decoded), feature_statistics(images)) for decoded, images in pairs]
        without = [zip(without_each(decoded), without_each(images), strict=True) for decoded, images in pairs]
        error = jackknife_error([mean(statistics) for statistics in zip(*without, strict=True)])
        few = too_few(whole[0][0].dimension, {"samples": whole[0][0].count})
        caveat = join_caveats(few, self.repeated(rows))
        return Figure(mean(whole), error, len(rows["digests"]), better="lower", caveat=caveat)

    def protocol(self):
        return {**network_protocol(self.network), "uint8_rule": UINT8_RULE}
