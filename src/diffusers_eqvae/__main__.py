"""`python -m diffusers_eqvae` is the `eqvae` command."""

import sys

from eqvae_command import main

if __name__ == "__main__":
    sys.exit(main())
