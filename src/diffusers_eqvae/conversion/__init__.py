"""Published weights <-> this package's classes: one file a layout; `eqvae convert` is its command.

    from diffusers_eqvae.conversion import from_published, read_published

    transformer = from_published(read_published("SiT-XL-2-256x256.pt"), layout="sit")

A layout of yours is a file with a `Converter` under `@register_converter("its_name")`; see `Converter`.
"""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "base": ["CONVERTERS", "Converter", "from_published", "register_converter", "to_published"],
        "_files": ["read_published", "save_published"],
    },
)
