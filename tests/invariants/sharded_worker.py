"""One of two ranks: the same training, replicated by DDP and sharded by FSDP2; writes both lists of losses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from diffusers_eqvae.flow import interpolate, velocity_target
from diffusers_eqvae.losses.diffusion import flow_matching_loss
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel

STEPS, PER_RANK = 5, 3


def make_model() -> SiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}
    return SiTTransformer2DModel(**sizes, class_dropout_prob=0.0)


def shard(model: SiTTransformer2DModel) -> nn.Module:
    """Each module that the class says must stay whole is a group of its own; the rest is the root's."""
    mesh = init_device_mesh("cpu", (2,))
    groups = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    assert len(groups) == 3
    for part in groups:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),), name
        assert parameter.device_mesh.size() == 2, name
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert 0.4 * whole < held < 0.6 * whole, (held, whole)
    return model


def losses(model: nn.Module, rank: int) -> list[float]:
    """Of every step, averaged over the ranks, each of which has its own part of the batch."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        clean, noise = torch.randn(2, 2 * PER_RANK, 4, 4, 4, generator=generator)
        sigmas, labels = torch.rand(2 * PER_RANK, generator=generator), torch.arange(2 * PER_RANK) % 4
        mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        clean, noise, sigmas, labels = clean[mine], noise[mine], sigmas[mine], labels[mine]
        prediction = model(interpolate(clean, noise, sigmas), 1000 * sigmas, labels).sample
        loss: Tensor = flow_matching_loss(prediction, velocity_target(clean, noise, sigmas)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found.append(total.item() / 2)
    return found


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = {
        "ddp": losses(DistributedDataParallel(make_model()), rank),
        "fsdp2": losses(shard(make_model()), rank),
    }
    if rank == 0:
        output.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads of the mesh may outlive the group, and abort an ordinary exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
