"""Publishing and loading through a Hub: what arrives, what strangers get, and what a failing push costs (nothing)."""

import hashlib
import json
import shlex
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from diffusers_eqvae import AlignmentNetwork, ClassConditionalPipeline, FlowMatchODEScheduler
from diffusers_eqvae.remote_code import copy_with_code
from tests.hub import client
from tests.hub.conftest import OWNER, TOKEN, save_autoencoder_run
from tests.pipelines.kinds import KINDS, make_pipeline

AUTOENCODER_FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "discriminator/config.json",
    "discriminator/diffusion_pytorch_model.safetensors",
    "mean_std.json",
    "metrics.jsonl",
    "run_metadata.json",
    "validation/00000010_rotated.png",
}
REFUSED = {"hf_NobodyHasThisToken00": "Invalid credentials", "hf_TokenOfSomebodyElse": "You have no rights to create"}


def snapshot(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_push_uploads_the_model_its_parts_and_a_card_in_one_commit(hub, owner, autoencoder_run):
    before = snapshot(autoencoder_run)
    assert owner(client.push, autoencoder_run, f"{OWNER}/eq-vae")
    files = hub.files(f"{OWNER}/eq-vae")
    assert set(files) == AUTOENCODER_FILES
    assert snapshot(autoencoder_run) == before
    for path in AUTOENCODER_FILES - {".gitattributes", "README.md"}:
        assert files[path] == (autoencoder_run / path).read_bytes(), path
    assert hub.repositories[f"{OWNER}/eq-vae"].titles == ["initial commit", "Upload eq-vae"]

    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "diffusers"
    assert metadata["base_model"] == "stabilityai/sd-vae-ft-mse"
    assert "license" not in metadata
    for text in ("latent space changed", f'from_pretrained("{OWNER}/eq-vae")', "p_equivariance 0.5", "25.82"):
        assert text in card
    assert "measured on 1234 images" in card
    assert "(validation/00000010_rotated.png)" in card


def test_strangers_load_what_was_pushed_by_revision_and_offline(hub, owner, stranger, offline, tmp_path, request):
    repo_id = f"{OWNER}/revisions"
    first = save_autoencoder_run(tmp_path / "first", request.getfixturevalue("tiny_autoencoder_kl"))
    assert owner(client.push, first, repo_id)
    commit = hub.repositories[repo_id].branches["main"]

    state = load_file(first / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, first / "diffusion_pytorch_model.safetensors")
    assert owner(client.push, first, repo_id, revision="better/v2")
    changed = owner(client.load_autoencoder, str(first))["weights"]
    save_file(state, first / "diffusion_pytorch_model.safetensors")
    original = owner(client.load_autoencoder, str(first))["weights"]
    assert changed != original

    loaded = stranger(client.load_autoencoder, repo_id)
    assert loaded == {"weights": original, "latents_mean": [0.1, -0.2, 0.3, 0.0], "without_package": True}
    assert stranger(client.load_autoencoder, repo_id, revision="better/v2")["weights"] == changed
    assert stranger(client.load_autoencoder, repo_id, revision=commit)["weights"] == original

    requests = len(hub.requests)
    assert offline(client.load_autoencoder, repo_id) == loaded
    assert offline(client.load_autoencoder, repo_id, revision="better/v2")["weights"] == changed
    assert len(hub.requests) == requests


def test_a_pipeline_loads_from_the_hub_and_offline(hub, owner, stranger, offline, pipeline_run):
    """DiffusionPipeline.from_pretrained rejects libraries that it does not know only on the Hub's path."""
    expected = owner(client.load_pipeline, str(pipeline_run))
    assert expected["names"]["transformer"] == "SiTTransformer2DModel"
    assert expected["names"]["scheduler"] == "FlowMatchODEScheduler"
    assert owner(client.push, pipeline_run, f"{OWNER}/sit", private=False)
    files = hub.files(f"{OWNER}/sit")
    assert {"model_index.json", "transformer/config.json", "vae/config.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    for text in ("import diffusers_eqvae", "ids from 0 to 9", "`otter`", 'subfolder="vae"', "belong together"):
        assert text in card

    owner(client.push_with_diffusers, pipeline_run, "ClassConditionalPipeline", f"{OWNER}/sit-mixin")
    assert stranger(client.load_pipeline, f"{OWNER}/sit") == expected
    assert stranger(client.load_pipeline, f"{OWNER}/sit-mixin") == expected
    assert offline(client.load_pipeline, f"{OWNER}/sit") == expected
    own = owner(client.load_autoencoder_of_pipeline, str(pipeline_run))
    assert stranger(client.load_autoencoder_of_pipeline, f"{OWNER}/sit") == own
    assert offline(client.load_autoencoder_of_pipeline, f"{OWNER}/sit") == own


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_generator_arrives_bit_for_bit(
    kind, hub, owner, stranger, offline, tmp_path, tiny_autoencoder_kl, tiny_vq_model
):
    """Pushed by its owner, drawn from by a stranger and without a network: weights, classes and pixels."""
    make_pipeline(kind, tiny_autoencoder_kl, tiny_vq_model).save_pretrained(tmp_path / kind)
    expected, repo_id = owner(client.load_pipeline, str(tmp_path / kind)), f"{OWNER}/every-{kind}"
    assert owner(client.push, tmp_path / kind, repo_id)
    assert stranger(client.load_pipeline, repo_id) == expected
    assert offline(client.load_pipeline, repo_id) == expected


def test_a_pipeline_brings_its_alignment_network(
    hub, owner, stranger, offline, tmp_path, tiny_sit, tiny_autoencoder_kl
):
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
    parts = (tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler())
    ClassConditionalPipeline(*parts, alignment_network=network).save_pretrained(tmp_path / "sit")
    expected = owner(client.load_alignment_network_of_pipeline, str(tmp_path / "sit"))
    assert owner(client.push, tmp_path / "sit", f"{OWNER}/aligned-sit")
    assert stranger(client.load_alignment_network_of_pipeline, f"{OWNER}/aligned-sit") == expected
    assert offline(client.load_alignment_network_of_pipeline, f"{OWNER}/aligned-sit") == expected


def test_an_autoencoder_brings_its_alignment_network(hub, owner, stranger, offline, autoencoder_run):
    """The autoencoder's weights are at the root, the network's in a folder beside them; each loads on its own."""
    repo_id, run = f"{OWNER}/aligned-vae", autoencoder_run
    assert owner(client.find_alignment_network, str(run)) is None
    AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6).save_pretrained(run / "alignment_network")
    expected = owner(client.find_alignment_network, str(run))
    assert expected is not None and owner(client.push, run, repo_id)
    assert stranger(client.find_alignment_network, repo_id) == expected
    assert offline(client.find_alignment_network, repo_id) == expected
    shutil.rmtree(run / "alignment_network")
    assert owner(client.push, run, f"{OWNER}/plain-vae")
    assert stranger(client.find_alignment_network, f"{OWNER}/plain-vae") is None


def test_push_to_hub_of_a_model_is_diffusers_own(hub, owner, stranger, autoencoder_run):
    repo_id = f"{OWNER}/mixin"
    owner(client.push_with_diffusers, autoencoder_run, "AutoencoderKLEQ", repo_id)
    expected = owner(client.load_autoencoder, str(autoencoder_run))["weights"]
    loaded = stranger(client.load_autoencoder, repo_id)
    assert loaded["weights"] == expected
    assert loaded["latents_mean"] == [0.1, -0.2, 0.3, 0.0]
    assert json.loads(hub.files(repo_id)["mean_std.json"])["latents_mean"] == loaded["latents_mean"]


def test_a_failing_push_costs_nothing_and_says_how_to_retry(hub, owner, autoencoder_run):
    repo_id, run = f"{OWNER}/retry", str(autoencoder_run)
    before = snapshot(autoencoder_run)

    def fails(reason, token=TOKEN):
        assert owner(client.push, run, repo_id, token=token) is False
        (line,) = owner.log
        assert reason in line
        assert f"eqvae push {run} --hub_model_id {repo_id}" in line
        assert "\n" not in line
        assert snapshot(autoencoder_run) == before

    for token, reason in REFUSED.items():
        fails(reason, token)
        assert token not in owner.log[0]
    assert repo_id not in hub.repositories

    hub.stop()
    fails(f"on {hub.endpoint}: ConnectError")
    assert owner(client.push_command, run, "--hub_model_id", repo_id) == 1
    hub.start()

    hub.failures = {"/commit/": 503}
    fails("503 Service Unavailable")
    hub.failures = {}
    assert set(hub.files(repo_id)) == {".gitattributes"}

    assert owner(client.push_command, run, "--hub_model_id", repo_id, "--license", "mit", "--private") == 0
    assert set(hub.files(repo_id)) == AUTOENCODER_FILES
    assert yaml.safe_load(hub.files(repo_id)["README.md"].decode().split("---\n")[1])["license"] == "mit"


def test_a_push_on_the_way_brings_what_is_ours_and_a_failing_one_says_how_to_repeat_it(
    hub, owner, autoencoder_run, tmp_path
):
    run, name = tmp_path / "run", f"{OWNER}/on-the-way"
    hub.failures = {"/commit/": 503}
    try:
        owner(client.push_on_the_way, autoencoder_run, name, run)
    finally:
        hub.failures = {}
    (said,) = [line for line in owner.log if "Could not push" in line]
    assert TOKEN not in said and "--commit_message 'Step 7'" in said and "--private" in said
    command = said.partition("to try again: ")[2]
    assert command.startswith(f"eqvae push {run / 'pushed'} --hub_model_id {name} --revision way")
    assert owner(client.push_command, *shlex.split(command)[2:]) == 0
    repository = hub.repositories[name]
    assert repository.private and repository.titles[-1] == "Step 7" and set(hub.files(name)) == {".gitattributes"}
    pushed = hub.files(name, "way")
    assert {"README.md", "config.json", "metrics.jsonl", "diffusion_pytorch_model.safetensors"} <= set(pushed)
    assert not [path for path in pushed if path.startswith(("checkpoints", "logs", "pushed"))]
    assert not [path for path, content in pushed.items() if TOKEN.encode() in content]
    assert pushed["metrics.jsonl"] == b'{"step": 7}\n'


def test_a_directory_without_a_model_and_one_with_the_token_in_a_file_are_refused(hub, owner, autoencoder_run):
    empty = autoencoder_run.parent / "empty"
    empty.mkdir()
    assert owner(client.push, empty, f"{OWNER}/empty") is False
    assert "does not hold a saved model" in owner.log[0]
    (autoencoder_run / "metrics.jsonl").write_text(json.dumps({"note": f"Bearer {TOKEN}"}))
    assert owner(client.push, autoencoder_run, f"{OWNER}/leak") is False
    assert "metrics.jsonl holds your access token" in owner.log[0] and "to try again" in owner.log[0]
    assert not {f"{OWNER}/empty", f"{OWNER}/leak"} & set(hub.repositories)


def test_a_card_written_by_hand_is_kept_and_a_short_name_gets_its_owner(hub, owner, autoencoder_run):
    (autoencoder_run / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    assert owner(client.push, autoencoder_run, "mine", private=True, license="x")
    assert "license=x is not used" in owner.log[0]
    assert hub.files(f"{OWNER}/mine")["README.md"] == b"---\nlicense: mit\n---\n\nMine.\n"
    assert hub.repositories[f"{OWNER}/mine"].private


def test_the_token_is_nowhere(hub, owner, autoencoder_run):
    """Neither in what was stored, nor in what was written, nor in any log, of pushes that worked and that did not."""
    run, repo_id = str(autoencoder_run), f"{OWNER}/clean"
    lines = []
    hub.failures = {"/commit/": 500}
    mistakes = ({"commit_message": TOKEN}, {"repo_id": TOKEN, "output_dir": run + TOKEN})
    for mistake in mistakes:
        assert not owner(client.push, **{"output_dir": run, "repo_id": repo_id} | mistake)
        lines += owner.log
    assert len(lines) == len(mistakes)
    hub.failures = {}
    assert owner(client.push, run, repo_id)
    assert TOKEN not in "\n".join(lines + owner.log)
    assert not any(TOKEN.encode() in content for content in hub.files(repo_id).values())
    files = [path for folder in (autoencoder_run, owner.home) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_the_branch_code_draws_the_same_pixels_without_the_package(hub, owner, pipeline_run, tmp_path):
    expected, repo_id = owner(client.load_pipeline, str(pipeline_run)), f"{OWNER}/sit-code"
    assert owner(client.push, pipeline_run, repo_id, with_code=True)
    assert not [path for path in hub.files(repo_id) if path.endswith(".py")], "main stays plain"
    copy_with_code(pipeline_run, tmp_path / "copy")
    for number, (source, options) in enumerate(((repo_id, {"revision": "code"}), (str(tmp_path / "copy"), {}))):
        bare = client.HubClient(hub.endpoint, tmp_path / f"home-{number}")
        try:
            assert bare(client.load_pipeline_with_its_own_code, source, **options) == expected
        finally:
            bare.pool.shutdown()


def test_a_latent_store_is_pushed_as_a_data_set(hub, owner, tmp_path):
    from tests.data.test_latent_store import write

    store = write(tmp_path / "latents")
    assert owner(client.push, store, f"{OWNER}/latents", license="cc-by-4.0")
    files = hub.files(f"{OWNER}/latents")
    assert files["manifest.json"] == (store / "manifest.json").read_bytes() and len(files) == 6
    assert b"license: cc-by-4.0" in files["README.md"]
    assert f"/api/datasets/{OWNER}/latents/commit/main" in hub.requests
    assert not owner(client.push, store, f"{OWNER}/latents", with_code=True)
    assert "a latent store has no code to publish beside it; leave with_code out" in owner.log[0]
