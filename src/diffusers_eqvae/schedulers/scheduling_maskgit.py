"""MaskGIT's iterative decoding (arXiv 2202.04200, section 3.2): all tokens are drawn, the most confident ones stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

NOMINAL_TOKENS = 256  # of a 256 px image at stride 16


@dataclass
class MaskGITSchedulerOutput(BaseOutput):
    """What one step gives.

    Args:
        prev_sample: tokens (B, h, w), fewer of them masked.
        pred_original_sample: tokens (B, h, w) with every masked one as it was drawn in this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class MaskGITScheduler(SchedulerMixin, ConfigMixin):
    """From masked tokens to tokens in N steps. Step i of 0 .. N - 1 draws every masked token from softmax(logits) and
    keeps the most confident ones,

        confidence = log p(token) + choice_temperature * gumbel * (1 - i / (N - 1)),

    as many as are due by the arccos schedule: in proportion to arccos(1 - i / (N - 1)), rounded, at least one; the
    last step keeps all that are left.

    Args:
        num_train_timesteps: timestep = num_train_timesteps * share of the tokens that are masked.
        choice_temperature: of the noise in the confidence; 0 keeps the likeliest tokens.
        prediction_type: "logits".

    Attributes:
        timesteps: one per model call, N of them; the share of 256 tokens that is masked before it, times 1000.

    Differs from the reference: its PyTorch port lets the noise fall by 1 - i / N, so that it is not quite gone in the
    last step, which keeps everything anyway.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> scheduler = MaskGITScheduler()
        >>> scheduler.set_timesteps(8)
        >>> scheduler.counts(256)
        [1, 18, 26, 32, 38, 43, 48, 50]
    """

    _compatibles: ClassVar[list[str]] = ["MaskGITScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, choice_temperature: float = 4.5, prediction_type: str = "logits"
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1; got {num_train_timesteps}.")
        if not (math.isfinite(choice_temperature) and choice_temperature >= 0):
            raise ValueError(f"choice_temperature must be finite and >= 0; got {choice_temperature}.")
        if prediction_type != "logits":
            raise ValueError(f"prediction_type must be 'logits'; got {prediction_type!r}.")
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepares N = `num_inference_steps` steps.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
        self.num_inference_steps = num_inference_steps
        nominal = max(NOMINAL_TOKENS, num_inference_steps)
        counts = self.counts(nominal)
        masked = [sum(counts[index:]) / nominal for index in range(num_inference_steps)]
        self.timesteps = torch.tensor([self.config.num_train_timesteps * share for share in masked]).to(device)

    def counts(self, num_tokens: int) -> list[int]:
        """How many of `num_tokens` each step keeps; they sum to all.

        Raises:
            ValueError: before `set_timesteps`, and for more steps than tokens.
        """
        dues = self._dues()
        if len(dues) > num_tokens:
            raise ValueError(
                f"Each step settles at least one token, so num_inference_steps must be at most {num_tokens}, the "
                f"number of tokens; got {len(dues)}."
            )
        kept = [max(1, round(due * num_tokens / math.fsum(dues))) for due in dues]
        kept[-1] += num_tokens - sum(kept)
        while kept[-1] < 1:
            kept[max(range(len(kept) - 1), key=kept.__getitem__)] -= 1
            kept[-1] += 1
        return kept

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MaskGITSchedulerOutput | tuple[Tensor, Tensor]:
        """Settles some of the masked tokens.

        Args:
            model_output: logits (B, K, h, w) for `sample`.
            timestep: the entry of `timesteps` that this step stands at.
            sample: tokens (B, h, w); K is the mask, every other token stays what it is.
            generator: one, or one per sample.

        Raises:
            ValueError: before `set_timesteps`, or at a timestep that is not on the grid.
        """
        index = self._index(timestep)
        batch_size, vocabulary = model_output.shape[:2]
        tokens = sample.flatten(1)
        masked = tokens == vocabulary
        logits = model_output.flatten(2).transpose(1, 2).to(torch.promote_types(model_output.dtype, torch.float32))
        uniform = _rand((batch_size, 2, tokens.shape[1]), generator, logits.device).to(logits.dtype)
        drawn, log_probability = _draw(logits, uniform[:, 0])

        gumbel = -torch.log(-torch.log(uniform[:, 1]))
        confidence = log_probability + self.config.choice_temperature * (1 - self._fraction(index)) * gumbel
        order = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
        last = index == len(self.timesteps) - 1
        due = tokens.shape[1] if last else self.counts(tokens.shape[1])[index]
        kept = torch.zeros_like(masked).scatter_(1, order[:, :due], True) & masked
        previous = torch.where(kept, drawn, tokens).view_as(sample)
        predicted = torch.where(masked, drawn, tokens).view_as(sample)
        return MaskGITSchedulerOutput(previous, predicted) if return_dict else (previous, predicted)

    def _dues(self) -> list[float]:
        """What each step keeps, up to a common factor."""
        if self.num_inference_steps is None:
            raise ValueError("The number of steps is not set; call set_timesteps before step.")
        if self.num_inference_steps == 1:
            return [1.0]
        return [math.acos(1 - self._fraction(index)) for index in range(self.num_inference_steps)]

    def _fraction(self, index: int) -> float:
        """i / (N - 1), and 1 for the only step."""
        last = (self.num_inference_steps or 1) - 1
        return index / last if last else 1.0

    def _index(self, timestep: float | Tensor) -> int:
        self._dues()
        found = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"No step stands at timestep {float(timestep)}; take it from scheduler.timesteps.")
        return found[0]

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token of softmax(logits) for each uniform number, by the inverse of the distribution; and its log p."""
    log_probabilities = logits.log_softmax(-1)
    cumulative = log_probabilities.exp().cumsum(-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return drawn.squeeze(-1), log_probabilities.gather(-1, drawn).squeeze(-1)


def _rand(shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1), of each sample's own generator where there is a list of them."""
    if isinstance(generator, list):
        drawn = torch.cat([_rand((1, *shape[1:]), each, device) for each in generator])
    else:
        drawn = torch.rand(shape, generator=generator, device=device if generator is None else generator.device)
    smallest = torch.finfo(drawn.dtype).tiny
    return drawn.clamp_(smallest, 1 - torch.finfo(drawn.dtype).eps / 2).to(device)
