"""A Hub on this machine, its clients, and finished runs to publish."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub_server import HubServer

TOKEN = "hf_TheTokenThatMustNeverLeak0123456789"
OWNER = "alice"


class HubClient:
    """The process of client.py; `call` runs one of its actions there."""

    def __init__(self, endpoint, home, *, token=None, **environment):
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.output = self.home / f"stderr-{len(list(self.home.iterdir()))}.txt"
        env = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        env |= {"OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {}) | environment
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(Path(__file__).with_name("client.py"))]
        with self.output.open("w") as errors:
            self.process = subprocess.Popen(command, env=env, stderr=errors, **pipes)
        self.log = []

    def send(self, action, environment=None, **arguments):
        request = {"action": action, "arguments": arguments, "environment": environment or {}}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self):
        line = self.process.stdout.readline()
        assert line, f"the client ended:\n{self.output.read_text()[-3000:]}"
        answer = json.loads(line)
        self.log = answer["log"]
        assert answer["error"] is None, answer["error"]
        return answer["result"]

    def call(self, action, environment=None, **arguments):
        self.send(action, environment, **arguments)
        return self.receive()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def hub():
    with HubServer(tokens={TOKEN: OWNER, "hf_TokenOfSomebodyElse": "bob"}) as server:
        yield server


@pytest.fixture(scope="session")
def clients(hub, tmp_path_factory):
    """owner: holds the token. stranger: another home without a token. Both import while the first test prepares."""
    homes = tmp_path_factory.mktemp("homes")
    owner = HubClient(hub.endpoint, homes / "owner", token=TOKEN)
    stranger = HubClient(hub.endpoint, homes / "stranger")
    owner.send("preload", modules=["diffusers_eqvae.hub"])
    stranger.send("preload", modules=["diffusers.models.autoencoders.autoencoder_kl"])
    owner.receive()
    stranger.receive()
    yield {"owner": owner, "stranger": stranger}
    owner.close()
    stranger.close()


@pytest.fixture(scope="session")
def offline(stranger):
    """A fresh process with the stranger's cache, HF_HUB_OFFLINE=1 and no Hub to reach."""
    client = HubClient("http://127.0.0.1:9", stranger.home, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture(scope="session")
def owner(clients):
    return clients["owner"]


@pytest.fixture(scope="session")
def stranger(clients):
    return clients["stranger"]


def save_autoencoder_run(directory, vae, *, seed=0):
    """What a finished autoencoder run leaves behind, with everything that must not be published."""
    from diffusers_eqvae.hub import write_run_facts
    from diffusers_eqvae.latents import LatentNormalization
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
    (directory / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    (directory / "validation").mkdir()
    for name in ("00000010_rotated", "00000005_older"):
        image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(directory / f"validation/{name}.png")
    facts = {
        "base_model": "stabilityai/sd-vae-ft-mse",
        "steps": 10,
        "losses": {"l1": 1.0, "lpips": 1.0},
        "regularizers": {"equivariance": {"p_equivariance": 0.5, "scale": "isotropic", "rotation": True}},
        "figures": [{"name": "PSNR", "value": 25.82, "how": "24 images, centre crop 256 px"}],
        "images": [{"path": "validation/00000010_rotated.png", "caption": "decoded from rotated latents"}],
        "command": f"accelerate launch train.py --hub_token {TOKEN}",
        "latent_space_changed": True,
    }
    write_run_facts(directory / "run_facts.json", facts)
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
