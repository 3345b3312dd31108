"""What `training/train_autoencoder.py` can be told about the model, the losses and the regularizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from ...data.image_streams import ImageStream, load_image_stream
from ...options import Checked
from ...regularizers.base import AutoencoderRegularizer
from ..arguments import DataArguments, OptimizerArguments, RunArguments, warn_without_effect
from ..command_line import Choice, parse, regularizer_choice
from ..lora import LoraArguments
from ..optimizers import OptimizerName

SHARED = OptimizerArguments.__dataclass_fields__


@dataclass
class AutoencoderArguments(Checked):
    """The autoencoder to train and where it starts from."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Autoencoder to fine-tune (AutoencoderKL, VQModel, AutoencoderTiny or a subclass), or a pipeline "
            "with one in vae/: a directory or Hub name in diffusers layout.",
        },
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "Folder of the autoencoder inside it; unset, vae for a pipeline."}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pretrained model."})
    model_config: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Train from scratch instead: a JSON file with the init arguments of AutoencoderKLEQ, or of the "
            "class that it names as _class_name (VQModelEQ).",
        },
    )
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] | None = field(
        default=None,
        metadata={
            "help": "Padding of the convolutions; unset keeps the model's own. Plain diffusers knows only zeros."
        },
    )
    latent_channels: int | None = field(
        default=None,
        metadata={
            "help": "Widen the latents of a pretrained AutoencoderKL to so many channels; it begins as the function "
            "that it was, with the new channels unread.",
            "range": "(0, inf)",
        },
    )
    trainable: list[str] = field(
        default_factory=lambda: ["full"],
        metadata={
            "help": "full; decoder (latents, stores and generators stay valid); encoder; or names of the module tree, "
            "e.g. decoder.up_blocks.3 decoder.conv_out. All else is frozen. lora, alone or with some of these: "
            "adapters on the layers there."
        },
    )
    latents_dir: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Latent store of the images of --train_data_dir, which a --trainable decoder then decodes: the "
            "encoder costs nothing. Needs --center_crop, as the store was cropped.",
        },
    )
    sample_posterior: bool = field(
        default=True, metadata={"help": "Decode a sample of the posterior while training, instead of its mean."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Keep activations in channels_last memory format (faster convolutions)."}
    )


@dataclass
class AutoencoderLossArguments(Checked):
    """The terms of the objective; a term of weight 0 costs nothing."""

    reconstruction_loss: Literal["l1", "l2"] = field(default="l1", metadata={"help": "Distance in pixels."})
    reduction: Literal["sum", "mean"] = field(
        default="sum",
        metadata={"help": "Over channels and pixels: sum is the LDM/EQ-VAE form (small images weigh less), or mean."},
    )
    perceptual_weight: float = field(
        default=1.0, metadata={"help": "Weight of LPIPS; 0 switches it off.", "range": "[0, inf)"}
    )
    lpips_net: Literal["vgg", "alex", "squeeze"] = field(default="vgg", metadata={"help": "LPIPS backbone."})
    lpips_backbone_weights: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Local file with the backbone's ImageNet weights (torchvision key names)."},
    )
    lpips_linear_weights: str | None = field(
        default=None, metadata={"reads": True, "help": "Local file with the LPIPS v0.1 linear heads of that backbone."}
    )
    kl_weight: float = field(
        default=1e-6, metadata={"help": "Weight of the KL divergence to N(0, I).", "range": "[0, inf)"}
    )
    disc_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the adversarial term; 0 trains without a discriminator.", "range": "[0, inf)"},
    )
    disc_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the discriminator; unset: --learning_rate.", "range": "[0, inf)"},
    )
    disc_start: int = field(
        default=0, metadata={"help": "First optimizer step with the adversarial term.", "range": "[0, inf)"}
    )
    disc_loss: Literal["hinge", "vanilla"] = field(default="hinge", metadata={"help": "Discriminator objective."})
    disc_norm: Literal["batch", "group"] = field(
        default="batch",
        metadata={"help": "Normalisation in the discriminator; group does not mix the images of a batch."},
    )
    disc_num_layers: int = field(
        default=3, metadata={"help": "Strided layers of the PatchGAN discriminator.", "range": "(0, inf)"}
    )
    disc_channels: int = field(default=64, metadata={"help": "Filters of its first layer.", "range": "(0, inf)"})
    disc_pretrained: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Discriminator to continue with: the discriminator/ of a run, or a training checkpoint of "
            "taming-transformers or latent-diffusion (.ckpt).",
        },
    )
    disc_lecam_weight: float = field(
        default=0.0, metadata={"help": "Weight of the LeCam regularization; 0: none.", "range": "[0, inf)"}
    )
    disc_lecam_decay: float = field(
        default=0.99,
        metadata={"help": "What its averages of the logits keep per optimizer step.", "range": "(0, 1)"},
    )
    disc_r1_weight: float = field(
        default=0.0,
        metadata={
            "help": "gamma of R1: gamma / 2 times the squared gradient of the mean logit at real images; 0: none. "
            "Each step then goes twice through the discriminator's backward.",
            "range": "[0, inf)",
        },
    )
    disc_augment: list[Literal["color", "translation", "cutout"]] = field(
        default_factory=list,
        metadata={"help": "Transforms (DiffAugment) of all that the discriminator sees, real and reconstructed."},
    )
    adaptive_disc_weight: bool = field(
        default=True,
        metadata={"help": "Multiply disc_weight by |grad nll| / |grad g| at the decoder's last layer (VQGAN)."},
    )


