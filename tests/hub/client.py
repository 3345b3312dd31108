"""A Hub client in a process of its own (huggingface_hub reads HF_ENDPOINT when it is imported), and its actions.

Libraries are imported by the function that needs them, so that a function can show what works without the others.
"""

import hashlib
import importlib
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


class HubClient:
    """`client(function, ...)` calls a function of this module there; `log` holds what the package logged meanwhile."""

    def __init__(self, endpoint, home, **environment):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.log_file = home / f"log-{len(list(home.iterdir()))}.txt"
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment = {"HF_HUB_OFFLINE": "0", **environment}
        setup = (environment, self.log_file)
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_set_up, initargs=setup)
        self.log = []

    def __call__(self, function, *args, **kwargs):
        start = self.log_file.stat().st_size if self.log_file.exists() else 0
        result = self.pool.submit(function, *args, **kwargs).result()
        lines = self.log_file.read_bytes()[start:].decode().splitlines()
        self.log = [line.partition(": ")[2] for line in lines if line.startswith("diffusers_eqvae.")]
        self.log = [line for line in self.log if not line.startswith("The card shows")]
        return result


def _set_up(environment, log_file):
    os.environ.update(environment)
    logging.basicConfig(level=logging.DEBUG, filename=log_file, format="%(name)s: %(message)s")


def preload(*modules):
    for module in modules:
        importlib.import_module(module)


def push(*args, token=None, **kwargs):
    from diffusers_eqvae.hub import push_run

    os.environ["HF_TOKEN"] = token or os.environ["HF_TOKEN"]
    return push_run(*args, **kwargs)


def push_on_the_way(directory, repo_id, output_dir):
    """What `TrainingRun.push_meanwhile` does, and waits for it."""
    import shutil

    from diffusers_eqvae.training_utils.arguments import RunArguments
    from diffusers_eqvae.training_utils.uploads import Uploads

    output_dir.mkdir(exist_ok=True)
    (output_dir / "metrics.jsonl").write_text('{"step": 7}\n')
    options = {
        "push_to_hub": True,
        "push_every": 7,
        "hub_model_id": repo_id,
        "hub_private": True,
        "hub_revision": "way",
    }
    uploads = Uploads(output_dir, RunArguments(output_dir=str(output_dir), **options))
    uploads.start(7, lambda target: shutil.copytree(directory, target, dirs_exist_ok=True) and None)
    uploads._running.join()


def push_command(*argv):
    from diffusers_eqvae.commands.push import main

    return main(argv)


def push_with_diffusers(directory, name, repo_id):
    """`push_to_hub`, which diffusers gives to every model and pipeline."""
    import diffusers_eqvae

    getattr(diffusers_eqvae, name).from_pretrained(directory).push_to_hub(repo_id)


def load_autoencoder(source, revision=None):
    """Plain diffusers, without this package; the digest of the weights and the normalisation in the config."""
    from diffusers import AutoencoderKL

    without_package = "diffusers_eqvae" not in sys.modules
    vae = AutoencoderKL.from_pretrained(source, revision=revision)
    return {"weights": digest(vae), "latents_mean": vae.config.latents_mean, "without_package": without_package}


def load_autoencoder_of_pipeline(source):
    """This package's own loading, which finds a pipeline's autoencoder by itself."""
    from diffusers_eqvae.autoencoders import load_autoencoder

    return digest(load_autoencoder(source))


def load_pipeline(source):
    import torch
    from diffusers import DiffusionPipeline

    import diffusers_eqvae  # noqa: F401

    pipeline = DiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline("otter", generator=generator, num_inference_steps=2, output_type="np").images
    names = {name: type(part).__name__ for name, part in pipeline.components.items() if hasattr(part, "config")}
    pixels = hashlib.sha256(images.tobytes()).hexdigest()
    return {"names": names, "weights": digest(pipeline.transformer), "pixels": pixels}


def load_alignment_network_of_pipeline(source):
    from diffusers import DiffusionPipeline

    import diffusers_eqvae  # noqa: F401

    return digest(DiffusionPipeline.from_pretrained(source).alignment_network)


def find_alignment_network(source):
    from diffusers_eqvae import AlignmentNetwork

    network = AlignmentNetwork.find(source)
    return None if network is None else digest(network)


def digest(module):
    """sha256 over the names and the bytes of a module's parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def load_pipeline_with_its_own_code(source, revision=None):
    """By trust_remote_code, in a process that cannot import this package; the same figures as `load_pipeline`."""
    import torch
    from diffusers import AutoModel, DiffusionPipeline

    sys.modules["diffusers_eqvae"] = None
    pipeline = DiffusionPipeline.from_pretrained(source, revision=revision, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline("otter", generator=generator, num_inference_steps=2, output_type="np").images
    names = {name: type(part).__name__ for name, part in pipeline.components.items() if hasattr(part, "config")}
    pixels = hashlib.sha256(images.tobytes()).hexdigest()
    options = {"subfolder": "transformer", "revision": revision, "trust_remote_code": True}
    transformer = AutoModel.from_pretrained(source, **options)
    assert type(transformer).__name__ == names["transformer"] and digest(transformer) == digest(pipeline.transformer)
    return {"names": names, "weights": digest(pipeline.transformer), "pixels": pixels}


def prefetch(*argv):
    """What the command says, and its status."""
    import contextlib
    import io

    from diffusers_eqvae.commands.prefetch import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(argv)
    return status, said.getvalue().splitlines()


def cached_files(repo_id):
    """Relative paths of what lies in the cache of a repository."""
    from huggingface_hub import constants, scan_cache_dir

    if not os.path.isdir(constants.HF_HUB_CACHE):
        return []
    repositories = [each for each in scan_cache_dir().repos if each.repo_id == repo_id]
    return sorted(
        file.file_path.relative_to(revision.snapshot_path).as_posix()
        for each in repositories
        for revision in each.revisions
        for file in revision.files
    )


def latent_channels_of(repo_id):
    from diffusers_eqvae.autoencoders import load_autoencoder

    return load_autoencoder(repo_id).config.latent_channels


def class_of_pipeline(repo_id):
    from diffusers_eqvae.pipelines import load_pipeline

    return type(load_pipeline(repo_id)).__name__
