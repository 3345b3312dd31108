"""The discrete diffusion chain of DDPM and DiT (arXiv 2006.11239, 2102.09672): what a step adds and what undoes it.

    q(x_t | x_0)          = N(sqrt(a_t) x_0, 1 - a_t)                    a_t = (1 - beta_0) ... (1 - beta_t)
    q(x_{t-1} | x_t, x_0) = N(posterior mean, posterior variance)        DDPM, eq. 6 and 7

`steps` t = 0 .. T-1 are integers, one per sample (B,), t = T-1 nearly pure noise. Sampling is diffusers' business
(`DDPMScheduler`, `DDIMScheduler`); this file is what training compares with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BETA_START, BETA_END, NUM_STEPS = 1e-4, 0.02, 1000


class DiffusionChain(nn.Module):
    """The linear chain of DDPM and DiT; tables without parameters that move with the module and are not saved.

    Args:
        num_steps: T.
        beta_start, beta_end: of the linear variances.
        dtype: of the tables; they are computed in float64 and rounded once.

    Example:
        >>> chain = DiffusionChain()
        >>> noisy = chain.interpolate(latents, noise, torch.tensor([0, 999]))
    """

    tables: Tensor
    _names = ("alpha", "beta", "from_clean", "from_noisy", "posterior_log_variance", "log_beta")

    def __init__(
        self,
        num_steps: int = NUM_STEPS,
        *,
        beta_start: float = BETA_START,
        beta_end: float = BETA_END,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_steps = num_steps
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device="cpu")
        products = (1 - betas).cumprod(0)
        before = torch.cat([products.new_ones(1), products[:-1]])
        posterior_variance = betas * (1 - before) / (1 - products)
        tables = (
            products.sqrt(),
            (1 - products).sqrt(),
            betas * before.sqrt() / (1 - products),
            (1 - before) * (1 - betas).sqrt() / (1 - products),
            # The first step's posterior variance is 0: its logarithm is that of the second (Improved DDPM, section 3).
            torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
            betas.log(),
        )
        self.register_buffer("tables", torch.stack(tables).to(dtype), persistent=False)

    def _at(self, name: str, steps: Tensor, like: Tensor) -> Tensor:
        """(B, 1, ..., 1): a table's entry of each sample's step."""
        return self.tables[self._names.index(name)][steps].view(-1, *[1] * (like.ndim - 1))

    def interpolate(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t = sqrt(a_t) clean + sqrt(1 - a_t) noise, (B, ...)."""
        return self._at("alpha", steps, clean) * clean + self._at("beta", steps, clean) * noise

    def clean_from_noise(self, noise: Tensor, noisy: Tensor, steps: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - a_t) noise) / sqrt(a_t), (B, ...): what a prediction of the noise says of the data."""
        return (noisy - self._at("beta", steps, noisy) * noise) / self._at("alpha", steps, noisy)

    def posterior(self, clean: Tensor, noisy: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("from_clean", steps, noisy) * clean + self._at("from_noisy", steps, noisy) * noisy
        return mean, self._at("posterior_log_variance", steps, noisy)

    def learned_log_variance(self, output: Tensor, steps: Tensor) -> Tensor:
        """v log beta_t + (1 - v) log posterior variance, v = (output + 1) / 2 (Improved DDPM, eq. 15), (B, ...)."""
        fraction = (output + 1) / 2
        low, high = self._at("posterior_log_variance", steps, output), self._at("log_beta", steps, output)
        return fraction * high + (1 - fraction) * low
