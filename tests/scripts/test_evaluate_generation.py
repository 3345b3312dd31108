"""training/evaluate_generation.py through its command line, with a small network of random weights."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import eqvae_command
from diffusers_eqvae.images import UINT8_RULE
from diffusers_eqvae.metrics.cifar_resnet import CifarResNet
from diffusers_eqvae.metrics.image_sets import ImageSet
from diffusers_eqvae.metrics.result_card import PROTOCOLS, SETTINGS, ResultCard
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity, weights_hash
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

NUMBERS = {f"{name}_squeezenet1_1" for name in ("fd", "kd", "kd_std", "precision", "recall")}


def images_uint8(count, seed):
    low = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return low.repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Weights, samples.npz and a folder of reference images."""
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet.pth")
    np.savez(folder / "samples.npz", images_uint8(9, 0))
    (folder / "images").mkdir()
    for index, each in enumerate(images_uint8(8, 1)):
        Image.fromarray(each).save(folder / "images" / f"{index}.png")
    return folder


@pytest.fixture
def script(repository):
    spec = importlib.util.spec_from_file_location("evaluate", repository / "training" / "evaluate_generation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["evaluate"]
    AcceleratorState._reset_state(reset_partial_state=True)


def words(material, **changes):
    flags = {
        "samples": material / "samples.npz",
        "reference": material / "images",
        "feature_networks": f"squeezenet={material / 'squeezenet.pth'}",
        **changes,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_npz_against_a_folder_and_saved_statistics(script, material, tmp_path, capsys):
    (tmp_path / "sampling.json").write_text(
        json.dumps(
            {
                "settings": {"seed": 3, "label_policy": "random", "guidance_scale": 1.8},
                "nfe": 87.0,
                "uint8_rule": UINT8_RULE,
            }
        )
    )
    np.savez(tmp_path / "samples.npz", images_uint8(9, 0))
    options = {"samples": tmp_path / "samples.npz", "save_reference": tmp_path / "statistics.npz"}
    card = script.main(words(material, batch_size=4, **options))
    path = tmp_path / "samples.squeezenet.json"
    assert ResultCard.load(path) == card and set(card.metrics) == NUMBERS
    assert set(card.protocol) == set(PROTOCOLS["generation"]) and None not in card.protocol.values()
    assert set(card.settings) <= set(SETTINGS) and card.settings["guidance_scale"] == 1.8
    assert card.protocol["num_samples"] == 9 and "9 samples for 512" in card.caveats["fd_squeezenet1_1"]
    assert card.provenance["reference"] == "images"

    again = words(
        material,
        samples=tmp_path / "samples.npz",
        reference=tmp_path / "statistics.npz",
        batch_size=9,
        output=tmp_path / "again.json",
    )
    repeated = script.main(again)
    assert repeated.metrics == pytest.approx(card.metrics, rel=1e-4, abs=1e-9)
    assert repeated.protocol == card.protocol
    assert eqvae_command.main(["compare", str(path), str(tmp_path / "again.json")]) == 0
    assert "fd_squeezenet1_1" in capsys.readouterr().out


def test_a_pipeline_is_sampled_in_memory(script, material, tiny_sit, tiny_autoencoder_kl, tmp_path):
    id2label = {class_id: f"class {class_id}" for class_id in range(10)}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=id2label)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "resolved_arguments.json").write_text('{"use_ema": true}')
    options = {"samples": tmp_path / "model", "num_samples": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    options["resolution"] = 16  # what the pipeline draws
    card = script.main(words(material, batch_size=2, label_policy="balanced", guided_channels=3, **options))
    assert (tmp_path / "model.squeezenet.json").is_file() and set(card.metrics) == NUMBERS
    assert card.protocol["label_policy"] == "balanced" and card.protocol["num_samples"] == 5
    assert card.settings["nfe"] == 4 and card.settings["dtype"] == "float32"
    assert (
        card.settings["guided_channels"] == 3
        and card.settings["ema"] is True
        and card.protocol["uint8_rule"] == UINT8_RULE
    )
    assert card.settings["autoencoder"] == autoencoder_identity(tiny_autoencoder_kl)
    assert card.settings["transformer"] == weights_hash(tiny_sit)
    assert not any("unique" in caveat for caveat in card.caveats.values())
    everywhere = script.main(words(material, batch_size=2, label_policy="balanced", **options))
    assert everywhere.provenance["data_hash"] != card.provenance["data_hash"]
    next(pipeline.transformer.parameters()).data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"holds weights that are NaN or infinite .*download it again"):
        script.main(words(material, **{**options, "samples": tmp_path / "broken"}))
    with pytest.raises(ValueError, match="needs --num_samples"):
        script.main(words(material, samples=tmp_path / "model"))


