"""Loading an autoencoder by name: on its own, inside a pipeline, or not one at all."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from diffusers_eqvae.autoencoders import (
    autoencoder_location,
    decode,
    downsampling_factor,
    encode,
    evaluating,
    is_deterministic,
    load_autoencoder,
    require_fitting,
)
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel


def test_a_pipeline_is_searched_in_vae(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert autoencoder_location(str(tmp_path)) == {"subfolder": "vae"}
    assert autoencoder_location(str(tmp_path), subfolder="other", revision="v1") == {
        "subfolder": "other",
        "revision": "v1",
    }
    for name in (tmp_path, tmp_path / "vae"):
        loaded = load_autoencoder(str(name))
        assert not loaded.training
        assert torch.equal(loaded.encoder.conv_in.weight, tiny_autoencoder_kl.encoder.conv_in.weight)


def test_another_model_is_refused(tmp_path):
    model = SiTTransformer2DModel(sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a SiTTransformer2DModel, not an autoencoder"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        load_autoencoder(str(tmp_path / "nowhere"))


def test_a_directory_without_an_autoencoder_says_what_is_missing(tmp_path, tiny_autoencoder_kl):
    with pytest.raises(OSError, match=r"There is no directory .*nowhere"):
        load_autoencoder(str(tmp_path / "nowhere"))
    tiny_autoencoder_kl.save_pretrained(tmp_path / "store" / "vae")
    with pytest.raises(OSError, match=r"does not hold an autoencoder: .*config\.json\. Did you mean .*vae\?"):
        load_autoencoder(str(tmp_path / "store"))


def test_entries_that_are_read_are_not_called_ignored(tmp_path, tiny_autoencoder_tiny, caplog):
    LatentNormalization(mean=(0.5,) * 4, std=(2.0,) * 4).apply_to(tiny_autoencoder_tiny)
    tiny_autoencoder_tiny.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        loaded = load_autoencoder(str(tmp_path))
        assert "latents_mean" not in caplog.text
        type(loaded).from_pretrained(tmp_path)
        assert "latents_mean" in caplog.text  # diffusers still says so: the filter has a reason, and is gone
    finally:
        logger.removeHandler(caplog.handler)
    assert LatentNormalization.from_vae(loaded).mean == (0.5,) * 4


def test_a_deep_compression_autoencoder_is_one_like_others(tmp_path):
    """Its encoder gives `latent` where AutoencoderTiny's gives `latents`."""
    widths, one_each, none_each = (8, 16, 16), (1, 1, 1), ((), (), ())
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=one_each,
        decoder_layers_per_block=one_each,
        encoder_qkv_multiscales=none_each,
        decoder_qkv_multiscales=none_each,
        scaling_factor=0.5,
    ).save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    assert downsampling_factor(vae) == 4 and is_deterministic(vae)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = encode(vae, pixels)
        assert posterior.logvar is None and posterior.mean.shape == (2, 4, 4, 6) and posterior.mean.std() > 0
        decoded, expected = decode(vae, posterior.sample()), vae(pixels).sample
    assert decoded.shape == pixels.shape and torch.equal(decoded, expected)
    assert LatentNormalization.from_vae(vae).scaling_factor == 0.5


def test_an_encoder_that_gives_no_latents_is_named(tiny_autoencoder_kl, monkeypatch):
    monkeypatch.setattr(tiny_autoencoder_kl, "encode", lambda pixels: SimpleNamespace(codes=pixels))
    with pytest.raises(ValueError, match="AutoencoderKL gives SimpleNamespace with codes"):
        encode(tiny_autoencoder_kl, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_mode_as_it_was(tiny_autoencoder_kl, training):
    tiny_autoencoder_kl.train(training)
    with pytest.raises(KeyboardInterrupt), evaluating(tiny_autoencoder_kl):
        assert not tiny_autoencoder_kl.training and not tiny_autoencoder_kl.encoder.training
        raise KeyboardInterrupt
    assert tiny_autoencoder_kl.training == tiny_autoencoder_kl.encoder.training == training


def test_a_size_fits_where_the_stride_divides_it(tiny_autoencoder_kl):
    require_fitting(16, tiny_autoencoder_kl)
    require_fitting(16, tiny_autoencoder_kl, smallest=16)
    for size in (18, 0, -4, 2):
        with pytest.raises(ValueError, match=f"resolution must be a multiple of .* stride 4; got {size}"):
            require_fitting(size, tiny_autoencoder_kl)
    with pytest.raises(ValueError, match="stride 4 and at least 16; got 12"):
        require_fitting(12, tiny_autoencoder_kl, smallest=16)
    with pytest.raises(ValueError, match=r"The width of images must be a multiple of .* stride 4; got 18"):
        encode(tiny_autoencoder_kl, torch.zeros(1, 3, 16, 18))


def test_one_out_of_a_pipeline_and_one_alone_load_one_after_the_other(tmp_path, tiny_autoencoder_kl):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]})
    )
    tiny_autoencoder_kl.save_pretrained(tmp_path / "pipeline" / "vae")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "alone")
    for name in ("pipeline", "alone", "pipeline"):
        loaded = load_autoencoder(str(tmp_path / name))
        assert all(map(torch.equal, loaded.parameters(), tiny_autoencoder_kl.parameters()))


def test_the_kl_compiles_whatever_the_strides_of_the_moments():
    """A traced encoder may give moments in another memory order than the trace says."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    pixels = torch.randn(4, 3, 16, 16)
    compiled = torch.compile(lambda pixels: encode(vae, pixels).kl(), backend="aot_eager")
    torch.testing.assert_close(compiled(pixels), encode(vae, pixels).kl())
