"""The command line of evaluate_perception.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...options import Checked
from ..arguments import warn_without_effect


@dataclass
class PerceptionArguments(Checked):
    """What to measure on which images, and where the results go."""

    vae: str = field(
        metadata={"reads": True, "help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."}
    )
    images: str = field(metadata={"reads": True, "help": "Folder of images, taken as ADM centre crops."})
    output: str = field(metadata={"help": "The card, a JSON file; the overview gets the same name with .png."})
    masks: str | None = field(
        default=None, metadata={"reads": True, "help": "Folder of classes: 8-bit masks named as the images."}
    )
    depths: str | None = field(
        default=None, metadata={"reads": True, "help": "Folder of depths: 16 bits in mm, where 0 is invalid."}
    )
    num_annotated: int = field(
        default=5, metadata={"help": "Images whose annotations may be used; 0 with heads.", "range": "[0, inf)"}
    )
    num_tested: int | None = field(
        default=None, metadata={"help": "Of the last images; unset: all not annotated.", "range": "(0, inf)"}
    )
    order: Literal["random", "name"] = field(
        default="random",
        metadata={"help": "Which come first, the annotated ones: by --seed or by name (for frames of a film)."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random order.", "range": "[0, 2**64)"})
    resolution: int = field(default=256, metadata={"help": "Side in pixels of the centre crops.", "range": "(0, inf)"})
    alignment_network: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Its directory or Hub name, or that of its autoencoder or pipeline."},
    )
    segmentation_head: str | None = field(
        default=None, metadata={"reads": True, "help": "File of DINOv2's linear head of classes."}
    )
    depth_head: str | None = field(
        default=None, metadata={"reads": True, "help": "File of DINOv2's linear head of depth."}
    )
    head_teacher_type: str = field(
        default="dinov2", metadata={"help": "Backbone that the heads were fitted to, a transformers type."}
    )
    max_depth: float = field(
        default=10.0, metadata={"help": "Metres of the depth head's last bin; KITTI: 80.", "range": "(0, inf)"}
    )
    neighbours: int = field(
        default=5, metadata={"help": "Annotated positions that a position is compared with.", "range": "(0, inf)"}
    )
    window: int | None = field(
        default=None,
        metadata={
            "help": "Side in latent positions of a feature; unset: 1 with a network, 5 without.",
            "range": "(0, inf)",
        },
    )
    ignore_index: int = field(default=255, metadata={"help": "Label of pixels without a class.", "range": "[0, inf)"})
    num_classes: int | None = field(
        default=None, metadata={"help": "Unset: the highest label and 1.", "range": "(0, inf)"}
    )
    median_scaling: bool = field(default=False, metadata={"help": "Compare depths up to a factor per image."})
    batch_size: int = field(default=8, metadata={"help": "Images per forward.", "range": "(0, inf)"})
    num_shown: int = field(default=4, metadata={"help": "Rows of the overview, evenly spaced.", "range": "(0, inf)"})
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, cuda, cuda:1 ..."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).suffix == ".png":
            raise ValueError(f"--output names the JSON file, and the overview gets .png; got {self.output}.")
        if self.masks is None and self.depths is None:
            raise ValueError("Nothing is annotated: give --masks, --depths or both.")
        for head, targets in (("segmentation_head", "masks"), ("depth_head", "depths")):
            if getattr(self, head) is not None and getattr(self, targets) is None:
                raise ValueError(f"--{head} is measured on --{targets}; give both or neither.")
        heads = self.segmentation_head is not None or self.depth_head is not None
        if heads and (self.alignment_network is None or (self.window or 1) != 1):
            raise ValueError("Heads read single features of a teacher: give --alignment_network and no --window.")
        covered = (self.masks is None) == (self.segmentation_head is None)
        covered = covered and (self.depths is None) == (self.depth_head is None)
        if self.num_annotated == 0 and not covered:
            raise ValueError(f"--num_annotated must be positive without a head; got {self.num_annotated}.")
        for given, names, reason in (
            (self.masks, ("ignore_index", "num_classes"), "there are no --masks"),
            (self.depths, ("median_scaling", "max_depth"), "there are no --depths"),
            (self.depth_head or not self.depths, ("max_depth",), "there is no --depth_head"),
            (heads, ("head_teacher_type",), "there is no head"),
            (self.order == "random", ("seed",), "--order is name"),
        ):
            if not given:
                warn_without_effect(self, names, reason)
