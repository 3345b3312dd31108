"""`eqvae demo`: the whole line on a few images, by the real command lines of the scripts, in minutes on a CPU."""
