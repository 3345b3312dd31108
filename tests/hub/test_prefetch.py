"""`eqvae prefetch`: what it fetches is what a command reads, and enough for a machine without a network."""

from __future__ import annotations

import pytest

from tests.hub import client
from tests.hub.conftest import OWNER


@pytest.fixture
def pushed(owner, pipeline_run):
    assert owner(client.push, pipeline_run, f"{OWNER}/sit")
    return f"{OWNER}/sit"


@pytest.fixture
def two_machines(hub, tmp_path):
    """One with a network, one without; they have one home."""
    machines = [
        client.HubClient(hub.endpoint, tmp_path / "home"),
        client.HubClient("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1"),
    ]
    yield machines
    for each in machines:
        each.pool.shutdown()


@pytest.mark.slow
def test_of_a_pipeline_the_part_that_a_command_reads_is_fetched_and_loads_without_a_network(pushed, two_machines):
    online, offline = two_machines
    words = ("encode-latents", "--vae", pushed)
    status, (said, *rest) = online(client.prefetch, "--dry_run", *words)
    kept = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert status == 0 and said.startswith(f"vae: {pushed}, {len(kept)} files, 0.") and said.endswith(" MB")
    assert not rest and online(client.cached_files, pushed) == []
    status, (said, where) = online(client.prefetch, *words)
    assert status == 0 and "HF_HUB_OFFLINE=1" in where
    assert online(client.cached_files, pushed) == kept
    assert offline(client.latent_channels_of, pushed) == 4
    _, (said, _) = online(client.prefetch, *words)
    assert said.endswith(f", {len(kept)} of them in the cache")
    assert online(client.prefetch, "sample", "--model", pushed)[0] == 0
    assert offline(client.class_of_pipeline, pushed) == "ClassConditionalPipeline"


@pytest.mark.slow
def test_what_is_not_there_is_said_after_the_others_were_fetched(pushed, two_machines):
    online, offline = two_machines
    status, said = online(client.prefetch, "evil/nothing", pushed)
    assert status == 1 and said[0].startswith("model: evil/nothing is neither here nor on the Hub")
    assert said[1].startswith(f"model: {pushed}, ") and len(said) == 2
    with pytest.raises(OSError, match=r"The Hub cannot be asked \(HF_HUB_OFFLINE is set\); run this where there is a"):
        offline(client.prefetch, pushed)
