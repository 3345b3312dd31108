"""What the installed diffusers does with this package's classes: saved names, loading, fresh processes."""

import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_eqvae
from diffusers_eqvae import load_autoencoder, load_pipeline
from diffusers_eqvae._registration import BASE_CLASSES, _classes, register
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

GOLDEN_INDEX = {
    "_class_name": "ClassConditionalPipeline",
    "_diffusers_version": diffusers.__version__,
    "id2label": {"0": "tench, Tinca tinca", "1": ["otter", "river otter"]},
    "scheduler": ["diffusers_eqvae", "FlowMatchODEScheduler"],
    "transformer": ["diffusers_eqvae", "SiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "alignment_network": [None, None],
}
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
FRESH_PROCESS = """
import sys
{prelude}
import numpy as np, torch, diffusers
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
# What any model, scheduler and pipeline of diffusers needs is loaded now; the package must add none of these.
heavy = {{"accelerate", "datasets", "gradio", "lpips", "peft", "tensorboard", "torchvision", "transformers", "yaml"}}
before = heavy & set(sys.modules)
import diffusers_eqvae
assert heavy & set(sys.modules) == before, heavy & set(sys.modules) - before
torch.set_num_threads(1)
directory, result = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(directory)
assert type(pipeline) is diffusers_eqvae.ClassConditionalPipeline, type(pipeline)
transformer = AutoModel.from_pretrained(directory, subfolder="transformer")
assert type(transformer) is diffusers_eqvae.SiTTransformer2DModel, type(transformer)
images = pipeline("otter", generator=torch.Generator().manual_seed(3), num_inference_steps=3, guidance_scale=2.0,
                  output_type="np").images
np.save(result, images)
"""
BLOCK_TORCHVISION = """
import importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("torchvision") else found(name, package)
"""


@pytest.fixture
def pipeline(tiny_sit, tiny_autoencoder_kl):
    labels = {0: "tench, Tinca tinca", 1: ("otter", "river otter")}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=labels)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, label="otter"):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(label, generator=torch.Generator().manual_seed(3), **SAMPLING).images


def run_python(code, *arguments):
    finished = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_model_index_is_golden(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text()) == GOLDEN_INDEX


def test_round_trip_is_bit_equal_for_the_subclass_and_the_base_class(pipeline, tmp_path):
    expected = sample(pipeline)
    pipeline.save_pretrained(tmp_path / "once")
    for loader in (ClassConditionalPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path / "once")
        assert type(loaded) is ClassConditionalPipeline and type(loaded.scheduler) is FlowMatchODEScheduler
        assert (
            loaded.id2label
            == pipeline.id2label
            == {0: ("tench, Tinca tinca", "tench", "Tinca tinca"), 1: ("otter", "river otter")}
        )
        assert np.array_equal(sample(loaded), expected) and np.array_equal(sample(loaded, "River Otter"), expected)
    loaded.save_pretrained(tmp_path / "twice")
    index = json.loads((tmp_path / "twice" / "model_index.json").read_text())
    assert {key: value for key, value in index.items() if key != "_name_or_path"} == GOLDEN_INDEX


def test_an_alignment_network_is_an_optional_component(pipeline, tmp_path):
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
    network.norm_weight.copy_(torch.arange(1.0, 7.0))
    pipeline.register_modules(alignment_network=network)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {**GOLDEN_INDEX, "alignment_network": ["diffusers_eqvae", "AlignmentNetwork"]}
    loaded = DiffusionPipeline.from_pretrained(tmp_path).alignment_network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())
    alien = AlignmentNetwork(latent_channels=16, hidden_size=8, feature_size=6)
    with pytest.raises(ValueError, match="reads 16 latent channels, but the AutoencoderKL has 4"):
        ClassConditionalPipeline(
            pipeline.transformer, pipeline.vae, pipeline.scheduler, id2label=None, alignment_network=alien
        )


