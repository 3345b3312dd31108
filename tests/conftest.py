"""Every test runs offline, on the CPU, on one thread, from one seed; fixtures give tiny models and shared data."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

# Hugging Face libraries read these at import, so they are set before any of them is imported. The cache is empty and
# private: a test that only passes because of something in a developer's own cache fails here.
_CACHE = tempfile.mkdtemp(prefix="eqvae-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_HOME"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder, where training/ and pipelines/ lie."""
    return ROOT


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and weights that are not part of the repository; the test is skipped where they are absent."""
    path = Path(os.environ.get("EQVAE_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set EQVAE_SHARED_DATA to its folder")
    return path


@pytest.fixture
def tiny_autoencoder_kl():
    """A seeded f4 AutoencoderKL with 4 latent channels, in eval mode; images of 16 px give 4x4 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture
def tiny_autoencoder_tiny():
    """A seeded f4 AutoencoderTiny (deterministic encoder) with 4 latent channels, in eval mode."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()


@pytest.fixture
def tiny_vq_model():
    """A seeded f4 VQModel with 16 codebook vectors of width 4, in eval mode; images of 16 px give 4x4 tokens."""
    from diffusers import VQModel

    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae


@pytest.fixture
def tiny_maskgit():
    """A seeded 2-layer MaskGIT for 4x4 tokens of 16 and three classes, in eval mode."""
    from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel

    torch.manual_seed(0)
    return MaskGITTransformer2DModel(
        sample_size=4, codebook_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
    ).eval()


@pytest.fixture
def tiny_sit():
    """A seeded 2-layer SiT for 4x4x4 latents and ten classes, in eval mode; zero-initialised layers are filled."""
    from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel

    torch.manual_seed(0)
    model = SiTTransformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=10,
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