def test_a_pipeline_of_other_classes_than_the_reference_is_refused_and_cards_state_both(
    script, material, tiny_sit, tiny_autoencoder_kl, tmp_path
):
    id2label = {class_id: f"class {class_id}" for class_id in range(10)}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=id2label)
    pipeline.save_pretrained(tmp_path / "model")
    reference = tmp_path / "images"
    for index, each in enumerate(images_uint8(4, 1)):
        (reference / f"class {index}").mkdir(parents=True)
        Image.fromarray(each).save(reference / f"class {index}" / "0.png")
    options = {"samples": tmp_path / "model", "num_samples": 3, "num_inference_steps": 1, "resolution": 16}
    options |= {"reference": reference, "label_policy": "balanced", "output": tmp_path / "card.json"}
    card = script.main(words(material, **options))
    assert card.provenance["reference_classes"] == {f"class {index}": 1 for index in range(4)}
    assert list(card.provenance["classes"].values()) == [1, 1, 1, *[0] * 7]
    with pytest.raises(ValueError, match=r"reference images are others: 1 of 5 here .*: class 4\. Take"):
        script.main(words(material, **options | {"num_samples": 5, "output": tmp_path / "other.json"}))


def test_a_foreign_pipeline_is_refused(script, material, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    DDPMPipeline(UNet2DModel(sample_size=8, norm_num_groups=4, **blocks), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DDPMPipeline, and only a ClassConditionalPipeline"):
        script.main(words(material, samples=tmp_path, num_samples=2, output=tmp_path / "card.json"))


def test_outputs_are_tried_before_anything_is_computed(script, material, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_feature_network", None)
        for flag in ("output", "save_reference"):
            options = {"output": tmp_path / "card.json", flag: tmp_path / "file" / "deep" / "written"}
            with pytest.raises(ValueError, match="written cannot be written"):
                script.main(words(material, **options))
    # The card comes first: it is what the work was for, and a reference can be computed again.
    options = {"output": tmp_path / "new" / "card.json", "save_reference": tmp_path / "other" / "reference.npz"}
    script.main(words(material, **options))
    assert options["output"].is_file() and options["save_reference"].is_file()
    monkeypatch.setattr("diffusers_eqvae.metrics.generation.Reference.save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(words(material, output=tmp_path / "first.json", save_reference=tmp_path / "second.npz"))
    assert (tmp_path / "first.json").is_file()


def test_flags_without_effect_are_named(script, material, tmp_path, caplog):
    script.main(words(material, output=tmp_path / "card.json", seed=3, guidance_scale=2.0))
    assert "Without effect, since the samples exist already: --seed, --guidance_scale." in caplog.text


def test_of_a_foreign_npz_no_rule_is_claimed(script, material, tmp_path):
    np.savez(tmp_path / "theirs.npz", images_uint8(9, 0))
    card = script.main(words(material, samples=tmp_path / "theirs.npz"))
    assert card.protocol["uint8_rule"] is None and card.protocol["label_policy"] is None and not card.settings


def test_a_dataset_as_reference_needs_a_size(script, material, tmp_path):
    options = {"reference_split": "train", "output": tmp_path / "card.json"}
    card = script.main(words(material, resolution=32, **options))
    folder = script.main(words(material, output=tmp_path / "folder.json"))
    # The images have 32 px already, so that the crop leaves them alone.
    assert card.protocol["reference_hash"] == folder.protocol["reference_hash"]
    with pytest.raises(ValueError, match="needs a resolution"):
        script.main(words(material, **options))


def test_a_reference_that_does_not_exist_is_named(script, material):
    with pytest.raises(
        ValueError, match=r"owner/images is neither a file nor a folder; a dataset needs --reference_split"
    ):
        script.main(words(material, reference="owner/images"))


@pytest.mark.parametrize("name", ["inception", "squeezenet", "cifar_resnet", "dinov2"])
def test_missing_weights_are_named(script, material, name, tmp_path):
    remedy = r"weights at .*absent\.pth.*hf download" if name == "dinov2" else rf"absent\.pth does not exist.*{name}=F"
    with pytest.raises(FileNotFoundError, match=remedy):
        script.main(words(material, feature_networks=f"{name}={tmp_path / 'absent.pth'}"))


def test_several_networks_measure_in_one_pass(script, material, tmp_path, monkeypatch):
    """A card for each, equal to that of a run of its own; the images are read once."""
    torch.manual_seed(0)
    state = {key.removeprefix("features."): value for key, value in CifarResNet(1).state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    np.savez(tmp_path / "samples.npz", images_uint8(9, 0))
    read, real = [], ImageSet.read

    def counted(self, index):
        read.append((self.name, index))
        return real(self, index)

    monkeypatch.setattr(ImageSet, "read", counted)
    networks = [f"squeezenet={material / 'squeezenet.pth'}", f"cifar_resnet={tmp_path / 'resnet.pth'}"]
    common = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(material / "images")]
    first, second = script.main([*common, "--feature_networks", *networks])
    assert [name for name, _ in read].count("samples.npz") == 1
    for card, network, name in ((first, networks[0], "squeezenet"), (second, networks[1], "cifar_resnet")):
        assert ResultCard.load(tmp_path / f"samples.{name}.json") == card
        alone = script.main([*common, "--feature_networks", network, "--output", str(tmp_path / "alone.json")])
        assert (alone.metrics, alone.protocol, alone.caveats) == (card.metrics, card.protocol, card.caveats)
    with pytest.raises(ValueError, match=r"squeezenet\.json would be written twice"):
        script.main([*common, "--feature_networks", "squeezenet=a", "squeezenet=b"])
    with pytest.raises(ValueError, match="leave --output and --save_reference out"):
        script.main([*common, "--feature_networks", *networks, "--output", str(tmp_path / "card.json")])


def test_metrics_are_chosen_by_name(script, material, tmp_path):
    card = script.main(words(material, metrics="kid", output=tmp_path / "card.json"))
    assert set(card.metrics) == {"kd_squeezenet1_1", "kd_std_squeezenet1_1"}
    with pytest.raises(ValueError, match=r"The metric psnr does not fit here; --metrics takes fid, .*kid"):
        script.main(words(material, metrics="psnr", output=tmp_path / "card.json"))
    with pytest.raises(ValueError, match="--reference is missing"):
        script.main(["--samples", str(material / "samples.npz")])


def test_a_metric_from_a_file_of_ones_own_needs_no_network(script, material, tmp_path):
    file = tmp_path / "brightness_metric.py"
    file.write_text(
        "from diffusers_eqvae.metrics.base import PerImageMetric, register_metric\n\n\n"
        '@register_metric("brightness")\n'
        "class Brightness(PerImageMetric):\n"
        '    needs = frozenset({"images"})\n\n'
        "    def rows(self, batch):\n"
        '        return {"brightness": batch["images"].mean((1, 2, 3))}\n'
    )
    np.savez(tmp_path / "samples.npz", images_uint8(9, 0))
    card = script.main(
        ["--samples", str(tmp_path / "samples.npz"), "--extension", str(file), "--metrics", "brightness"]
    )
    expected = images_uint8(9, 0) / 127.5 - 1
    assert card.metrics == {"brightness": pytest.approx(expected.mean(), abs=1e-6)}
    assert card.errors["brightness"] == pytest.approx(expected.mean((1, 2, 3)).std(ddof=1) / 3, rel=1e-5)
    assert ResultCard.load(tmp_path / "samples.metrics.json") == card
    assert card.provenance["extensions"]["diffusers_eqvae.extensions.brightness_metric"]
