"""Identities: which change touches which hash, what two autoencoders agree in, and commits of the Hub."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from functools import partial

import pytest
import torch
from diffusers import VQModel

from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.provenance import (
    autoencoder_identity,
    hardware,
    hash_file,
    hub_commit,
    portable,
    require_same_autoencoder,
    weights_hash,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tiny_vq():
    torch.manual_seed(0)
    return VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=16).eval()


@pytest.fixture(params=["tiny_autoencoder_kl", "tiny_autoencoder_tiny", "tiny_vq"])
def vae(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def changed_parts(vae, change) -> set[str]:
    before = autoencoder_identity(vae)
    change(vae)
    after = autoencoder_identity(vae)
    return {name for name in before if before[name] != after[name]}


def add_to(name: str, amount: float = 0.1):
    return lambda vae: vae.get_parameter(name).view(-1)[0].add_(amount)


def pad_by_reflection(convolution: torch.nn.Conv2d, _) -> None:
    convolution.padding_mode = "reflect"


def test_an_identity_is_json_with_hashes_of_each_precision(vae):
    identity = autoencoder_identity(vae)
    assert json.loads(json.dumps(identity)) == identity == autoencoder_identity(copy.deepcopy(vae))
    assert identity["class"] == type(vae).__name__ and identity["latent_channels"] == 4
    hashes = [value for part in ("encoder", "decoder") for value in identity[part].values()]
    assert len(set(hashes)) == 6 and all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)
    assert (identity["codebook"] is None) == (not isinstance(vae, VQModel))


def test_each_change_touches_its_own_part(vae):
    for part in ("encoder", "decoder"):
        first = next(name for name, _ in vae.named_parameters() if name.startswith(part))
        assert changed_parts(vae, add_to(first)) == {part}
    normalization = LatentNormalization(mean=(0.1,) * 4, std=(2.0,) * 4)
    assert changed_parts(vae, normalization.apply_to) == {"normalization"}
    assert changed_parts(vae, lambda vae: vae.to(memory_format=torch.channels_last)) == set()
    for name, part in (("quant_conv", "encoder"), ("post_quant_conv", "decoder")):
        if hasattr(vae, name):
            assert changed_parts(vae, add_to(f"{name}.weight")) == {part}
            convolution = getattr(vae, part).conv_in
            assert changed_parts(vae, partial(pad_by_reflection, convolution)) == {part}
    if isinstance(vae, VQModel):
        assert changed_parts(vae, add_to("quantize.embedding.weight")) == {"codebook"}


def test_the_smallest_change_is_seen_in_float32(tiny_autoencoder_kl):
    before = autoencoder_identity(tiny_autoencoder_kl)["encoder"]
    with torch.no_grad():
        add_to("encoder.conv_in.weight", 1e-6)(tiny_autoencoder_kl)
    assert autoencoder_identity(tiny_autoencoder_kl)["encoder"]["float32"] != before["float32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_copies_agree_both_ways_and_another_encoder_does_not(vae, dtype):
    expected = json.loads(json.dumps(autoencoder_identity(vae)))
    rounded = copy.deepcopy(vae).to(dtype)
    for copied in (rounded, copy.deepcopy(rounded).float()):
        for parts in (("encoder", "codebook", "normalization"), ("decoder",)):
            require_same_autoencoder(expected, copied, parts=parts)
            require_same_autoencoder(expected, autoencoder_identity(copied), parts=parts)
            require_same_autoencoder(autoencoder_identity(copied), vae, parts=parts)
    with torch.no_grad():
        next(rounded.encoder.parameters()).add_(0.1)
    for given in (rounded, autoencoder_identity(rounded)):
        with pytest.raises(ValueError, match="does not belong to the store: its encoder weights differ; use the auto"):
            require_same_autoencoder(expected, given, whose="the store")


def test_all_that_differs_is_named_and_what_is_not_asked_for_passes(tiny_autoencoder_kl):
    expected = autoencoder_identity(tiny_autoencoder_kl)
    with torch.no_grad():
        for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
            add_to(name)(tiny_autoencoder_kl)
    LatentNormalization(scaling_factor=2.0).apply_to(tiny_autoencoder_kl)
    with pytest.raises(ValueError, match=r"its encoder weights and latent normalisation \(.*\) differ"):
        require_same_autoencoder(expected, tiny_autoencoder_kl)
    with pytest.raises(ValueError, match="its decoder weights differ"):
        require_same_autoencoder(expected, tiny_autoencoder_kl, parts=("decoder",))
    require_same_autoencoder(expected, tiny_autoencoder_kl, parts=("codebook",))
    require_same_autoencoder(None, tiny_autoencoder_kl)
    require_same_autoencoder({"codebook": None}, tiny_autoencoder_kl)


def test_a_codebook_counts_and_none_is_not_one(tiny_vq, tiny_autoencoder_kl):
    expected = autoencoder_identity(tiny_vq)
    with torch.no_grad():
        tiny_vq.quantize.embedding.weight.add_(0.1)
    for given in (tiny_vq, autoencoder_identity(tiny_vq), tiny_autoencoder_kl):
        with pytest.raises(ValueError, match="codebook"):
            require_same_autoencoder(expected, given)
    with pytest.raises(ValueError, match="codebook"):
        require_same_autoencoder(autoencoder_identity(tiny_autoencoder_kl), tiny_vq)


def test_a_wrapped_autoencoder_is_refused(tiny_autoencoder_kl):
    with pytest.raises(ValueError, match="unwrap it first"):
        autoencoder_identity(torch.nn.ModuleDict({"module": tiny_autoencoder_kl}))


def test_every_weight_enters_a_models_hash(tiny_sit, tiny_autoencoder_kl):
    before = weights_hash(tiny_sit)
    assert before == weights_hash(tiny_sit) != weights_hash(tiny_sit, tiny_autoencoder_kl)
    with torch.no_grad():
        tiny_sit.proj_out.weight.view(-1)[-1].add_(1e-6)
    assert weights_hash(tiny_sit) != before


def hub_cache(monkeypatch, folder, vae, subfolder=""):
    """A cache of the Hub that holds owner/name, as huggingface_hub lays it out."""
    repository = folder / "models--owner--name"
    vae.save_pretrained(repository / "snapshots" / COMMIT / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("subfolder", ["", "vae", "elsewhere"])
def test_what_came_from_the_hub_has_its_commit(tiny_autoencoder_kl, tmp_path, monkeypatch, subfolder):
    snapshot = hub_cache(monkeypatch, tmp_path, tiny_autoencoder_kl, subfolder)
    if subfolder == "vae":  # a pipeline is searched there
        (snapshot / "model_index.json").write_text("{}")
    inside = subfolder if subfolder == "elsewhere" else None
    assert hub_commit("owner/name", subfolder=inside) == COMMIT
    assert hub_commit("owner/name", subfolder=inside, revision=COMMIT) == COMMIT
    assert hub_commit(str(snapshot), subfolder=inside) == COMMIT
    monkeypatch.chdir(snapshot)
    assert hub_commit(".", subfolder=inside) == COMMIT


def test_what_lies_here_has_no_commit(tiny_autoencoder_kl, tmp_path):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    assert hub_commit(str(tmp_path / "vae")) is None
    assert hub_commit("owner/absent") is None


def test_a_files_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    printed = subprocess.run(["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True).stdout
    assert hash_file(tmp_path / "file") == printed[:16]


def test_hardware_states_the_versions_that_decide_numbers():
    import diffusers_eqvae

    stated = hardware()
    assert stated["versions"]["diffusers_eqvae"] == diffusers_eqvae.__version__
    assert stated["versions"]["torch"] == torch.__version__
    assert stated["hardware"] and stated["date"].endswith("+00:00")


def test_a_portable_path_says_nothing_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "project" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    here = str(tmp_path / "project" / "runs" / "vae")
    given = {"a": here, "b": "/home/me/vae", "c": ["runs/vae", "madebyollin/taesd"], "d": ("../vae", 3, None)}
    given |= {
        "e": "../project/runs/vae",
        "f": "ADM centre crop to 64 px",
        "g": {"name": "/x/heads/ade.pth"},
        "h": "a..b",
    }
    assert portable(given) == {
        "a": "runs/vae",
        "b": "vae",
        "c": ["runs/vae", "madebyollin/taesd"],
        "d": ("vae", 3, None),
        "e": "runs/vae",
        "f": "ADM centre crop to 64 px",
        "g": {"name": "ade.pth"},
        "h": "a..b",
    }
    assert portable(portable(given)) == portable(given)
