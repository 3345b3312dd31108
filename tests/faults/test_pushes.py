"""A push uploads the run that is there and nothing else: whatever leads elsewhere is refused by name, before anything
is created; images of private data and folders of this machine stay here."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from diffusers_eqvae import hub
from diffusers_eqvae.commands import push
from diffusers_eqvae.directories import OutputDirectory
from diffusers_eqvae.hub import prepare_push, push_run
from diffusers_eqvae.model_card import METADATA_FILE, RunMetadata, render_model_card
from diffusers_eqvae.training_utils.checkpoints import publish

IMAGE = "validation/x.png"


@pytest.fixture
def run(tmp_path, tiny_autoencoder_kl):
    """An autoencoder with a component and an image, and a secret beside its directory."""
    directory = tmp_path / "run"
    tiny_autoencoder_kl.save_pretrained(directory)
    tiny_autoencoder_kl.save_pretrained(directory / "discriminator")
    (directory / "validation").mkdir()
    Image.new("RGB", (8, 8)).save(directory / IMAGE)
    secret = tmp_path / "secret"
    tiny_autoencoder_kl.save_pretrained(secret)
    Image.new("RGB", (8, 8)).save(secret / "x.png", pnginfo=PngInfo())
    (secret / "note.txt").write_text("secret")
    note(directory, {"path": IMAGE})
    return directory


def note(directory, *images, **groups):
    RunMetadata(evaluation={"images": list(images)}, **groups).save(directory / METADATA_FILE)


def link(name, target):
    def change(run):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)

    return change


def linked_folder(run):
    (run / "teacher").symlink_to(run.parent / "secret", target_is_directory=True)


def indexed(**entries):
    def change(run):
        (run / "model_index.json").write_text(json.dumps({"_class_name": "X", **entries}))

    return change


def noted(path):
    return lambda run: note(run, {"path": path})


def renamed(run):
    (run / "validation/x.png").write_bytes((run / "config.json").read_bytes())


WEIGHTS = "diffusion_pytorch_model.safetensors"
OUTSIDE = {
    "weights through a link": (link(WEIGHTS, "/etc/hostname"), f"{WEIGHTS} leads to /etc/hostname, outside the run"),
    "a config through a link": (link("config.json", "../secret/config.json"), r"config\.json leads to .*secret"),
    "a card through a link": (link("README.md", "../secret/note.txt"), r"README\.md leads to .*note\.txt"),
    "curves through a link": (link("metrics.jsonl", "../secret/note.txt"), r"metrics\.jsonl leads to .*note\.txt"),
    "a link to nothing": (link("mean_std.json", "nowhere.json"), r"mean_std\.json is not a file that can be read"),
    "a component's folder through a link": (linked_folder, r"teacher/config\.json leads to .*secret"),
    "a component named outside": (indexed(**{"../secret": ["diffusers", "X"]}), r"names '\.\./secret', which is not"),
    "a component named absolutely": (indexed(**{"/etc": ["diffusers", "X"]}), "names '/etc', which is not the name"),
    "a component without a name": (indexed(**{"": ["diffusers", "X"]}), "names '', which is not the name"),
    "an image outside": (noted("../secret/x.png"), "outside the run, and would publish it"),
    "an absolute image": (noted("/etc/hostname"), "leads to /etc/hostname, outside the run"),
    "a checkpoint called an image": (noted(WEIGHTS), f"{WEIGHTS}, which .* calls an image, is not one: its name"),
    "a config renamed to .png": (renamed, r"x\.png, which .* calls an image, is not one: cannot identify"),
    "a folder called an image": (noted("validation"), "validation is not a file that can be read"),
    "a component that is a string": (indexed(discriminator="X"), r"\[library, class\] of the component discriminator"),
    "a component that is null": (indexed(discriminator=None), r"\[library, class\] of the component discriminator"),
    "a component of one word": (indexed(vae=["AutoencoderKL"]), r"\[library, class\] of the component vae"),
    "a component of numbers": (indexed(vae=[1, 2]), r"\[library, class\] of the component vae"),
    "an index that is a list": (lambda run: (run / "model_index.json").write_text("[]"), "must hold a JSON object"),
    "an index cut short": (
        lambda run: (run / "model_index.json").write_text("{"),
        r"model_index\.json is not a whole",
    ),
    "metadata of another shape": (
        lambda run: (run / METADATA_FILE).write_text('{"format_version": 1, "model": []}'),
        "run_metadata.json cannot be used: model of RunMetadata must map",
    ),
}


class NoHub:
    """Stands for the Hub; whatever would be created there is an error."""

    endpoint = "https://hub"

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked of the Hub")

    def whoami(self):
        return {"name": "me"}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_not_of_the_run_is_refused_by_name_before_anything_is_created(case, run, monkeypatch, caplog):
    change, message = OUTSIDE[case]
    change(run)
    monkeypatch.setattr(hub, "HfApi", NoHub)
    with pytest.raises(ValueError, match=message) as refused:
        prepare_push(run, "me/run")
    assert push_run(run, "me/run") is False
    assert " ".join(str(refused.value).split())[:200] in caplog.text
    assert "was asked of the Hub" not in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
@pytest.mark.parametrize("name", ["mean_std.json", "metrics.jsonl", "README.md", "more.safetensors"])
def test_a_pipe_is_refused_and_not_waited_for(name, run):
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=f"{name} is not a file that can be read"):
        prepare_push(run, "me/run")


def test_a_link_inside_the_run_is_uploaded(run):
    (run / WEIGHTS).rename(run / "weights.bin")
    (run / WEIGHTS).symlink_to("weights.bin")
    assert WEIGHTS in prepare_push(run)[0]


@pytest.mark.parametrize(
    ("private", "hub_images", "shown"),
    [
        pytest.param(True, None, False, id="of a local folder"),
        pytest.param(None, None, False, id="unknown whose"),
        pytest.param(False, None, True, id="of public data"),
        pytest.param(True, "validation", True, id="of a local folder, on purpose"),
        pytest.param(False, "none", False, id="none on purpose"),
    ],
)
def test_private_images_are_published_on_purpose_only_and_it_is_said(private, hub_images, shown, run, caplog, capsys):
    caplog.set_level("INFO")
    note(run, {"path": IMAGE} | ({} if private is None else {"private": private}))
    files, card = prepare_push(run, "me/run", hub_images=hub_images)
    assert (IMAGE in files) == (f"({IMAGE})" in card) == shown
    assert f"The card {'shows' if shown else 'leaves out'} {IMAGE}" in caplog.text
    flags = [] if hub_images is None else ["--hub_images", hub_images]
    push.main([str(run), "--hub_model_id", "me/run", "--dry_run", *flags])
    assert (IMAGE in capsys.readouterr().out) == shown


@pytest.mark.parametrize("source", ["/home/me/secret-client/vae", "../secret-client/vae", "~/secret-client/vae"])
def test_no_folder_of_this_machine_is_published(source, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"_name_or_path": source}))
    command = f"train.py --pretrained_model_name_or_path {source} --train_data_dir='{source} of 2026' --model=SiT-B/2"
    groups = {"model": {"base_model": source}, "data": {"dataset": source}, "provenance": {"command": command}}
    note(run, **groups)
    files, card = prepare_push(run, "me/run")
    contents = [hub._published(run, path) for path in files if path != "README.md" and path.endswith(".json")]
    texts = [card, *(each.decode() if isinstance(each, bytes) else Path(each).read_text() for each in contents)]
    assert not any("secret-client" in text for text in texts)
    assert "'--train_data_dir=vae of 2026' --model=SiT-B/2" in card, card


def test_a_name_on_the_hub_stays_where_it_is(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"_name_or_path": "stabilityai/sd-vae-ft-mse"}))
    assert hub._published(run, "config.json") == str(run / "config.json")
    card = render_model_card(RunMetadata(model={"base_model": "stabilityai/sd-vae-ft-mse"}), "autoencoder")
    assert "[stabilityai/sd-vae-ft-mse](https://huggingface.co/stabilityai/sd-vae-ft-mse)" in card


@pytest.mark.parametrize("name", ["other/config.json", "other/secret.safetensors", "extra.safetensors"])
def test_what_the_run_has_not_written_stays(name, run, caplog):
    with_record = OutputDirectory(run.parent / "published", kind="run")
    with_record.claim()
    publish(with_record, lambda directory: shutil.copytree(run, directory, dirs_exist_ok=True) and None)
    with_record.release()
    before = prepare_push(with_record.path, "me/run")[0]
    assert {WEIGHTS, f"discriminator/{WEIGHTS}"} <= set(before)
    (with_record.path / "other").mkdir()
    (with_record.path / "other" / "config.json").write_text("{}")
    (with_record.path / name).write_text("{}")
    assert prepare_push(with_record.path, "me/run")[0] == before
    assert f"did not write {name.replace('secret.safetensors', 'config.json')}" in caplog.text
    (with_record.path / "README.md").write_text("a card by hand")
    assert prepare_push(with_record.path, "me/run")[1] == "a card by hand"


@pytest.mark.parametrize("name", [WEIGHTS, IMAGE, "config.json"])
def test_the_token_is_found_in_whatever_is_uploaded(name, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    prepare_push(run, "me/run", hub_images="validation")
    if name == WEIGHTS:
        save_file(load_file(run / name), run / name, metadata={"note": "made with hf_secret"})
    elif name == IMAGE:
        information = PngInfo()
        information.add_text("comment", "hf_secret")
        Image.new("RGB", (8, 8)).save(run / name, pnginfo=information)
    else:
        (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), "note": "hf_secret"}))
    with pytest.raises(ValueError, match=rf"{name} holds your access token and would publish it"):
        prepare_push(run, "me/run", hub_images="validation")


@pytest.mark.parametrize("folder", ["", "discriminator/"])
@pytest.mark.parametrize("damage", ["NaN", "cut"])
def test_weights_that_nobody_can_use_are_not_uploaded(damage, folder, run, monkeypatch, caplog):
    file = run / f"{folder}{WEIGHTS}"
    if damage == "NaN":
        tensors = load_file(file)
        tensors["decoder.conv_in.bias"][0] = math.nan
        save_file(tensors, file)
        message = rf"{folder}{WEIGHTS} holds NaN or infinity \(decoder.conv_in.bias\); push an earlier checkpoint"
    else:
        file.write_bytes(file.read_bytes()[:999])
        message = rf"{folder}{WEIGHTS} is not read: it is damaged"
    monkeypatch.setattr(hub, "HfApi", NoHub)
    with pytest.raises(ValueError, match=message):
        prepare_push(run, "me/run")
    assert push_run(run, "me/run") is False and "was asked of the Hub" not in caplog.text
