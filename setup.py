"""Packaging of diffusers_eqvae; tool settings live in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INIT = (ROOT / "src/diffusers_eqvae/__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M).group(1)

# The core imports without torchvision, datasets and tensorboard; each extra adds one job (see CONTRIBUTING.md).
CORE = [
    "torch>=2.6",
    "diffusers>=0.42.1",
    "transformers>=5",
    "accelerate>=1.15",
    "huggingface_hub>=2",
    "safetensors",
    "numpy",
    "pillow",
    "pyyaml",
    "jinja2",
]
TRAIN = ["datasets>=5", "peft>=0.21", "tensorboard", "torchvision"]
EVAL = ["evaluate", "torch-fidelity>=0.4", "scipy"]
DEMO = ["scikit-image", "matplotlib"]
DEV = ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "pre-commit"]


class BuildWithModelCards(build_py):
    """Puts the templates of model_cards/ beside the modules; a checkout and an editable install read them in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "diffusers_eqvae" / "model_cards"
        target.mkdir(parents=True, exist_ok=True)
        for template in sorted((ROOT / "model_cards").iterdir()):
            shutil.copyfile(template, target / template.name)


setup(
    name="diffusers_eqvae",
    version=VERSION,
    description="EQ-VAE and ReaLS autoencoders and SiT/DiT generators as native Hugging Face diffusers components.",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_eqvae": ["py.typed"]},
    cmdclass={"build_py": BuildWithModelCards},
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": TRAIN + DEMO,
        "dev": TRAIN + EVAL + DEMO + DEV,
    },
    entry_points={"console_scripts": ["eqvae=diffusers_eqvae.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
