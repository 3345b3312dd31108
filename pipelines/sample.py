r"""Samples many images of a saved pipeline into samples.npz, on any number of processes, resumably.

    eqvae sample --model runs/sit --num_samples 64 --output_dir runs/samples --save_png
    eqvae sample --model runs/sit --num_samples 50000 --output_dir runs/samples \
        --label_policy balanced --guidance_scale 1.8 --guidance_interval 0 0.75 --scheduler sde
    torchrun --nproc_per_node 2 -m diffusers_eqvae.sampling.sample --model runs/sit --output_dir runs/samples

Image n depends on (seed, n) alone, so the set does not depend on how many processes made it. A killed run continues
where it stopped when it is started again with the same flags.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.directories import OutputDirectory
from diffusers_eqvae.flow import DIFFUSION_FORMS
from diffusers_eqvae.images import image_grid
from diffusers_eqvae.options import Checked, inputs_of
from diffusers_eqvae.pipelines import sampling
from diffusers_eqvae.provenance import autoencoder_identity, hardware, require_same_autoencoder
from diffusers_eqvae.schedulers.choices import OPTIONS, choose_scheduler
from diffusers_eqvae.training_utils.arguments import DTYPES
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.console import progress_bar, start_logging
from diffusers_eqvae.training_utils.launch import build_state, claim, run_script

GRID_SAMPLES = 64
BESIDES = ("guide", "lora", "vae", "preview_decoder")  # what the images are made by, beside the pipeline


@dataclass
class SampleArguments(Checked):
    """What to sample; a resumed run must repeat everything that decides the images."""

    model: str = field(metadata={"reads": "pipeline", "help": "Pipeline directory or Hub repository."})
    output_dir: str = field(
        metadata={"help": "Receives samples.npz (arr_0: uint8 NHWC, arr_1: class ids), sampling.json and grid.png."}
    )
    num_samples: int = field(default=64, metadata={"help": "Number of images.", "range": "(0, inf)"})
    batch_size: int = field(
        default=16,
        metadata={
            "help": "Images per forward. Another value may move a few pixels by one of 255.",
            "range": "(0, inf)",
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the set; image n is a function of (seed, n).", "range": "[0, 2**64)"}
    )
    class_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Class ids or label names to sample from (id:7 or name:7 where a number could be either); when "
            "absent, all classes that training had images of."
        },
    )
    label_policy: Literal["random", "balanced"] = field(
        default="random", metadata={"help": "random draws a class per image; balanced takes the classes in turn."}
    )
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance; 1 is none.", "range": "[0, inf)"}
    )
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={
            "help": "LO HI in noise level sigma (1 = noise): guided where LO <= sigma <= HI, cheaper elsewhere.",
            "range": "[0, 1]",
        },
    )
    guided_channels: int | None = field(
        default=None,
        metadata={"help": "Guide the first n latent channels only; all when absent.", "range": "(0, inf)"},
    )
    num_inference_steps: int = field(
        default=50,
        metadata={"help": "Steps of the sampler; dopri5 finds its own number.", "range": "(0, inf)"},
    )
    scheduler: str = field(
        default="saved",
        metadata={
            "help": "Sampler: saved (the pipeline's own), euler, heun, dopri5, sde or sde_heun of a flow, ddpm or "
            "ddim of a diffusion, dpmsolver++ or unipc of either."
        },
    )
    shift: float | None = field(
        default=None,
        metadata={
            "help": "Move a flow's noise levels towards noise by this factor; unset, as saved.",
            "range": "(0, inf)",
        },
    )
    diffusion_form: str | None = field(
        default=None,
        metadata={
            "help": f"Diffusion coefficient of the sde: {', '.join(DIFFUSION_FORMS)}; unset, sigma or as saved."
        },
    )
    diffusion_norm: float | None = field(
        default=None, metadata={"help": "Factor of the sde's diffusion coefficient.", "range": "[0, inf)"}
    )
    last_step: str | None = field(
        default=None,
        metadata={"help": "The sde's step without noise: Mean, Tweedie, Euler, or none for no such step."},
    )
    last_step_size: float | None = field(
        default=None,
        metadata={"help": "Noise level at which the sde's last step begins.", "range": "(0, 1)"},
    )
    atol: float | None = field(
        default=None, metadata={"help": "Absolute tolerance of dopri5; unset, 1e-6.", "range": "(0, inf)"}
    )
    rtol: float | None = field(
        default=None, metadata={"help": "Relative tolerance of dopri5; unset, 1e-3.", "range": "(0, inf)"}
    )
    dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="fp32", metadata={"help": "Of transformer and VAE; the state stays float32."}
    )
    guide: str | None = field(
        default=None,
        metadata={
            "reads": "pipeline",
            "help": "Autoguidance: the pipeline of a weaker model of the same latents and classes (an earlier "
            "checkpoint, exported; a smaller model), whose prediction takes the place of the one without a class.",
        },
    )
    lora: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Adapters of the transformer in diffusers' layout (lora/ of a run of train_transformer), fused.",
        },
    )
    vae: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Decode by this autoencoder, whose encoder and normalisation are those that the transformer was "
            "trained with and whose decoder is another; sampling.json says whose it is.",
        },
    )
    preview_decoder: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Decode by this small autoencoder of the same latents (AutoencoderTiny) instead: quick images, "
            "which are not the pipeline's; sampling.json and cards say so.",
        },
    )
    break_lock: bool = field(
        default=False, metadata={"help": "Take output_dir from another program, which must not run any more."}
    )
    save_png: bool = field(default=False, metadata={"help": "Also write png/000000.png and so on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae is not None and self.preview_decoder is not None:
            raise ValueError("--vae and --preview_decoder both say what decodes; give one of them.")
        if self.guide is not None and self.guidance_scale == 1.0:
            raise ValueError("--guide acts through --guidance_scale, which is 1, no guidance; give another scale.")


def load_pipeline(arguments: SampleArguments, device: torch.device) -> DiffusionPipeline:
    dtype = getattr(torch, DTYPES[arguments.dtype])
    pipeline = sampling.load_pipeline(arguments.model, dtype=dtype).to(device)
    if arguments.lora is not None:
        pipeline.load_lora_weights(arguments.lora)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    given = {name: getattr(arguments, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    if options.get("last_step") == "none":
        options["last_step"] = None
    pipeline.scheduler = choose_scheduler(arguments.scheduler, pipeline.scheduler, **options)
    if arguments.guide is not None:
        pipeline.guide = sampling.load_guide(arguments.guide, pipeline, dtype=dtype).to(device)
    if arguments.vae is not None:
        swap_decoder(pipeline, arguments.vae, dtype)
    if arguments.preview_decoder is not None:
        pipeline.preview_decoder = load_autoencoder(arguments.preview_decoder).to(device, dtype)
    pipeline.check_parts()
    return pipeline


def swap_decoder(pipeline: DiffusionPipeline, name: str, dtype: torch.dtype) -> None:
    """Another autoencoder of the same latents in place of the pipeline's own."""
    trained_with = pipeline.transformer.config.get("autoencoder") or autoencoder_identity(pipeline.vae)
    vae = load_autoencoder(name)
    try:
        require_same_autoencoder(trained_with, vae, whose="the transformer")
    except ValueError as error:
        raise ValueError(
            f"--vae {name}: {error} --vae takes a copy of it whose decoder alone was trained further; "
            "--preview_decoder takes any decoder of as many channels."
        ) from error
    pipeline.vae = vae.to(pipeline.device, dtype)


