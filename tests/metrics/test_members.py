"""What holds for every metric, whatever it measures; a new file in metrics/members/ is tested here without a line."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch

from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.metrics.autoencoder import OFFERS as RECONSTRUCTION_OFFERS
from diffusers_eqvae.metrics.autoencoder import reconstruction_batches
from diffusers_eqvae.metrics.base import METRICS, Metric, build_metrics, measure
from diffusers_eqvae.metrics.generation import OFFERS as GENERATION_OFFERS
from diffusers_eqvae.metrics.image_sets import ImageSet
from diffusers_eqvae.metrics.references import load_reference

from .test_generation import TinyInception

COUNT, SIDE = 24, 32
MEMBERS = list(METRICS)


class Set:
    """Images with classes and masks, what a small autoencoder and network make of them, and a reference."""

    def __init__(self, vae) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vae, self.network = vae, TinyInception()
        self.images = torch.randint(0, 256, (COUNT, SIDE, SIDE, 3), generator=generator).byte().numpy()
        self.masks = torch.randint(0, 3, (COUNT, SIDE, SIDE), generator=generator)
        self.reference = load_reference(ImageSet(self.images[::-1][:20].copy(), name="reference"), self.network)

    def batches(self, size: int) -> list:
        cut = [(range(k, min(k + size, COUNT)), self.images[k : k + size]) for k in range(0, COUNT, size)]
        labels = (torch.arange(COUNT) % 6 == 0).long().numpy()  # 20 and 4: one class has a covariance
        given = {"networks": [self.network], "labels": labels, "masks": lambda index: self.masks[list(index)]}
        return list(reconstruction_batches(self.vae, cut, **given))

    def saw(self, name: str, batches: Sequence) -> Metric:
        offers = RECONSTRUCTION_OFFERS | GENERATION_OFFERS
        (metric,) = build_metrics([name], offers=offers, network=self.network, reference=self.reference)
        measure([metric], batches)
        return metric


@pytest.fixture
def given(tiny_autoencoder_kl, monkeypatch) -> Set:
    perceptual = LPIPS.random("squeeze")  # the one network that a metric reads from files itself
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda *_, **__: perceptual)
    return Set(tiny_autoencoder_kl)


def told(metric: Metric) -> str:
    """All that a card says of it; as text, in which NaN equals NaN."""
    return str((metric.compute(), metric.details(), metric.protocol()))


@pytest.mark.parametrize("name", MEMBERS)
def test_no_bit_depends_on_the_order_or_the_processes(name, given):
    """Processes that saw the batches out of order, and one that saw none, merged through a pickle."""
    batches = given.batches(4)
    alone = given.saw(name, batches)
    merged = given.saw(name, [batches[k] for k in (5, 3)])
    for which in ([], [4, 1, 0], [2]):
        merged.merge(pickle.loads(pickle.dumps(given.saw(name, [batches[k] for k in which]))))
    assert told(merged) == told(alone)
    assert alone.compute(), "what gives no figure of these images is not tested here"
    assert told(given.saw(name, batches[:-1])) != told(alone)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_batch_size_moves_last_digits_alone(name, given):
    one, other = (given.saw(name, given.batches(size)).compute() for size in (24, 7))
    assert set(one) == set(other)
    for key in one:
        assert one[key].value == pytest.approx(other[key].value, rel=1e-3, abs=1e-5, nan_ok=True), key
        assert (one[key].n, one[key].unit, one[key].better) == (other[key].n, other[key].unit, other[key].better)


@pytest.mark.parametrize("name", MEMBERS)
def test_what_reaches_another_process_holds_no_network(name, given):
    """A network would cost its size for every process; 24 images and their features are far smaller."""
    batches, rows = given.batches(24), METRICS[name].__getstate__
    state = given.saw(name, batches).__getstate__()
    assert not any(isinstance(value, torch.nn.Module) for value in state.values()), rows


@pytest.mark.parametrize("name", MEMBERS)
def test_keys_of_a_protocol_of_its_own_say_which_figures_they_concern(name, given):
    """METRIC.KEY forbids to compare cards in figures whose names begin like METRIC, and no others."""
    metric = given.saw(name, given.batches(24))
    own = {key.split(".")[0] for key in metric.protocol() if "." in key}
    assert all(any(figure.startswith(key) for figure in metric.compute()) for key in own), own
