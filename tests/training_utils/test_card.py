"""What a trained model's card says of how it was made."""

from __future__ import annotations

import sys

import pytest

from diffusers_eqvae.training_utils.card import how_it_was_made


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["eqvae train-autoencoder", "--note", "two words"], "eqvae train-autoencoder --note 'two words'"),
        (["a folder/train_autoencoder.py", "--seed", "1"], "'a folder/train_autoencoder.py' --seed 1"),
    ],
)
def test_the_command_is_what_a_shell_takes(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert how_it_was_made()["command"] == command
