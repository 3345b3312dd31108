"""A Hub client in a process of its own: huggingface_hub reads HF_ENDPOINT once, when it is imported.

Reads requests (JSON lines: action, arguments, environment) from stdin, answers on stdout with result, error and log.
Libraries are imported by the action that needs them, so that an action can show what works without the others.
"""

import hashlib
import importlib
import json
import logging
import os
import sys
import traceback


def preload(modules):
    for module in modules:
        importlib.import_module(module)


def push_run(**arguments):
    from diffusers_eqvae.hub import push_run

    return push_run(**arguments)


def cli(argv):
    from diffusers_eqvae.cli import main

    return main(argv)


def api(method, **arguments):
    """A method of HfApi; the answer as text, or the name of what it raises."""
    from huggingface_hub import HfApi

    try:
        answer = getattr(HfApi(), method)(**arguments)
        return [str(item) for item in answer] if hasattr(answer, "__iter__") else str(answer)
    except Exception as error:
        return type(error).__name__


def push_with_diffusers(directory, module, name, repo_id):
    """`push_to_hub`, which diffusers gives to every model and pipeline."""
    import diffusers_eqvae  # noqa: F401

    getattr(importlib.import_module(module), name).from_pretrained(directory).push_to_hub(repo_id)


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
    return {"names": names, "weights": digest(pipeline.transformer), "mean": float(images.mean())}


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


class Recorder(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(level=logging.DEBUG)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        recorder = Recorder()
        logging.getLogger("diffusers_eqvae").addHandler(recorder)
        result = error = None
        try:
            result = globals()[request["action"]](**request["arguments"])
        except BaseException:
            error = traceback.format_exc()
        logging.getLogger("diffusers_eqvae").removeHandler(recorder)
        print(json.dumps({"result": result, "error": error, "log": recorder.lines}), file=answers, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # taking torch down in order costs seconds
