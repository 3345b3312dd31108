"""Every file that states what something is: one kind of hash for each kind of thing, and the same in all of them."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import eqvae_command
from diffusers_eqvae import AlignmentNetwork, ClassConditionalPipeline, FlowMatchODEScheduler
from diffusers_eqvae.metrics.cifar_resnet import CifarResNet
from diffusers_eqvae.metrics.feature_networks import load_feature_network
from diffusers_eqvae.provenance import autoencoder_identity, weights_hash

SIDE = 16
# What a hash is of, by the name that it has wherever it stands.
AUTOENCODERS = {"autoencoder", "base", "relative_distance.base"}
NETWORKS = {"encoder", "feature_network_weights", "reference_weights", "weights_hash", "transformer"}
IMAGES = {"data_hash", "reference_hash"}
OTHERS = {
    "targets_hash",  # annotations
    "samples_hash",  # the file beside sampling.json
    "options",  # configs, beside the weights
    *("files", "labels", "classes", "sampled"),  # a data set that was not decoded
    *("header", "digest"),  # of a store's shards
}
KINDS = AUTOENCODERS | NETWORKS | IMAGES | OTHERS


@pytest.fixture
def folder(tmp_path, tiny_autoencoder_kl, tiny_sit) -> Path:
    torch.manual_seed(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for index in range(5):
            levels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            image = levels if name == "images" else levels[..., 0] // 128
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    state = {key.removeprefix("features."): value for key, value in CifarResNet(1).state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    save_file(state, tmp_path / "resnet.safetensors")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6).save_pretrained(tmp_path / "network")
    labels = {class_id: f"class {class_id}" for class_id in range(10)}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=labels)
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path


def written(repository: Path, folder: Path) -> dict[str, Any]:
    """What each of the scripts and commands says of the same images and models, by its name."""

    def script(name: str, *flags: str) -> None:
        place = repository / ("pipelines" if name == "sample" else "training") / f"{name}.py"
        runpy.run_path(str(place))["main"]([flag.format(folder) for flag in flags])

    def command(*words: str) -> None:
        assert eqvae_command.main([word.format(folder) for word in words]) == 0

    as_is = ("--resolution", str(SIDE), "--normalization", "config")
    size, images = ("--resolution", str(SIDE)), ("--data_dir", "{}/images")
    networks = [f"cifar_resnet={{}}/resnet.{kind}" for kind in ("pth", "safetensors")]
    common = ("--vae", "{}/vae", *images, *size)
    script(
        "evaluate_autoencoder", *common, "--feature_networks", networks[0], "--output", "{}/evaluate_autoencoder.json"
    )
    perception = ("--images", "{}/images", "--masks", "{}/masks", "--alignment_network", "{}/network", *size)
    alone = ("--num_annotated", "2", "--order", "name", "--output", "{}/evaluate_perception.json")
    script("evaluate_perception", "--vae", "{}/vae", *perception, *alone)
    drawn = ("--class_labels", "1", "--num_samples", "3", "--num_inference_steps", "1")
    script("sample", "--model", "{}/pipeline", "--output_dir", "{}/samples", *drawn)
    against = ("--reference", "{}/images", *size, "--feature_networks", networks[1])
    script("evaluate_generation", "--samples", "{}/samples/samples.npz", *against, "--output", "{}/samples.json")
    script("evaluate_generation", "--samples", "{}/images", *against, "--output", "{}/evaluate_generation.json")
    script("encode_latents", "--vae", "{}/vae", "--train_data_dir", "{}/images", "--output_dir", "{}/store", *as_is)
    command("inspect", *common, "--output_dir", "{}/inspect")
    command("compat", "{}/vae", "{}/vae", *images, *size, "--output", "{}/compat.json")
    files = {path.stem: path for path in folder.glob("*.json")}
    files |= {"inspect": folder / "inspect" / "card.vae.json", "store": folder / "store" / "manifest.json"}
    files |= {"sample": folder / "samples" / "sampling.json"}
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def leaves(value: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, *names, name)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, *names)
    elif isinstance(value, str):
        yield names, value


@pytest.mark.slow
def test_each_thing_has_one_hash_of_one_kind_in_every_file(repository, folder, tiny_autoencoder_kl, tiny_sit):
    files = written(repository, folder)
    cards = {name for name, content in files.items() if "protocol" in content}
    assert cards == {
        "evaluate_autoencoder", "evaluate_perception", "evaluate_generation", "samples", "inspect", "compat",
    }  # fmt: skip
    network, vae = (
        load_feature_network(f"cifar_resnet={folder / 'resnet.pth'}"),
        autoencoder_identity(tiny_autoencoder_kl),
    )
    expected = {
        "transformer": weights_hash(tiny_sit),
        "encoder": vae["encoder"]["float32"],  # of a store's settings
        "weights_hash": weights_hash(AlignmentNetwork.from_pretrained(folder / "network")),
        **dict.fromkeys(("feature_network_weights", "reference_weights"), weights_hash(network.module)),
    }
    of_images, seen = set(), set()
    for file, content in files.items():
        for names, value in leaves(content):
            if not re.search(r"\b[0-9a-f]{16,}\b", value):
                continue
            kind = next((name for name in names if name in KINDS), names[-1])
            seen.add(kind)
            if kind in AUTOENCODERS:
                stated = vae
                for name in names[names.index(kind) + 1 :]:
                    stated = stated[name]
                assert value == stated, (file, names)
            elif kind in NETWORKS:
                assert value == expected[kind], (file, names)
            elif kind in IMAGES and file != "samples":
                of_images.add(value)
            else:
                assert kind in OTHERS | IMAGES, f"{file} states a hash as {'.'.join(names)}"
    assert len(of_images) == 1, "all of them read the same images"
    assert seen >= AUTOENCODERS | set(expected) | IMAGES
    assert {name for name in cards if "hub_commit" in files[name]["provenance"]} == cards - {
        "evaluate_generation", "samples",  # made from images
    }  # fmt: skip
