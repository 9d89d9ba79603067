"""Several processes on one run: `torchrun --nproc-per-node 2 -m iessp train RECIPE`.

Every rank trains on its share of each batch; gates, statistics and lambda are the same on all of them.
Rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
TORN = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in messages of torch


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the process group when torchrun started this process; gives the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun's own way to tell
        yield device
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()  # no rank leaves while another still talks to it
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in TORN):
            raise
        raise ConnectionError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another one, whose own message says why. "
            "The checkpoints are whole: run the same command again to go on from the last"
        ) from error
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mine() -> int:
    """This process's rank."""
    return dist.get_rank() if count() > 1 else 0


def parallel(model: nn.Module) -> nn.Module:
    """The model as it is to be called in training: gradients averaged over the ranks."""
    return DistributedDataParallel(model) if count() > 1 else model


def agreed(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank."""
    if count() == 1:
        return make()
    box = [make() if mine() == 0 else None]
    dist.broadcast_object_list(box)
    return cast(T, box[0])


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if count() == 1:
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)
