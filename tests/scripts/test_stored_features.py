"""encode_latents.py --features, and the regularizers that read what it stores, against the same from images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae import extensions
from diffusers_eqvae.autoencoders import encode, encoder_features
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.teachers import NetworkTeacher
from diffusers_eqvae.images import adm_center_crop, to_pixels
from diffusers_eqvae.metrics.feature_networks import FEATURE_NETWORKS
from diffusers_eqvae.models import feature_teacher
from diffusers_eqvae.regularizers import REGULARIZERS, GeneratorRegularizer

from ..invariants.trajectories import ROOT, as_flags, assert_close, assert_equal, last_checkpoint, run_script, torchrun

ENCODE, TRAIN = ROOT / "training" / "encode_latents.py", ROOT / "training" / "train_transformer.py"
MODEL = {"_class_name": "SiTTransformer2DModel", "patch_size": 2, "num_layers": 2, "num_attention_heads": 2}
MODEL |= {"attention_head_dim": 8}
RUN = {"report_to": "none", "validation_steps": 0, "num_inference_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.9}
RUN |= {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1, "train_batch_size": 4}
METHODS = {"regularizers": ["repa", "vae_repa"], "repa_layer": 1, "repa_projector_size": 8, "vae_repa_layer": 2}
METHODS |= {"vae_repa_projector_size": 8}
EVERY = [name for name in REGULARIZERS if issubclass(REGULARIZERS[name], GeneratorRegularizer)]


@pytest.fixture
def place(tmp_path, tiny_autoencoder_kl):
    """images/ of two classes, kl/, dino/ with patches of 4 px, model.json."""
    for number in range(12):
        folder = tmp_path / "images" / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(number).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number:02}.png")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    save_teacher(tmp_path / "dino", seed=0)
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path


def save_teacher(path, *, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    Dinov2Model(Dinov2Config(**sizes, patch_size=4, image_size=8)).save_pretrained(path)


def store(place, name="store", **options):
    words = {"vae": place / "kl", "train_data_dir": place / "images", "output_dir": place / name, "resolution": 16}
    words |= {"dtype": "fp32", "features_dtype": "fp32", "normalization": "config", "shard_size": 5, "batch_size": 4}
    words |= {"features": ["vae_encoder", place / "dino"], **options}
    run_script(ENCODE, as_flags({key: value for key, value in words.items() if value is not None}))
    return place / name


def train(place, output, **options) -> dict:
    words = {"model": place / "model.json", "output_dir": place / output, "repa_teacher": place / "dino"}
    words |= {**METHODS, **RUN, **options}
    if "repa" not in words["regularizers"]:
        words = {name: value for name, value in words.items() if not name.startswith("repa_")}
    run_script(TRAIN, as_flags(words))
    return last_checkpoint(place / output, "objective")


def losses(place, output) -> list[dict]:
    lines = map(json.loads, (place / output / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "loss/flow", "loss/masked", "loss/repa", "loss/vae_repa")  # a store adds what it knows of its own
    return [{key: line[key] for key in names if key in line} for line in lines if "loss" in line]


def content(path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (*path.glob("*.safetensors"), *path.glob("*.json"))}


@torch.no_grad()
def test_both_views_have_their_own_features(place, capsys):
    path = store(place, flip="true", verify="true", shard_size=4)
    said = capsys.readouterr().out
    assert (
        "features vae_encoder: 16 x 2 x 2 float32 = 0.256 kB a view, 0.5 times the moments, 6.14e-06 GB in all" in said
    )
    assert "features dino: 12 x 2 x 2 float32" in said and "GB free at" in said
    data = LatentStore(path)
    data.read_features("vae_encoder", "dino")
    images = sorted((place / "images").rglob("*.png"))
    pixels = torch.stack([to_pixels(adm_center_crop(Image.open(each).convert("RGB"), 16)) for each in images])
    teacher = feature_teacher.FeatureTeacher.from_pretrained(place / "dino", image_size=8)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(place / "kl").eval()
    for view, seen in enumerate((pixels, pixels.flip(-1))):
        stored = data.get_many(range(12), view=view)
        assert torch.equal(stored["features.dino"], torch.cat([teacher(batch)[0] for batch in seen.split(4)]))
        with encoder_features(vae) as given:
            encode(vae, seen)
        pooled = given[0].reshape(12, 16, 2, 2, 2, 2).mean((3, 5))
        torch.testing.assert_close(stored["features.vae_encoder"], pooled, atol=1e-5, rtol=1e-4)


def test_features_are_added_to_a_finished_store_and_an_interrupted_run_goes_on(place, caplog):
    at_once = content(store(place, "once"))
    later = store(place, "later", features=None, features_dtype=None)
    latents = LatentStore(later).get_many(range(12))["moments"]
    assert LatentStore(later).settings.features == {}
    store(place, "later")
    assert content(later) == at_once and torch.equal(LatentStore(later).get_many(range(12))["moments"], latents)
    for lost in ("manifest.json", "shard-00001.safetensors"):
        (later / lost).unlink()
    store(place, "later")
    assert content(later) == at_once
    with pytest.raises(ValueError, match=r"other settings: features.dino.dtype \(shard: float32, now: None\)"):
        store(place, "later", features=None, features_dtype=None)
    save_teacher(place / "dino", seed=1)
    with pytest.raises(ValueError, match=r"other settings: features.dino.identity"):
        store(place, "later")
    assert content(later) == at_once


def test_training_from_stored_features_is_training_from_images(place, monkeypatch):
    path, halved = store(place), store(place, "half", features_dtype="fp16")
    images = {"vae": place / "kl", "train_data_dir": place / "images", "resolution": 16}
    seen = train(place, "seen", **images)
    # The teacher is there to be named, not to be run.
    monkeypatch.setattr(feature_teacher.FeatureTeacher, "forward", None)
    stored = train(place, "stored", latents_dir=path)
    assert_close(seen, stored, 1e-6)  # the encoder computes in another memory format, which rounds differently
    for first, second in zip(losses(place, "seen"), losses(place, "stored"), strict=True):
        assert first == pytest.approx(second, rel=1e-5) and {"loss/repa", "loss/vae_repa"} < first.keys()
    train(place, "half_run", latents_dir=halved)
    for first, second in zip(losses(place, "seen"), losses(place, "half_run"), strict=True):
        assert first == pytest.approx(second, rel=2e-3)


def test_resumed_with_every_regularizer_equals_uninterrupted_bit_for_bit(place):
    options = {"latents_dir": store(place, flip="true"), "regularizers": EVERY}
    whole = train(place, "whole", **options)
    logged = json.loads((place / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert {f"loss/{name}" for name in EVERY} <= logged.keys()
    shutil.copytree(place / "whole", place / "resumed")
    shutil.rmtree(place / "resumed" / "checkpoints" / "step-00000006")
    assert_equal(whole, train(place, "resumed", resume_from_checkpoint="latest", **options))


def test_a_maskgit_reads_the_features_beside_its_tokens(place, tiny_vq_model):
    tiny_vq_model.save_pretrained(place / "vq")
    own = {"_class_name": "MaskGITTransformer2DModel", "num_layers": 2, "num_attention_heads": 2}
    (place / "maskgit.json").write_text(json.dumps(own | {"attention_head_dim": 8}))
    tokens = {"dtype": None, "normalization": None, "vae": place / "vq", "features_grid": 4}
    options = {"model": place / "maskgit.json", "max_train_steps": 2}
    train(place, "stored", latents_dir=store(place, "tokens", **tokens), **options)
    images = {"vae": place / "vq", "train_data_dir": place / "images", "resolution": 16}
    train(place, "seen", **images, **options)
    for first, second in zip(losses(place, "seen"), losses(place, "stored"), strict=True):
        assert first == pytest.approx(second, rel=1e-5) and {"loss/repa", "loss/vae_repa"} < first.keys()


@pytest.mark.slow
def test_two_ranks_with_every_regularizer_are_one_with_twice_the_batch(place):
    path = store(place, flip="true")
    one = train(place, "one", latents_dir=path, regularizers=EVERY)
    words = {"model": place / "model.json", "output_dir": place / "two", "repa_teacher": place / "dino"}
    words |= {**METHODS, **RUN, "latents_dir": path, "train_batch_size": 2, "regularizers": EVERY}
    done = torchrun(TRAIN, as_flags(words), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(one, last_checkpoint(place / "two", "objective"), 1e-5)


def test_a_store_that_does_not_hold_what_is_read_is_refused_before_the_first_step(place):
    plain = store(place, "plain", features=None, features_dtype=None)
    for options, message in (
        (
            {"latents_dir": plain},
            r"repa reads the features dino or images, which these data do not hold; add them by the command that "
            r"encoded the store \(encode_latents.py --output_dir .*plain ...\) with --features dino",
        ),
        ({"latents_dir": plain, "regularizers": ["vae_repa"]}, "with --features vae_encoder, where a vision model is"),
        (
            {"latents_dir": store(place, "fine", features_grid=4)},
            "dino are stored over a grid of 4x4, and .* 2x2 tokens",
        ),
        (
            {"latents_dir": store(place, "raw", features_before_norm="true")},
            "those before it, as alignment reads them",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(place, "refused", **options)
    train(place, "averaged", latents_dir=place / "fine", regularizers=["vae_repa"], max_train_steps=1)
    path = store(place)
    save_teacher(place / "dino", seed=1)
    with pytest.raises(ValueError, match=r"those of another teacher: dino \(\w{16}\) is not dino \(\w{16}\)"):
        train(place, "refused", latents_dir=path)
    assert not (place / "refused" / "checkpoints").exists()


ALIGN = ROOT / "training" / "train_autoencoder.py"


def align(place, output, **options) -> dict:
    words = {"pretrained_model_name_or_path": place / "kl", "train_data_dir": place / "images", "resolution": 16}
    words |= {"output_dir": place / output, "perceptual_weight": 0, "disc_weight": 0, "reduction": "mean"}
    words |= {"alignment_teacher": place / "dino", "alignment_image_size": 16, "alignment_hidden_size": 8}
    words |= {"regularizers": ["alignment"], "center_crop": "true", "random_flip": "false", "num_validation_images": 1}
    words |= {name: value for name, value in RUN.items() if name != "num_inference_steps"}
    words |= {"num_normalization_images": 1, **options}
    run_script(ALIGN, as_flags(words))
    return last_checkpoint(place / output, "objective")


def aligned_store(place, name="aligned", **options):
    whole = {"features": [place / "dino"], "features_grid": 4, "features_before_norm": "true"}
    return store(place, name, **whole | options)


def test_an_autoencoder_aligns_with_stored_features_as_with_the_teacher(place, monkeypatch):
    mirrored = {"random_flip": "true"}
    path = aligned_store(place, flip="true", shard_size=4)
    seen = align(place, "seen", **mirrored)
    monkeypatch.setattr(feature_teacher.FeatureTeacher, "forward", None)
    stored = align(place, "stored", features_dir=path, **mirrored)
    assert_equal(seen, stored)  # bit for bit: the teacher saw the same batches of the same pixels
    shutil.rmtree(place / "stored" / "checkpoints" / "step-00000006")
    assert_equal(seen, align(place, "stored", features_dir=path, resume_from_checkpoint="latest", **mirrored))
    both = ["alignment", "equivariance"]
    align(place, "composed", features_dir=path, regularizers=both, p_low_resolution=0, max_train_steps=1)


def test_stored_features_that_do_not_fit_are_refused_before_the_first_step(place):
    path = aligned_store(place)
    for options, message in (
        (
            {"center_crop": "false"},
            r"are those of centre crops, and these are random ones; store the features",
        ),
        ({"random_flip": "true"}, "are those of images that were not mirrored, and half of these are"),
        ({"resolution": 32}, "are those of 16 px, not 32"),
        ({"alignment_image_size": 8}, "not those of the teacher dino: teacher_image_size 16, not 8. Name the teacher"),
        (
            {"regularizers": ["alignment", "equivariance"]},
            r"equivariance encodes smaller .* p_low_resolution 0",
        ),
        ({"features_dir": store(place)}, r"holds the features vae_encoder, dino, .* would read dino, dino.global\)"),
    ):
        with pytest.raises(ValueError, match=message):
            align(place, "refused", **{"features_dir": path, **options})
    assert not (place / "refused" / "checkpoints").exists()
    shutil.rmtree(place / "images" / "dog")
    with pytest.raises(ValueError, match=r"These are not the data of the store .*aligned: the number of images"):
        align(place, "refused", features_dir=path)


NETWORK = '''
import torch
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures, register_feature_network
from safetensors.torch import load_file


@register_feature_network("cells")
class Cells(ModuleFeatures):
    """A convolution of patches of 4 px, which leaves the border out."""

    @classmethod
    def from_file(cls, weights):
        module = torch.nn.Conv2d(3, 6, 6, 4)
        module.load_state_dict(load_file(weights))
        return cls(module, name="cells", stride=4)
'''


def test_a_feature_network_of_a_users_own_is_a_teacher(place, monkeypatch, caplog):
    """One file beside the command: alignment, vf and stored features by it, known again by its weights."""
    (place / "my_cells.py").write_text(NETWORK)
    for name in ("one", "two"):
        save_file(torch.nn.Conv2d(3, 6, 6, 4).state_dict(), place / f"{name}.safetensors")
    monkeypatch.setattr(FEATURE_NETWORKS, "_members", dict(FEATURE_NETWORKS._members))
    monkeypatch.setattr(extensions, "_LOADED", dict(extensions._LOADED))
    cells, extension = f"cells={place / 'one.safetensors'}", {"extension": place / "my_cells.py"}
    given = {"alignment_teacher": cells, **extension}
    path = aligned_store(place, features=[cells], **extension)
    identity = LatentStore(path).settings.features["cells"].identity
    assert identity["files"] == identity["teacher_hash"] and str(place) not in json.dumps(identity)
    seen = align(place, "seen", **given)
    with monkeypatch.context() as silent:
        silent.setattr(NetworkTeacher, "forward", None)
        assert_equal(seen, align(place, "stored", features_dir=path, **given))
    assert "since no network of --features ends in a LayerNorm: --features_before_norm." in caplog.text
    other = {"alignment_teacher": f"cells={place / 'two.safetensors'}"}
    with pytest.raises(ValueError, match="not those of the teacher cells: teacher_hash"):
        align(place, "refused", features_dir=path, **given | other)
    both = {"regularizers": ["alignment", "vf"], "vf_teacher": other["alignment_teacher"], "vf_image_size": 16}
    whole = align(place, "both", **given | both)
    shutil.rmtree(place / "both" / "checkpoints" / "step-00000006")
    assert_equal(whole, align(place, "both", resume_from_checkpoint="latest", **given | both))
