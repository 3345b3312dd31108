"""Methods of ours in place of diffusers': callers that look at a signature, as pipelines do, find all of it."""

from __future__ import annotations

import inspect

import pytest

import diffusers_eqvae
from diffusers_eqvae.models.backbone import Backbone
from diffusers_eqvae.models.component import ComponentMixin

OURS = [getattr(diffusers_eqvae, name) for name in diffusers_eqvae.__all__] + [Backbone, ComponentMixin]
OURS = [cls for cls in OURS if inspect.isclass(cls) and cls.__module__.startswith("diffusers_eqvae.")]


def overridden() -> list[tuple[type, str]]:
    return [
        (cls, name)
        for cls in OURS
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod))
        if theirs(cls, name) is not None
    ]


def theirs(cls: type, name: str):
    """The method that ours hides, of the nearest base class in diffusers."""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("diffusers.") and name in vars(base):
            return getattr(base, name)
    return None


def test_something_is_overridden():
    assert (diffusers_eqvae.AutoencoderKLEQ, "save_pretrained") in overridden()


@pytest.mark.parametrize(("cls", "name"), overridden())
def test_what_we_override_keeps_its_parameters(cls, name):
    expected, ours = (inspect.signature(method).parameters for method in (theirs(cls, name), getattr(cls, name)))
    assert list(ours) == list(expected)
    for key, parameter in expected.items():
        assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default), key
