"""`python -m diffusers_eqvae` is the `eqvae` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