@dataclass
class AutoencoderOptimizerArguments(OptimizerArguments):
    """How autoencoder and discriminator are optimized; the defaults are those of VQGAN and LDM."""

    optimizer: OptimizerName = field(default="adam", metadata=SHARED["optimizer"].metadata)
    adam_beta1: float = field(default=0.5, metadata=SHARED["adam_beta1"].metadata)
    adam_beta2: float = field(default=0.9, metadata=SHARED["adam_beta2"].metadata)

    @property
    def discriminator_options(self) -> dict[str, Any]:
        """The same, but for muon: a discriminator is convolutions alone, which are AdamW's there."""
        return self.options | ({"optimizer": "adamw"} if self.optimizer == "muon" else {})


@dataclass
class AutoencoderDataArguments(DataArguments):
    """Which images to train on, in which shapes, and whether they are kept."""

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the images as they come and keep no copy: of --dataset_name (on the Hub, or http(s) "
            "addresses of .tar or .parquet files such as HOST/{000..099}.tar), or of parquet files in "
            "--train_data_dir. Every process reads all of the stream. Needs --max_train_steps."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={
            "help": "Images of a stream that are mixed at a time; each process holds up to twice as many, as files.",
            "range": "(0, inf)",
        },
    )
    aspect_buckets: int | None = field(
        default=None,
        metadata={
            "help": "Train on rectangles of at most so many shapes, each of at most --resolution^2 pixels; an image "
            "goes to the nearest one (reads all headers). Unset: squares.",
            "range": "(0, inf)",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.streaming:
            warn_without_effect(self, ["shuffle_buffer_size"], "images are not read with --streaming")
            return
        warn_without_effect(self, ["label_column"], "--streaming reads no labels")
        for name in ("skip_small", "aspect_buckets"):
            if getattr(self, name):
                raise ValueError(f"--{name} looks at all images first, which --streaming cannot; leave one out.")

    def stream(self, *, channels: int) -> ImageStream:
        """The images as they come; raises as `load_image_stream` does."""
        return load_image_stream(
            self.dataset_name,
            self.dataset_config_name,
            self.train_data_dir,
            split=self.split,
            image_column=self.image_column,
            cache_dir=self.cache_dir,
            channels=channels,
        )


@dataclass
class RegularizerArguments(Checked):
    """Which regularizers run; each brings its own options."""

    regularizers: list[str] = field(
        default_factory=lambda: ["equivariance"],
        metadata={"help": "Regularizers of the autoencoder, or none; they compose, in this order."},
    )
    features_dir: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Store of encode_latents.py --features whose features of the training images a regularizer reads, "
            "so that its teacher need not run; centre crops only.",
        },
    )


def autoencoder_choices(given: Mapping[str, Any]) -> list[Choice]:
    """Whose options the script takes besides its own: those of the regularizers."""
    return [regularizer_choice(given["regularizers"], AutoencoderRegularizer)]


@dataclass
class AutoencoderEvaluationArguments(Checked):
    """What is measured while training, and the normalisation that the finished autoencoder carries."""

    validation_data_dir: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Images to validate on (ADM centre crops); unset takes the first training images.",
        },
    )
    num_validation_images: int = field(default=24, metadata={"help": "How many of them.", "range": "(0, inf)"})
    validation_resolution: int | None = field(
        default=None,
        metadata={"help": "Side of the validation images in pixels; unset: --resolution.", "range": "(0, inf)"},
    )
    normalization: Literal["channel", "scalar", "config"] | None = field(
        default=None,
        metadata={
            "help": "What the finished config says about latents: latents_mean and latents_std per channel, scalar: "
            "one shift_factor and scaling_factor (what pipelines of SD3 and FLUX read), or config: what it came with. "
            "Unset: config for a pretrained autoencoder that has a scaling_factor alone, else channel."
        },
    )
    num_normalization_images: int = field(
        default=10_000,
        metadata={
            "help": "Training images that mean and std are measured on (at most one epoch).",
            "range": "(0, inf)",
        },
    )


class AutoencoderOptions(NamedTuple):
    """All that `training/train_autoencoder.py` was told, group by group; of the regularizers by their names."""

    model: AutoencoderArguments
    losses: AutoencoderLossArguments
    optimizer: AutoencoderOptimizerArguments
    lora: LoraArguments
    regularizing: RegularizerArguments
    evaluation: AutoencoderEvaluationArguments
    data: AutoencoderDataArguments
    run: RunArguments
    methods: dict[str, Any]

    @classmethod
    def parse(cls, argv: list[str] | None, *, description: str | None, script: str) -> Self:
        """From a command line (sys.argv where there is none); see `command_line.parse`."""
        groups = [kind for name, kind in cls.__annotations__.items() if name != "methods"]
        given = cls(*parse(*groups, argv=argv, description=description, script=script, choices=autoencoder_choices))
        squares = {"--latents_dir": given.model.latents_dir, "--features_dir": given.regularizing.features_dir}
        for flag in (name for name, value in squares.items() if value and given.data.aspect_buckets):
            raise ValueError(
                f"--aspect_buckets trains on rectangles, and the store of {flag} holds what was made of squares; "
                "leave one of them out."
            )
        return given

    @property
    def settings(self) -> tuple[Any, ...]:
        """Every group but how the run is run."""
        return (*self[:7], *self.methods.values())
