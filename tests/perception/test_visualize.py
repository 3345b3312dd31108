"""The image of perception: what it decodes in, which depths are black, and the page that shows how it is called."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from diffusers_eqvae import (
    AlignmentNetwork,
    ClassConditionalPipeline,
    FlowMatchODEScheduler,
    SiTTransformer2DModel,
)
from diffusers_eqvae.perception import LinearDepthHead, perception_image


def cell(image, column: int, side: int = 16) -> np.ndarray:
    """The image in a column of the first row, without its caption."""
    left = column * (side + 4)
    return np.asarray(image.crop((left, 16, left + side, 16 + side)))


def test_a_float16_autoencoder_that_overflows_is_decoded_in_float32(tiny_autoencoder_kl):
    latents = torch.randn(1, 4, 4, 4)
    tiny_autoencoder_kl.decoder.conv_in.weight.data.mul_(60000)  # beyond float16 after the first convolution
    tiny_autoencoder_kl.to(torch.float16)
    drawn = cell(perception_image(tiny_autoencoder_kl, latents, num_clusters=2), 0)
    assert tiny_autoencoder_kl.dtype == torch.float16
    in_float32 = cell(perception_image(tiny_autoencoder_kl.float(), latents, num_clusters=2), 0)
    assert np.array_equal(drawn, in_float32) and in_float32.std() > 0


def test_depth_is_drawn_between_the_nearest_and_the_farthest_there_are(tiny_autoencoder_kl):
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
    for max_depth in (1.0, 80.0):
        head = LinearDepthHead(6, max_depth=max_depth)
        head.conv_depth.weight.normal_(std=100)
        drawn = perception_image(
            tiny_autoencoder_kl, torch.randn(2, 4, 4, 4), alignment_network=network, depth_head=head, num_clusters=2
        )
        levels = np.concatenate([np.asarray(drawn.crop((60, top, 76, top + 16))) for top in (16, 36)])
        assert (levels.min(), levels.max()) == (0, 255)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_page_shows_what_runs(repository, tmp_path, monkeypatch, tiny_autoencoder_kl, aligned):
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6) if aligned else None
    transformer = SiTTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=361
    )
    pipe = ClassConditionalPipeline(
        transformer, tiny_autoencoder_kl, FlowMatchODEScheduler(), alignment_network=network
    )
    pipe.save_pretrained(tmp_path / "runs" / "sit")
    monkeypatch.chdir(tmp_path)
    page = (repository / "docs" / "perception.md").read_text()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    assert (tmp_path / "perception.png").is_file() and (names["pipe"].alignment_network is not None) == aligned
