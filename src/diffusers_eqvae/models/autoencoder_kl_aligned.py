"""The ReaLS autoencoder: an AutoencoderKLEQ with its alignment network beside it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from ..latents import LatentNormalization
from .alignment_network import AlignmentNetwork, AlignmentOutput
from .autoencoder_kl_eq import AutoencoderKLEQ

ALIGNMENT_SUBFOLDER = "alignment_network"
logger = logging.getLogger(__name__)

# Options of from_pretrained that say where both models are found.
_SHARED_LOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
# Options of save_pretrained that hold for both models; the rest (push_to_hub and its own) concerns the root alone.
_SHARED_SAVE_OPTIONS = ("safe_serialization", "max_shard_size")


class AutoencoderKLAligned(AutoencoderKLEQ):
    """AutoencoderKLEQ whose latents predict a teacher's features (ReaLS, arXiv 2502.00359).

    The alignment network is a component of its own: it is not in this model's state dict, `save_pretrained` puts it
    into `alignment_network/` of the same directory, and the directory's root stays an AutoencoderKL. `from_pretrained`
    loads it too where there is one, so that it stays with the autoencoder wherever that is saved next.

    Example:
        >>> vae = AutoencoderKLAligned(norm_num_groups=4, block_out_channels=(8,))
        >>> vae.set_alignment_network(AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6))
        >>> vae.predict_features(torch.zeros(1, 4, 16, 16)).patch.shape
        torch.Size([1, 6, 16, 16])
    """

    # A tuple, because nn.Module would register a module and plain AutoencoderKL would find unexpected weights.
    _alignment_network: tuple[AlignmentNetwork, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As AutoencoderKL's, with the alignment network saved beside the weights; without one it is left unset.

        Raises:
            OSError: there is a network, but it cannot be read.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        folder = "/".join(filter(None, (kwargs.get("subfolder"), ALIGNMENT_SUBFOLDER)))
        where = {name: kwargs[name] for name in _SHARED_LOAD_OPTIONS if name in kwargs}
        if _holds_network(pretrained_model_name_or_path, folder, where):
            model.load_alignment_network(pretrained_model_name_or_path, subfolder=folder, **where)
        return loaded

    @property
    def alignment_network(self) -> AlignmentNetwork | None:
        """The alignment network, or None where none was set or loaded."""
        return self._alignment_network[0] if self._alignment_network else None

    def set_alignment_network(self, network: AlignmentNetwork) -> None:
        """Puts `network` beside this autoencoder; from then on it moves and is saved with it.

        Raises:
            ValueError: where it reads another number of latent channels.
        """
        if network.config.latent_channels != self.config.latent_channels:
            raise ValueError(
                f"The alignment network reads {network.config.latent_channels} latent channels, the autoencoder has "
                f"{self.config.latent_channels}; they must have been trained together."
            )
        self._alignment_network = (network,)

    def load_alignment_network(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        subfolder: str = ALIGNMENT_SUBFOLDER,
        **kwargs: Any,
    ) -> AlignmentNetwork:
        """Loads the network saved beside the weights, sets it, and returns it on this model's device and dtype.

        Args:
            pretrained_model_name_or_path: directory or Hub name; by default where this autoencoder was loaded from.
            subfolder: folder of the network inside it ("vae/alignment_network" in a pipeline's repository).
            kwargs: of `AlignmentNetwork.from_pretrained`, such as revision and token.

        Raises:
            ValueError: without a name, where this autoencoder was not loaded from anywhere.
            FileNotFoundError: where a directory holds no such folder.
        """
        source = pretrained_model_name_or_path or self.config.get("_name_or_path")
        if not source:
            raise ValueError("This autoencoder was not loaded from a directory or the Hub; name where to load from.")
        if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
            raise FileNotFoundError(
                f"{source} holds no {subfolder}/: the autoencoder was saved without an alignment network. Name "
                "another directory, or train one with --regularizers alignment."
            )
        options = {"subfolder": subfolder, "torch_dtype": self.dtype, **kwargs}
        network = AlignmentNetwork.from_pretrained(source, **options).to(self.device)
        self.set_alignment_network(network)
        return network

    def predict_features(self, latents: Tensor) -> AlignmentOutput:
        """The teacher's features as the alignment network sees them in normalised latents (B, C, h, w).

        Raises:
            ValueError: where no alignment network is set.
        """
        if self.alignment_network is None:
            raise ValueError("No alignment network is set; call load_alignment_network() first.")
        raw_latents = LatentNormalization.from_vae(self).denormalize(latents)
        return self.alignment_network(raw_latents.to(self.alignment_network.dtype))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As AutoencoderKLEQ's, and the alignment network in `alignment_network/`; all arguments are passed on."""
        if self.alignment_network is not None:
            # Before the root, whose push_to_hub=True uploads the whole directory.
            own = {key: value for key, value in kwargs.items() if key in _SHARED_SAVE_OPTIONS}
            self.alignment_network.save_pretrained(
                Path(save_directory) / ALIGNMENT_SUBFOLDER, is_main_process=is_main_process, **own
            )
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AutoencoderKLAligned:
        for network in self._alignment_network:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _holds_network(name: str | os.PathLike[str], folder: str, where: dict[str, Any]) -> bool:
    """Whether a directory or Hub repository has a network's config in `folder`, which is then at hand."""
    if Path(name).is_dir():
        path = Path(name) / folder
        if not path.is_dir() or (path / "config.json").is_file():
            return path.is_dir()
        # Loading a pipeline from the Hub fetches the weights below a component's folder and leaves out their config.
        cached = re.search(r"(.+)/models--([^/]+)/snapshots/([^/]+)/(.+)$", path.as_posix())
        if cached is None:
            return True  # damaged; loading it says how
        cache_dir, repository, revision, folder = cached.groups()
        name, where = repository.replace("--", "/"), {**where, "revision": revision, "cache_dir": cache_dir}
    try:
        hf_hub_download(str(name), f"{folder}/config.json", **where)
    except LocalEntryNotFoundError:
        logger.warning("%s: offline, and no alignment network is in the cache; going on without one.", name)
        return False
    except EntryNotFoundError:
        return False
    return True
