"""What holds for every metric: figures by name, chosen by name, refused where the data lack what it needs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffusers_eqvae.metrics import members
from diffusers_eqvae.metrics.autoencoder import OFFERS as RECONSTRUCTION_OFFERS
from diffusers_eqvae.metrics.autoencoder import RECONSTRUCTION_METRICS
from diffusers_eqvae.metrics.base import METRICS, Figure, PerImageMetric, build_metrics, measure
from diffusers_eqvae.metrics.generation import GENERATION_METRICS
from diffusers_eqvae.metrics.generation import OFFERS as GENERATION_OFFERS


class Brightness(PerImageMetric):
    needs = frozenset({"images"})
    unit, better = "sigma", "higher"

    def rows(self, batch):
        return {"brightness": batch["images"].mean((1, 2, 3))}


def batches(values: list[float], *, start: int = 0) -> list:
    pixels = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return [(range(start, start + len(values)), {"images": pixels})]


def test_a_figure_is_the_mean_of_all_images_with_its_standard_error():
    measured = measure([Brightness()], [*batches([1.0, 2.0]), *batches([6.0], start=2)])
    error = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)
    assert measured.figures == {"brightness": Figure(3.0, pytest.approx(error), 3, "sigma", "higher")}
    assert measure([Brightness()], batches([4.0])).figures["brightness"].error is None
    with pytest.raises(ValueError, match="Brightness needs at least one image"):
        measure([Brightness()], []).values()


def test_images_are_put_in_the_order_of_their_places():
    metric = Brightness()
    measure([metric], [*batches([5.0, 6.0], start=2), *batches([3.0, 4.0])])
    assert metric.joined()["brightness"].tolist() == [3.0, 4.0, 5.0, 6.0]


def test_processes_take_in_what_the_others_saw(monkeypatch):
    """Each of two ranks ends with all images, its own counted once."""
    theirs = [Brightness()]
    measure(theirs, batches([5.0], start=1))

    class Second:
        process_index, num_processes = 1, 2

    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [theirs, *mine])
    figure = measure([Brightness()], batches([1.0]), Second).figures["brightness"]
    assert (figure.value, figure.n) == (3.0, 2)


@pytest.mark.parametrize(
    ("names", "offers"), [(RECONSTRUCTION_METRICS, RECONSTRUCTION_OFFERS), (GENERATION_METRICS, GENERATION_OFFERS)]
)
def test_the_default_metrics_have_what_they_need(names, offers):
    for name in names:
        assert METRICS[name].needs <= offers, name
        assert METRICS.name_of(METRICS[name]) == name


def test_each_file_of_the_folder_is_a_default_metric():
    """Or dear, and asked for by name."""
    files = {path.stem for path in Path(members.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {*RECONSTRUCTION_METRICS, *GENERATION_METRICS, "transformed_rfid", "ifid", "mind"}


def test_a_metric_that_lacks_its_data_is_refused_by_name():
    with pytest.raises(ValueError, match="'psnr' needs reconstructions; what is measured here gives features, images"):
        build_metrics(["psnr"], offers=GENERATION_OFFERS)
    with pytest.raises(ValueError, match=r"There is no metric 'blur'; there are .*psnr"):
        build_metrics(["blur"], offers=GENERATION_OFFERS)
    with pytest.raises(ValueError, match="FID needs a feature network and a reference"):
        build_metrics(["fid"], offers=GENERATION_OFFERS)
    with pytest.raises(ValueError, match="RFID needs a feature network"):
        build_metrics(["rfid"], offers=RECONSTRUCTION_OFFERS)


def test_one_name_stands_for_one_figure():
    assert len(build_metrics(["psnr", "psnr"], offers=RECONSTRUCTION_OFFERS)) == 1
    with pytest.raises(ValueError, match="Two of the metrics compute 'brightness'"):
        measure([Brightness(), Brightness()], batches([1.0])).values()


def test_a_caveat_of_a_number_is_warned_about(caplog):
    class Doubtful(Brightness):
        def compute(self):
            return {"a": Figure(2.0, caveat="too few"), "b": Figure(math.nan, caveat="undefined"), "c": Figure(1.0)}

    parts = measure([Doubtful()], batches([1.0])).card_parts()
    assert parts == {
        "metrics": {"a": 2.0, "c": 1.0},
        "errors": {},
        "caveats": {"a": "too few", "b": "undefined"},
        "better": {},
    }
    assert [record.getMessage() for record in caplog.records] == ["a = 2 is not comparable: too few."]
