"""A file outside the package adds a complete member of every kind, used through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_eqvae.extensions import Registry, load_extension, loaded_extensions
from diffusers_eqvae.objectives.base import OBJECTIVES
from diffusers_eqvae.regularizers.base import REGULARIZERS

from .invariants.tiny_latents import write_store

ROOT = Path(__file__).resolve().parents[1]

REGULARIZER = '''
from dataclasses import dataclass, field
from diffusers_eqvae.regularizers.base import AutoencoderRegularizer, GeneratorRegularizer, register_regularizer


@dataclass
class ShrinkArguments:
    shrink_weight: float = field(default=1.0, metadata={"help": "Factor of the penalty."})


@register_regularizer("shrink")
class Shrink(AutoencoderRegularizer):
    """Pulls the raw latents to zero."""

    Arguments = ShrinkArguments

    @classmethod
    def from_arguments(cls, arguments, model):
        regularizer = cls()
        regularizer.weight = arguments.shrink_weight
        return regularizer

    def penalty(self, state, batch, draw):
        return state.raw_latents.square().mean()


@register_regularizer("direction")
class Direction(GeneratorRegularizer):
    """1 - cosine of prediction and target."""

    weight = 0.5

    def draw(self, size, randomness):
        return True

    def penalty(self, state, batch, draw):
        import torch
        return 1 - torch.cosine_similarity(state.prediction.flatten(1), state.target.flatten(1)).mean()
'''

GENERATOR = '''
from collections.abc import Mapping
from dataclasses import dataclass, field
import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from diffusers_eqvae.models.backbone import Backbone, BackboneOutput, register_backbone
from diffusers_eqvae.objectives.base import Objective, register_objective, tie_idle
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler


@register_backbone
class LinearTransformer2DModel(Backbone):
    """A convolution, an offset per class and the time."""

    PRESETS = {"Linear-S": {"objective": "absolute_flow", "prediction_type": "flow_prediction", "width": 4}}

    @register_to_config
    def __init__(self, sample_size=4, in_channels=4, num_classes=3, class_dropout_prob=0.1, width=4,
                 objective="absolute_flow", prediction_type="flow_prediction", autoencoder=None):
        super().__init__()
        self.hidden_size, self.num_layers, self.token_grid = width, 1, (sample_size, sample_size)
        self.into, self.out = nn.Conv2d(in_channels, width, 1), nn.Conv2d(width, in_channels, 1)
        self.classes = nn.Embedding(num_classes + 1, width)

    def forward(self, hidden_states, timestep, class_labels, *, drop_labels=None, hidden_layers=(), return_dict=True):
        if drop_labels is not None:
            class_labels = class_labels.masked_fill(drop_labels, self.null_class)
        hidden = self.into(hidden_states) + self.classes(class_labels)[..., None, None]
        sample = self.out(torch.tanh(hidden))
        return BackboneOutput(sample=sample, hidden_states={}) if return_dict else (sample, {})


@dataclass
class AbsoluteFlowArguments:
    absolute_flow_power: float = field(default=1.0, metadata={"help": "Power of the error."})


@register_objective("absolute_flow")
class AbsoluteFlow(Objective):
    """Mean absolute error of the velocity on the linear path."""

    Arguments = AbsoluteFlowArguments
    reads = "latents"
    prediction_types = ("flow_prediction",)

    def __init__(self, model, regularizers=None, *, arguments=None):
        super().__init__(model, regularizers)
        self.arguments = arguments or AbsoluteFlowArguments()

    def draw(self, batch, randomness):
        latents = batch["latents"]
        return {"noise": randomness.randn(latents.shape), "sigmas": randomness.rand((len(latents),))}

    def forward(self, batch, draw):
        latents, noise, sigma = batch["latents"], draw["noise"], draw["sigmas"].view(-1, 1, 1, 1)
        output = self.model((1 - sigma) * latents + sigma * noise, 1000 * draw["sigmas"], batch["class_labels"])
        terms = {"error": (output.sample - (noise - latents)).abs().pow(self.arguments.absolute_flow_power).mean()}
        return {"terms": terms, "idle": tie_idle(self, terms.values())}

    def scheduler(self):
        return FlowMatchODEScheduler()
'''


def run(script: str, *words: object, expect: int = 0) -> str:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture
def images(tmp_path):
    for index in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(30 * index).resize((40, 40)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


def test_an_autoencoder_regularizer(tmp_path, images, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    (tmp_path / "shrinking.py").write_text(REGULARIZER)
    options = ["--pretrained_model_name_or_path", tmp_path / "vae", "--train_data_dir", images]
    options += ["--resolution", 32, "--train_batch_size", 2, "--max_train_steps", 1, "--report_to", "none"]
    options += ["--perceptual_weight", 0, "--disc_weight", 0, "--validation_steps", 0, "--logging_steps", 1]
    options += ["--output_dir", tmp_path / "run", "--extension", tmp_path / "shrinking.py"]
    run("training/train_autoencoder.py", *options, "--regularizers", "shrink", "--shrink_weight", 2.5)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["shrink_weight"] == 2.5 and line["loss/shrink"] > 0
    marker = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/complete.json")).read_text())
    assert list(marker["extensions"]) == ["diffusers_eqvae.extensions.shrinking"]
    # What the run saved as a preset runs no code: it repeats the run only with the extension given again.
    assert "extension" not in (tmp_path / "run" / "resolved_arguments.yaml").read_text()


def test_a_backbone_with_an_objective_and_a_generator_regularizer(tmp_path, tiny_autoencoder_kl):
    store = write_store(tmp_path / "store", tiny_autoencoder_kl)
    (tmp_path / "linear.py").write_text(GENERATOR)
    (tmp_path / "shrinking.py").write_text(REGULARIZER)
    extension = ["--extension", tmp_path / "linear.py"]
    options = ["--model", "Linear-S", "--latents_dir", store, "--output_dir", tmp_path / "run", "--report_to", "none"]
    options += ["--train_batch_size", 4, "--max_train_steps", 2, "--validation_steps", 0, "--learning_rate", 0.01]
    options += ["--absolute_flow_power", 1.5, *extension]
    run("training/train_transformer.py", *options)
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "LinearTransformer2DModel" and config["objective"] == "absolute_flow"
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_eqvae", "LinearTransformer2DModel"]
    samples = ["--model", tmp_path / "run", "--num_samples", 2, "--batch_size", 2, "--num_inference_steps", 2]
    run("pipelines/sample.py", *samples, "--output_dir", tmp_path / "samples", *extension)
    assert (tmp_path / "samples" / "samples.npz").is_file()
    told = run("pipelines/sample.py", *samples, "--output_dir", tmp_path / "others", expect=2)
    assert "LinearTransformer2DModel" in told and "--extension" in told
    # The objective trains a model of the package as well, and the regularizer too:
    tiny = {"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    (tmp_path / "tiny.json").write_text(json.dumps({"_class_name": "SiTTransformer2DModel", **tiny}))
    options = ["--model", tmp_path / "tiny.json", "--latents_dir", store, "--output_dir", tmp_path / "sit"]
    options += ["--train_batch_size", 4, "--max_train_steps", 1, "--validation_steps", 0, "--report_to", "none"]
    options += ["--logging_steps", 1, "--regularizers", "direction", "--extension", tmp_path / "shrinking.py"]
    other = [*options, "--objective", "absolute_flow", "--regularizers", "none", "--output_dir", tmp_path / "absolute"]
    run("training/train_transformer.py", *other, *extension)
    config = json.loads((tmp_path / "absolute" / "transformer" / "config.json").read_text())
    assert (config["_class_name"], config["objective"]) == ("SiTTransformer2DModel", "absolute_flow")
    run("training/train_transformer.py", *options)
    line = json.loads((tmp_path / "sit" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["loss/flow"] + 0.5 * line["loss/direction"])


def test_each_product_takes_its_own_regularizers(tmp_path):
    (tmp_path / "shrinking.py").write_text(REGULARIZER)
    options = ["--latents_dir", tmp_path, "--output_dir", tmp_path / "run", "--regularizers", "shrink"]
    told = run("training/train_transformer.py", *options, "--extension", tmp_path / "shrinking.py", expect=2)
    assert "The regularizer shrink does not fit here; --regularizers takes contrastive_flow" in told


def test_a_preset_never_runs_code(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "preset.yaml").write_text(f"extension: {tmp_path / 'evil.py'}\n")
    told = run("training/train_transformer.py", tmp_path / "preset.yaml", "--output_dir", tmp_path / "run", expect=2)
    assert "code is loaded from the command line only" in told and not (tmp_path / "ran").exists()


def test_options_of_a_method_that_was_not_chosen_name_it(tmp_path):
    options = ["--output_dir", tmp_path / "run", "--regularizers", "none", "--tau_scale", "uniform"]
    told = run("training/train_autoencoder.py", *options, expect=2)
    assert "--tau_scale belongs to the regularizer equivariance, which --regularizers does not choose" in told


def test_help_shows_the_options_of_what_was_chosen():
    told = run("training/train_autoencoder.py", "--regularizers", "alignment", "--help")
    assert "--alignment_teacher" in told and "--tau_scale" not in told
    assert "Other choices of --regularizers: " in told and "equivariance" in told
    assert "--train-data-dir" not in told  # each option under one name


@pytest.fixture
def clean_registries():
    """Forgets the members that extensions brought; the package's own, once imported, cannot be registered again."""
    modules = set(sys.modules)
    yield
    for registry in (REGULARIZERS, OBJECTIVES):
        for name, member in dict(registry._members).items():
            if not member.__module__.startswith(f"{registry.package}."):
                del registry._members[name]
    for name in set(sys.modules) - modules:
        if name.startswith("diffusers_eqvae.extensions."):
            del sys.modules[name]


