"""Gradients at the weight of one layer, which adaptive weights compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight


class LastLayer:
    """The gradient at a layer's weight, found from what goes in and what comes out, trained or not."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._replaying = False
        layer.register_forward_hook(self._keep)

    @torch.compiler.disable  # traced, it would be compiled anew for every size that was kept before
    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not self._replaying:
            output.requires_grad_()  # it does, unless nothing but an adapter on this very layer learns
            self.calls.append((inputs[0].detach(), output))

    @property
    def outputs(self) -> list[Tensor]:
        """What each call of the layer gave."""
        return [output for _, output in self.calls]

    def weight_gradient(self, outputs: Tensor | Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> Tensor:
        """d <outputs, gradients> / d weight, summed over the layer's calls; the graph is kept."""
        found = torch.autograd.grad(outputs, self.outputs, gradients, retain_graph=True, allow_unused=True)
        return self.at_weight(found)

    def at_weight(self, found: Sequence[Tensor | None]) -> Tensor:
        """The gradient at the weight, of those at `outputs`."""
        if all(gradient is None for gradient in found):
            raise ValueError(
                "An adaptive weight compares gradients at the last layer, and the term does not depend on that; use a "
                "fixed weight (adaptive off)."
            )
        plain = type(self.layer).forward is nn.Conv2d.forward  # a subclass may pad by itself
        total = torch.zeros_like(self.layer.weight)
        for (taken, output), gradient in zip(self.calls, found, strict=True):
            if gradient is not None:
                at_weight = self._of_convolution if plain else self._of_any
                total += at_weight(taken.to(output.dtype), gradient.to(output.dtype))
        return total

    def _of_convolution(self, taken: Tensor, gradient: Tensor) -> Tensor:
        """Without a second forward."""
        layer, padding = self.layer, self.layer.padding
        if layer.padding_mode != "zeros":
            taken, padding = F.pad(taken, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
        geometry = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        return conv2d_weight(taken, layer.weight.shape, gradient, padding=padding, **geometry)

    def _of_any(self, taken: Tensor, gradient: Tensor) -> Tensor:
        named = self.layer.named_parameters(recurse=False)
        weights = {name: value.detach().to(taken.dtype).requires_grad_() for name, value in named}
        self._replaying = True
        try:
            with torch.enable_grad():
                output = functional_call(self.layer, weights, (taken,))
        finally:
            self._replaying = False
        return torch.autograd.grad(output, weights["weight"], gradient)[0]
