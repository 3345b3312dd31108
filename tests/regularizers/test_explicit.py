"""The explicit penalty: its value by hand, which side moves, and the guard that ends a collapse."""

from __future__ import annotations

import logging

import pytest
import torch

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.equivariance import Tau
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.explicit import ExplicitArguments, ExplicitRegularizer


class Linear(torch.nn.Module):
    """An encoder of stride 1 that adds a ramp, which no rotation leaves in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.ramp = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixels: torch.Tensor) -> Posterior:
        ramp = torch.arange(float(pixels.shape[-1]))
        return Posterior(self.gain * pixels + self.ramp * ramp)


def penalty(regularizer, encoder, pixels, tau):
    posterior = encoder(pixels)
    state = AutoencoderState(posterior, posterior.mean, pixels, encoder, None)
    return regularizer.penalty(state, {}, (tuple(pixels.shape[-2:]), tau))


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_its_value_and_gradient_by_hand(stop_gradient):
    encoder, pixels = Linear(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        encoder.ramp.fill_(0.5)
    regularizer = ExplicitRegularizer(1, stop_gradient=stop_gradient)
    loss = penalty(regularizer, encoder, pixels, Tau((4, 4), quarter_turns=1))
    # tau(E(x)) - E(tau(x)) is the turned ramp less the ramp: the pixels cancel.
    ramp = torch.arange(4.0).expand(4, 4)
    difference = torch.rot90(ramp, 1) - ramp
    assert loss.item() == pytest.approx(0.25 * float(difference.square().mean()))
    loss.backward()
    # d/d ramp of mean (r (turned - ramp))^2, or of mean (constant - r ramp)^2 where the turned side is fixed.
    side = -ramp if stop_gradient else difference
    expected = 2 * 0.5 * float((difference * side).mean())
    assert encoder.ramp.grad.item() == pytest.approx(expected)


def test_an_equivariant_encoder_has_none():
    loss = penalty(ExplicitRegularizer(1), Linear(), torch.randn(2, 3, 8, 8), Tau((3, 5), quarter_turns=1))
    assert loss.item() == pytest.approx(0.0, abs=1e-10)


def test_steps_that_are_smaller_go_without():
    encoder, pixels = Linear(), torch.randn(2, 3, 4, 4)
    state = AutoencoderState(encoder(pixels), pixels, pixels, encoder, None)
    assert ExplicitRegularizer(1).penalty(state, {}, ((8, 8), Tau((4, 4)))) is None


def test_collapsed_latents_end_the_run_and_name_the_remedy():
    encoder, pixels, tau = Linear(), torch.randn(2, 3, 4, 4), Tau((4, 4), quarter_turns=1)
    regularizer = ExplicitRegularizer(1, smallest_std=0.1)
    penalty(regularizer, encoder, pixels, tau)
    assert float(regularizer.first_std) == pytest.approx(pixels.std((0, 2, 3), correction=0).mean().item())
    with torch.no_grad():
        encoder.gain.fill_(0.2)
    penalty(regularizer, encoder, pixels, tau)
    penalty(regularizer, encoder, pixels, tau)
    with torch.no_grad():
        encoder.gain.fill_(0.05)
    penalty(regularizer, encoder, pixels, tau)
    said = r"have collapsed: their standard deviation is 5\.0% of what it was.*Lower explicit_weight.*equivariance"
    with pytest.raises(ValueError, match=said):
        penalty(regularizer, encoder, pixels, tau)
    # A resumed run compares with the first step of all, not with its own.
    resumed = ExplicitRegularizer(1, smallest_std=0.1)
    resumed.load_state_dict(regularizer.state_dict())
    penalty(resumed, encoder, pixels, tau)
    with pytest.raises(ValueError, match="have collapsed"):
        penalty(resumed, encoder, pixels, tau)


def test_a_user_is_warned(caplog, tiny_autoencoder_kl):
    with caplog.at_level(logging.WARNING):
        ExplicitRegularizer.from_arguments(ExplicitArguments(), tiny_autoencoder_kl)
    assert "known to collapse latents" in caplog.text and "equivariance is the method that does not" in caplog.text