def what_decides_the_images(
    arguments: SampleArguments, pipeline: DiffusionPipeline, class_ids: list[int]
) -> dict[str, Any]:
    elsewhere = ("model", "output_dir", "save_png", "class_labels", *BESIDES, "break_lock")
    settings = {name: value for name, value in asdict(arguments).items() if name not in elsewhere}
    settings |= {"dtype": DTYPES[arguments.dtype], "class_ids": class_ids}
    settings["scheduler_config"] = sampling.scheduler_settings(pipeline.scheduler)
    return settings | sampling.identities(pipeline) | {"options": sampling.model_options(pipeline)}


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse(SampleArguments, argv=argv, description=__doc__.partition("\n")[0], script=__file__)
    start_logging(format="%(message)s")
    state, output_dir = build_state(), Path(arguments.output_dir)
    pipeline = load_pipeline(arguments, state.device)
    class_ids = pipeline.resolve_class_labels(arguments.class_labels or pipeline.class_ids)
    settings = what_decides_the_images(arguments, pipeline, class_ids)
    names = ("guidance_scale", "guidance_interval", "guided_channels", "num_inference_steps")
    options = {name: getattr(arguments, name) for name in names}
    output = OutputDirectory(output_dir, kind="set of samples", inputs=inputs_of(arguments))
    if sampling.find_set(output_dir, settings) != "finished":
        sampling.require_accepted(pipeline, class_ids, **options)
    with state.main_process_first():
        claim(output, *sampling.NAMES, lock=state.is_main_process, break_lock=arguments.break_lock)
        finished = sampling.begin_set(output, settings)

    blocks = sampling.plan_blocks(arguments.num_samples, arguments.batch_size)
    if not finished:
        rank, world_size = state.process_index, state.num_processes
        mine = sampling.pending_blocks(output_dir, blocks, rank=rank, world_size=world_size)
        state.wait_for_everyone()  # no part may be written before every rank has listed those that are missing
        with progress_bar(total=sum(map(len, mine)), unit="image", disable=not state.is_main_process) as progress:
            for block in mine:
                part = sampling.sample_block(
                    pipeline,
                    block,
                    class_ids,
                    seed=arguments.seed,
                    label_policy=arguments.label_policy,
                    **options,
                )
                output.require_lock()
                sampling.write_part(output_dir, block, part)
                progress.update(len(block))
        state.wait_for_everyone()

    if state.is_main_process:
        if not finished:
            besides = {name: getattr(arguments, name) for name in BESIDES}
            drawn = {"seed": arguments.seed, "policy": arguments.label_policy}
            classes = sampling.sampled_classes(pipeline, arguments.num_samples, class_ids, **drawn)
            metadata = {"model": arguments.model, "besides": besides, **hardware(state.device), **classes.to_config()}
            sampling.finish(output_dir, blocks, settings=settings, metadata=metadata)
        samples = sampling.open_samples(output_dir / sampling.SAMPLES_FILE)
        image_grid(list(samples[:GRID_SAMPLES]), gap_px=0).save(output_dir / "grid.png")
        if arguments.save_png:
            sampling.write_pngs(samples, output_dir / "png")
        logging.getLogger("sample").info("%d images in %s", len(samples), output_dir / sampling.SAMPLES_FILE)
    output.release()
    state.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