def test_auto_model_loads_components(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    from_pipeline = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    alone = AutoModel.from_pretrained(str(tmp_path / "transformer"))
    assert type(from_pipeline) is type(alone) is type(pipeline.transformer)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(from_pipeline.state_dict()[name], value), name


def test_an_autoencoder_of_ours_is_saved_as_ours_where_plain_diffusers_has_no_such(pipeline, tmp_path):
    pipeline.vae = AutoencoderKLEQ.from_config(pipeline.vae.config, padding_mode="reflect").eval()
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers_eqvae", "AutoencoderKLEQ"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is AutoencoderKLEQ and np.array_equal(sample(loaded), sample(pipeline))


def test_components_may_be_passed_to_from_pretrained(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, transformer=pipeline.transformer)
    assert loaded.transformer is pipeline.transformer


@pytest.mark.parametrize("prelude", ["", BLOCK_TORCHVISION], ids=["plain", "without torchvision"])
def test_a_fresh_process_loads_it_lightly_and_draws_the_same_image(pipeline, tmp_path, prelude):
    pipeline.save_pretrained(tmp_path / "pipeline")
    run_python(FRESH_PROCESS.format(prelude=prelude), tmp_path / "pipeline", tmp_path / "images.npy")
    assert np.array_equal(np.load(tmp_path / "images.npy"), sample(pipeline))


def test_registering_adds_names_and_replaces_none():
    entry = LOADABLE_CLASSES["diffusers_eqvae"]
    assert entry == {name: LOADABLE_CLASSES["diffusers"][name] for name in entry}
    assert set(entry) == {"BaseGuidance", "DiffusionPipeline", "ModelMixin", "SchedulerMixin"}
    assert all(getattr(diffusers_eqvae, base.__name__) is getattr(diffusers, base.__name__) for base in BASE_CLASSES)
    assert diffusers.SiTTransformer2DModel is diffusers_eqvae.SiTTransformer2DModel


def test_a_name_that_diffusers_defines_is_left_alone(caplog):
    impostor = type("AutoencoderDC", (), {"__module__": "diffusers_eqvae.models.impostor"})
    original = diffusers.AutoencoderDC
    try:
        register([impostor])
        assert diffusers.AutoencoderDC is original and diffusers_eqvae.AutoencoderDC is impostor
        assert "AutoencoderDC" in caplog.text
    finally:
        del diffusers_eqvae.AutoencoderDC


def test_a_name_that_another_class_has_is_refused():
    impostor = type("SiTTransformer2DModel", (), {"__module__": "diffusers_eqvae.extensions.mine"})
    with pytest.raises(
        ValueError, match=r"extensions\.mine cannot be registered: diffusers_eqvae\.models\.transformer_sit"
    ):
        register([impostor])
    assert diffusers.SiTTransformer2DModel is diffusers_eqvae.SiTTransformer2DModel is not impostor
    register([diffusers_eqvae.SiTTransformer2DModel])


ROOM = """
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

class Base(ModelMixin, ConfigMixin):
    pass

class Model(Base):
    @register_to_config
    def __init__(self, size=1):
        super().__init__()

class Derived(Model):
    pass

class Scheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        pass

class Pipeline(DiffusionPipeline):
    def __init__(self):
        super().__init__()
"""


def test_a_folder_gives_the_classes_that_a_saved_file_may_name(tmp_path, monkeypatch):
    (tmp_path / "a_room").mkdir()
    for name in ("__init__", "scheduling_and_more", "_private", "other"):
        (tmp_path / "a_room" / f"{name}.py").write_text("" if name == "__init__" else ROOM)
    monkeypatch.syspath_prepend(tmp_path)
    found = [f"{cls.__module__}.{cls.__name__}" for cls in _classes("a_room", "scheduling_")]
    assert found == [f"a_room.scheduling_and_more.{name}" for name in ("Model", "Derived", "Scheduler", "Pipeline")]
    assert len(list(_classes("a_room", ""))) == 8


EXTENSION = """
import diffusers_eqvae
from diffusers_eqvae._registration import register


class MyTransformer2DModel(diffusers_eqvae.SiTTransformer2DModel):
    pass


register([MyTransformer2DModel])
"""
LOADS = """
import sys
import diffusers_eqvae, diffusers
if len(sys.argv) > 2:
    diffusers_eqvae.load_extension(sys.argv[2])
pipeline = diffusers_eqvae.load_pipeline(sys.argv[1])
plain = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline.transformer) is type(plain.transformer) is diffusers_eqvae.MyTransformer2DModel
assert type(diffusers.AutoModel.from_pretrained(sys.argv[1] + "/transformer")) is diffusers.MyTransformer2DModel
"""


def test_a_class_of_an_extension_is_saved_under_the_package_and_asked_for_where_it_is_not_loaded(pipeline, tmp_path):
    extension = tmp_path / "my_transformer.py"
    extension.write_text(EXTENSION)
    diffusers_eqvae.load_extension(extension)
    try:
        pipeline.transformer = diffusers_eqvae.MyTransformer2DModel.from_config(pipeline.transformer.config)
        pipeline.save_pretrained(tmp_path / "pipe")
    finally:
        del diffusers_eqvae.MyTransformer2DModel, diffusers.MyTransformer2DModel
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_eqvae", "MyTransformer2DModel"]
    run_python(LOADS, tmp_path / "pipe", extension)
    with pytest.raises(
        ValueError, match=r"pipe needs the class MyTransformer2DModel, .* loaded: --extension FILE, or"
    ):
        load_pipeline(str(tmp_path / "pipe"))


def test_an_unknown_class_is_asked_for_by_name(tiny_autoencoder_kl, tmp_path):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"_class_name": "MyAutoencoder"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="needs the class MyAutoencoder, which neither diffusers nor diffusers_eqvae has"
    ):
        load_autoencoder(str(tmp_path))
    with pytest.raises(AttributeError, match=r"no attribute 'MyAutoencoder'\. A class of your own .*load_extension"):
        diffusers_eqvae.MyAutoencoder  # noqa: B018
    with pytest.raises(AttributeError) as error:
        diffusers_eqvae.my_function  # noqa: B018
    assert "load_extension" not in str(error.value)


def test_every_registered_class_is_public():
    ours = [
        cls
        for cls in vars(diffusers).values()
        if isinstance(cls, type) and cls.__module__.startswith("diffusers_eqvae")
    ]
    assert ours and all(getattr(diffusers_eqvae, cls.__name__) is cls for cls in ours)
