"""A Hub on this machine, its clients, and finished runs to publish."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub import client
from tests.hub_server import HubServer

TOKEN = "hf_TheTokenThatMustNeverLeak0123456789"
OWNER = "alice"


@pytest.fixture(scope="session")
def hub():
    with HubServer(tokens={TOKEN: OWNER, "hf_TokenOfSomebodyElse": "bob"}) as server:
        yield server


@pytest.fixture(scope="session")
def clients(hub, tmp_path_factory):
    """owner holds the token; stranger has another home and no token; offline has the stranger's home and no Hub."""
    homes = tmp_path_factory.mktemp("homes")
    clients = {
        "owner": client.HubClient(hub.endpoint, homes / "owner", HF_TOKEN=TOKEN),
        "stranger": client.HubClient(hub.endpoint, homes / "stranger"),
        "offline": client.HubClient("http://127.0.0.1:9", homes / "stranger", HF_HUB_OFFLINE="1"),
    }
    clients["owner"].pool.submit(client.preload, "diffusers_eqvae.hub")  # while the first test prepares
    yield clients
    for each in clients.values():
        each.pool.shutdown()


@pytest.fixture(scope="session")
def owner(clients):
    return clients["owner"]


@pytest.fixture(scope="session")
def stranger(clients):
    return clients["stranger"]


@pytest.fixture(scope="session")
def offline(clients):
    return clients["offline"]


def save_autoencoder_run(directory, vae, *, seed=0):
    """What a finished autoencoder run leaves behind, with everything that must not be published."""
    from diffusers_eqvae.latents import LatentNormalization
    from diffusers_eqvae.model_card import METADATA_FILE, RunMetadata
    from diffusers_eqvae.models.discriminator import PatchDiscriminator

    torch.manual_seed(seed)
    for parameter in vae.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    normalization = LatentNormalization(mean=(0.1, -0.2, 0.3, 0.0), std=(1.0, 1.5, 2.0, 0.5))
    normalization.apply_to(vae)
    vae.save_pretrained(directory)
    normalization.save_json(directory / "mean_std.json", num_samples=1234)
    PatchDiscriminator(base_channels=4, num_layers=1).save_pretrained(directory / "discriminator")
    (directory / "checkpoints/step-00000010").mkdir(parents=True)
    (directory / "checkpoints/step-00000010/model.safetensors").write_bytes(b"a checkpoint")
    (directory / "logs").mkdir()
    (directory / "logs/events.out.tfevents.1").write_bytes(b"a tracker's log")
    (directory / "diffusion_pytorch_model.safetensors.tmp").write_bytes(b"half written")
    (directory / "discriminator/config.json.tmp").write_text("half written")
    for folder in ("older_run", "weights_alone"):
        (directory / folder).mkdir()
        (directory / folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not of this run")
    (directory / "older_run/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    RunMetadata().save(directory / "older_run" / METADATA_FILE)
    (directory / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    (directory / "validation").mkdir()
    for name in ("00000010_rotated", "00000005_older"):
        image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(directory / f"validation/{name}.png")
    equivariance = {"p_equivariance": 0.5, "scale": "isotropic", "rotation": True}
    RunMetadata(
        model={"base_model": "stabilityai/sd-vae-ft-mse", "latent_space_changed": True},
        training={"losses": {"l1": 1.0, "lpips": 1.0}, "regularizers": {"equivariance": equivariance}},
        evaluation={
            "metrics": [{"name": "PSNR", "value": 25.82, "how": "24 images, centre crop 256 px"}],
            "images": [{"path": "validation/00000010_rotated.png", "caption": "decoded, rotated", "private": False}],
        },
        provenance={"command": f"accelerate launch train.py --hub_token {TOKEN}"},
    ).save(directory / METADATA_FILE)
    return directory


@pytest.fixture
def autoencoder_run(tmp_path, tiny_autoencoder_kl):
    return save_autoencoder_run(tmp_path / "eq-vae", tiny_autoencoder_kl)


@pytest.fixture
def pipeline_run(tmp_path, tiny_sit, tiny_autoencoder_kl):
    from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
    from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

    labels = {0: "tench, Tinca tinca", 1: ["otter", "river otter"]}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=labels)
    pipeline.save_pretrained(tmp_path / "sit")
    return tmp_path / "sit"
