from __future__ import annotations

from ..base import Figure, register_metric
from ..distances import frechet_distance
from ..errors import jackknife_error, without_each
from ..generation import SampleMetric, feature_statistics, join_caveats, too_few


@register_metric("fid")
class FID(SampleMetric):
    """`fid` and, where the network has spatial features, `sfid`: Fréchet distances of samples to the reference.

    Their errors are the samples', with the reference held fixed. With fewer images than feature dimensions the
    distance is dominated by their number: it is computed, and has a caveat. Of another network than FID's Inception
    they are called `fd_NAME` and `sfd_NAME`.
    """

    outputs = ("features", "spatial")

    def compute(self):
        rows, reference = self.joined(), self.reference
        pairs = {"fid": ("features", reference.mean, reference.covariance)}
        if "spatial" in rows and reference.spatial_mean is not None:
            pairs["sfid"] = ("spatial", reference.spatial_mean, reference.spatial_covariance)
        figures = {}
        for name, (output, mean, covariance) in pairs.items():
            own = feature_statistics(rows[output])
            caveat = too_few(own.dimension, {"samples": own.count, "reference images": reference.count})
            figures[self.network.metric_name(name)] = Figure(
                frechet_distance(own.mean, own.covariance, mean, covariance),
                jackknife_error(
                    [
                        frechet_distance(each.mean, each.covariance, mean, covariance)
                        for each in without_each(rows[output])
                    ]
                ),
                own.count,
                better="lower",
                caveat=join_caveats(reference.doubt, caveat, self.repeated(rows)),
            )
        return figures
