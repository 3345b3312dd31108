"""The alignment network: what it computes, which teacher it belongs to, and where it is found again."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderArguments
from diffusers_eqvae.training_utils.autoencoder.build import build_autoencoder

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}


def teacher(seed: int = 0, *, image_size: int = 28) -> FeatureTeacher:
    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(**SMALL))
    model.layernorm.weight.data.normal_()
    model.layernorm.bias.data.normal_()
    return FeatureTeacher(model, image_size=image_size, final_norm=False)


@pytest.fixture
def network() -> AlignmentNetwork:
    return AlignmentNetwork.for_teacher(teacher(), latent_channels=4, hidden_size=16)


def test_network_treats_every_position_alike_and_pools_the_global_feature():
    network = AlignmentNetwork(latent_channels=4, hidden_size=16, feature_size=6)
    latents = torch.randn(2, 4, 3, 5)
    output = network(latents)
    assert output.patch.shape == (2, 6, 3, 5) and output.cls.shape == (2, 6)
    rotated = network(latents.rot90(1, (-2, -1)))
    torch.testing.assert_close(rotated.patch, output.patch.rot90(1, (-2, -1)))
    torch.testing.assert_close(rotated.cls, output.cls)
    torch.testing.assert_close(network(latents[:, :, 1:2, 2:3]).patch, output.patch[:, :, 1:2, 2:3])


def test_network_without_a_global_feature():
    network = AlignmentNetwork(latent_channels=16, hidden_size=8, feature_size=6, global_feature=False)
    output = network(torch.zeros(1, 16, 2, 2))
    assert output.cls is None and network.normalize(output).cls is None


def test_network_has_two_hidden_layers_of_2048_by_default():
    with torch.device("meta"):
        network = AlignmentNetwork()
    expected = 4 * 2048 + 2048 + 2048 * 2048 + 2048 + 2 * (2048 * 1024 + 1024)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_normalised_features_are_those_after_the_teachers_last_norm(network):
    """Of the teacher's own features: the norm is a copy, and needs no teacher once it is saved."""
    own = teacher()
    with torch.no_grad():
        patch, cls = own(torch.rand(2, 3, 28, 28))
        after = FeatureTeacher(own.model, image_size=28, final_norm=True)(torch.rand(2, 3, 28, 28))
        output = type(network(torch.zeros(1, 4, 1, 1)))(patch, cls)
        expected = own.model.layernorm(patch.movedim(1, -1)).movedim(-1, 1), own.model.layernorm(cls)
    normalized = network.normalize(output)
    torch.testing.assert_close(normalized.patch, expected[0])
    torch.testing.assert_close(normalized.cls, expected[1])
    assert network.bfloat16().normalize(output).patch.dtype == torch.float32
    assert after[0].shape == patch.shape


def test_config_says_whose_features_they_are(network, tmp_path):
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"teacher_type": "dinov2", "teacher_layers": [2], "teacher_image_size": 28, "feature_size": 8}
    assert {key: config[key] for key in expected} == expected
    assert len(config["teacher_hash"]) == 16
    loaded = AlignmentNetwork.from_pretrained(tmp_path)
    raw_latents = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(loaded.normalize(loaded(raw_latents)), network.normalize(network(raw_latents)))
    loaded.check_teacher(teacher())


@pytest.mark.parametrize(
    ("other", "message"),
    [(lambda: teacher(1), "teacher_hash="), (lambda: teacher(image_size=56), "teacher_image_size=28 .*=56")],
)
def test_another_teacher_is_refused(network, other, message):
    with pytest.raises(ValueError, match=message):
        network.check_teacher(other())
    with pytest.raises(ValueError, match=r"with feature_size=6 .* has feature_size=8"):
        AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6).check_teacher(teacher())


def same(one: AlignmentNetwork | None, other: AlignmentNetwork) -> bool:
    return one is not None and all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_network_is_found_itself_beside_an_autoencoder_and_in_a_pipeline(network, tmp_path, tiny_autoencoder_kl):
    vae = AutoencoderKLEQ.from_config(tiny_autoencoder_kl.config)
    assert AlignmentNetwork.beside(vae) is None  # not loaded from anywhere
    vae.save_pretrained(tmp_path / "run")
    assert AlignmentNetwork.find(tmp_path / "run") is None
    assert AlignmentNetwork.beside(AutoencoderKLEQ.from_pretrained(tmp_path / "run")) is None
    network.save_pretrained(tmp_path / "run" / "alignment_network")
    (tmp_path / "pipeline").mkdir()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    network.save_pretrained(tmp_path / "pipeline" / "alignment_network")
    for name in ("run", "run/alignment_network", "pipeline"):
        assert same(AlignmentNetwork.find(tmp_path / name), network), name
    assert same(AlignmentNetwork.find(tmp_path, subfolder="run"), network)
    assert same(AlignmentNetwork.find(tmp_path / "pipeline", subfolder="vae"), network)
    trained = build_autoencoder(AutoencoderArguments(pretrained_model_name_or_path=str(tmp_path), subfolder="run"))
    assert same(AlignmentNetwork.beside(trained), network)
    assert same(AlignmentNetwork.from_pretrained(tmp_path / "run", subfolder="alignment_network"), network)
    for name, options in (("run", {}), ("pipeline", {"subfolder": "vae"})):
        assert same(AlignmentNetwork.beside(AutoencoderKLEQ.from_pretrained(tmp_path / name, **options)), network)
    assert AlignmentNetwork.find(tmp_path / "nowhere") is None and AlignmentNetwork.find("nobody/nothing") is None


def test_a_damaged_network_is_not_a_missing_one(network, tmp_path):
    network.save_pretrained(tmp_path / "alignment_network")
    (tmp_path / "alignment_network" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="alignment_network"):
        AlignmentNetwork.find(tmp_path)


def test_an_autoencoder_with_other_latents_is_refused(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    AlignmentNetwork(latent_channels=16, hidden_size=8, feature_size=6).save_pretrained(tmp_path / "alignment_network")
    with pytest.raises(ValueError, match="reads 16 latent channels, but the AutoencoderKLEQ has 4"):
        AlignmentNetwork.beside(AutoencoderKLEQ.from_pretrained(tmp_path))
