"""From images to tokens to a MaskGIT to its samples, through the command lines of all three scripts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.tokens import encode_tokens

from ..invariants.tiny_latents import write_store
from ..invariants.trajectories import ROOT, as_flags, run_script

MODEL = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "_class_name": "MaskGITTransformer2DModel",
}
TRAIN = {"train_batch_size": 4, "max_train_steps": 2, "num_inference_steps": 4, "report_to": "none"}


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(("cat", "dog", "otter")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            levels = np.random.default_rng(10 * number + index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(levels).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "maskgit.json").write_text(json.dumps(MODEL))
    return tmp_path / "images"


def encode(tmp_path, images, vae, **options):
    vae.save_pretrained(tmp_path / "vae")
    options = {"vae": tmp_path / "vae", "train_data_dir": images, "output_dir": tmp_path / "store"} | options
    run_script(ROOT / "training" / "encode_latents.py", as_flags({"resolution": 16, "shard_size": 4} | options))
    return tmp_path / "store"


def train(output, **options):
    options = {**TRAIN, "output_dir": output, **options}
    run_script(ROOT / "training" / "train_transformer.py", as_flags(options))


def test_images_become_tokens_become_a_pipeline_becomes_samples(tmp_path, images, tiny_vq_model, caplog, capsys):
    store = encode(tmp_path, images, tiny_vq_model, dtype="fp16")
    assert "tokens are uint16 and have no normalisation: --dtype" in caplog.text
    stored = LatentStore(store, vae=tiny_vq_model)
    pixels = [np.asarray(Image.open(path)) for path in sorted(images.glob("*/*.png"))]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = encode_tokens(tiny_vq_model, batch)
    assert torch.equal(stored.get_many(range(9))["tokens"].long(), expected)
    assert f"{len(expected.unique())} of 16 vectors of the codebook are used, perplexity" in capsys.readouterr().out

    run = tmp_path / "run"
    train(run, model=tmp_path / "maskgit.json", latents_dir=store, validation_steps=1, guidance_scale=3)
    assert len(list((run / "validation").glob("*_samples.png"))) >= 1
    pipeline = DiffusionPipeline.from_pretrained(run)
    assert type(pipeline).__name__ == "MaskGITPipeline" and pipeline.id2label[2] == ("otter",)
    config = pipeline.transformer.config
    assert (config.codebook_size, config.sample_size, config.num_classes) == (16, 4, 3)
    card = json.loads((run / "run_metadata.json").read_text())
    assert card["training"]["objective"] == "masked_tokens, mask_label_smoothing 0.1"

    options = {"model": run, "num_samples": 3, "batch_size": 2, "num_inference_steps": 4, "guidance_scale": 2.0}
    for name in ("first", "second"):
        run_script(ROOT / "pipelines" / "sample.py", as_flags({**options, "output_dir": tmp_path / name}))
    samples = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("first", "second")]
    assert samples[0].shape == (3, 16, 16, 3) and np.array_equal(*samples)
    assert json.loads((tmp_path / "first" / "sampling.json").read_text())["nfe"] == 7
    # It goes on from where it was.
    train(tmp_path / "further", model=run, latents_dir=store, validation_steps=0)


def test_tokens_are_made_on_the_way_as_well(tmp_path, images, tiny_vq_model, tiny_autoencoder_kl):
    tiny_vq_model.save_pretrained(tmp_path / "vae")
    options = {"model": tmp_path / "maskgit.json", "train_data_dir": images, "resolution": 16, "validation_steps": 0}
    train(tmp_path / "run", vae=tmp_path / "vae", **options)
    assert (tmp_path / "run" / "model_index.json").is_file()
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match=r"Tokens need an autoencoder with a codebook \(VQModel\); AutoencoderKL has"):
        train(tmp_path / "other", vae=tmp_path / "kl", **options)


def test_data_of_the_other_kind_are_refused(tmp_path, images, tiny_vq_model, tiny_autoencoder_kl):
    tokens = write_store(tmp_path / "tokens", tiny_vq_model)
    moments = write_store(tmp_path / "moments", tiny_autoencoder_kl)
    words = "flow_matching reads latents, and these data are tokens; .* as posteriors .encode_latents.py --kind post"
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "one", model="SiT-S/2", latents_dir=tokens)
    words = "masked_tokens reads tokens, and these data are latents; .* encode the images as tokens, by a VQ"
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "two", model="MaskGIT-S", latents_dir=moments)
    with pytest.raises(ValueError, match="num_inference_steps must be at most 16, the number of tokens; got 50"):
        train(tmp_path / "three", model=tmp_path / "maskgit.json", latents_dir=tokens, num_inference_steps=50)
    with pytest.raises(ValueError, match=r"Tokens need an autoencoder with a codebook \(VQModel\); AutoencoderKL has"):
        encode(tmp_path, images, tiny_autoencoder_kl, kind="tokens")


def test_a_vq_model_is_stored_as_posteriors_on_request(tmp_path, images, tiny_vq_model):
    store = LatentStore(encode(tmp_path, images, tiny_vq_model, kind="posteriors", dtype="fp32"))
    assert store.settings.kind == "latents" and store.latent_shape == (4, 4, 4)
