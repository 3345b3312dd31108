"""One of two ranks: a step of every class of autoencoders under DDP; writes the norms of the averaged gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.training_utils.autoencoder.trainable import freeze_all_but
from tests.faults.test_autoencoder_classes import TINY, tiny

STEPS, IMAGES = 2, 4


def gradients(name: str, rank: int = 0, world_size: int = 1) -> list[float]:
    """The norm of the gradient of every trained weight, in the last step on this rank's part of the batch."""
    vae = tiny(name)
    freeze_all_but(vae, ["full"])
    objective: nn.Module = AutoencoderObjective(vae, reduction="mean")
    # A weight that no gradient reaches would make the second step of two ranks fail.
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if world_size > 1 else objective
    randomness = StepRandomness(seed=0, rank=rank, world_size=world_size)
    for step in range(STEPS):
        randomness.at(step, 0)
        everything = torch.rand(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        batch = {"pixel_values": everything.chunk(world_size)[rank]}
        objective.zero_grad()
        output = wrapped(batch, objective.draw(batch, randomness))
        (reconstruction, target, _), *_ = output["decodings"]
        loss = (reconstruction - target).square().mean() + 0.1 * sum(output["terms"].values()) + output["idle"]
        loss.backward()
    return [each.grad.norm().item() for each in objective.parameters() if each.requires_grad]


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = {name: gradients(name, rank, 2) for name in TINY}
    if rank == 0:
        output.write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