@pytest.mark.usefixtures("clean_registries")
def test_taken_names_and_options_name_both_owners(tmp_path):
    (tmp_path / "copycat.py").write_text(REGULARIZER.replace('"shrink"', '"equivariance"', 1))
    with pytest.raises(ValueError, match=r"extensions\.copycat cannot be registered: diffusers_eqvae\.regularizers\."):
        load_extension(tmp_path / "copycat.py")
    (tmp_path / "prefixless.py").write_text(REGULARIZER.replace("shrink_weight", "weight_of_it"))
    with pytest.raises(ValueError, match="'weight_of_it' of the regularizer 'shrink' must begin with shrink_"):
        load_extension(tmp_path / "prefixless.py")
    taken = REGULARIZER.replace("shrink_weight", "tau_scale").replace(
        "    Arguments = ShrinkArguments", "    Arguments = ShrinkArguments\n    prefixes = ('tau_',)"
    )
    (tmp_path / "taken.py").write_text(taken)
    owners = r"'tau_scale' of the regularizer 'shrink'.*belongs to the regularizer 'equivariance'"
    with pytest.raises(ValueError, match=owners):
        load_extension(tmp_path / "taken.py")


@pytest.mark.usefixtures("clean_registries")
def test_a_file_is_loaded_once_and_known_by_its_hash(tmp_path):
    (tmp_path / "mine.py").write_text("count = 0\n")
    first = load_extension(tmp_path / "mine.py")
    module = sys.modules["diffusers_eqvae.extensions.mine"]
    module.count = 7
    assert load_extension(tmp_path / "mine.py") == first and module.count == 7
    assert loaded_extensions()[first.module] == first.sha256
    (tmp_path / "mine.py").write_text("count = 1\n")
    with pytest.raises(ValueError, match="An extension called mine is loaded already"):
        load_extension(tmp_path / "mine.py")
    with pytest.raises(ValueError, match=r"absent\.py does not exist"):
        load_extension(tmp_path / "absent.py")
    with pytest.raises(ValueError, match="neither a Python file here nor a module"):
        load_extension("no_such_module_here")
    (tmp_path / "needy.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match=r"needy\.py needs no_such_package, which is not installed"):
        load_extension(tmp_path / "needy.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must end in \.py"):
        load_extension(tmp_path / "notes.txt")
    (tmp_path / "broken.py").write_text("raise KeyError('mine')")
    with pytest.raises(KeyError):
        load_extension(tmp_path / "broken.py")
    assert "diffusers_eqvae.extensions.broken" not in sys.modules


def test_a_room_lists_its_folder_without_importing_it():
    code = """
import sys
from diffusers_eqvae.objectives.base import OBJECTIVES
assert {"autoencoder", "flow_matching"} <= set(OBJECTIVES.names()), OBJECTIVES.names()
assert "diffusers_eqvae.objectives.flow_matching" not in sys.modules
assert OBJECTIVES["flow_matching"].__name__ == "FlowMatchingObjective"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with pytest.raises(
        ValueError, match="There is no objective 'flow'; there are autoencoder, denoising, flow_matching"
    ):
        OBJECTIVES["flow"]


def test_members_of_the_package_are_called_as_their_files():
    for registry in (REGULARIZERS, OBJECTIVES):
        assert isinstance(registry, Registry)
        for name in registry._own_names():
            assert registry[name].__module__ == f"{registry.package}.{name}"
