"""Several processes, started by torchrun: which rank this one is, and sums over all of them.

    world = this_world()                   rank 0 of 1 without torchrun: all below then does nothing
    world.all_reduce_(gradient, loss)      in place: the sum over all ranks
    world.all_gather(7)                    [7, 7]: every rank's value, on every rank

Tensors go over NCCL on GPUs and over gloo on CPUs, everything else over gloo. The only file that reads the
environment (runtime/launch.py leaves that to torch). What it does not do: start processes, or restart them.
"""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size` in all, `local_rank` of `local_size` on this machine; from torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def device(self) -> torch.device:
        """This rank's GPU, which becomes torch's current one, or the CPU. ValueError: too few GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ValueError(f"torchrun --nproc_per_node {self.local_size}: GPUs on this machine: {count}")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def all_reduce_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over the ranks, in place: the same bits on all of them."""
        for tensor in tensors:
            if self.size > 1:
                torch.distributed.all_reduce(tensor)

    def broadcast_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by rank 0's, in place."""
        for tensor in tensors:
            if self.size > 1:
                torch.distributed.broadcast(tensor, src=0)

    def all_gather(self, value) -> list:
        """[rank 0's value, rank 1's, ...]; waits until every rank is here."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def first_signal(self, caught: list[int]) -> int:
        """The number of a signal that this rank or another has caught, the same on all ranks; 0: none."""
        return max(self.all_gather(caught[0] if caught else 0))

    def require_same_on_all_ranks(self, facts: dict) -> None:
        """Raise a ValueError that names the first fact whose value differs from rank 0's."""
        first = self.all_gather(facts)[0]
        for name, value in facts.items():
            if value != first[name]:
                here = f"{name} is {value!r} on rank {self.rank}, and {first[name]!r} on rank 0"
                raise ValueError(f"{here}: all machines need the same command and the same files")


SINGLE_PROCESS = World()


def this_world() -> World:
    """From torchrun's environment; ValueError where only a part of it is there."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = {name: os.environ[name] for name in names if name in os.environ}
    if "WORLD_SIZE" not in values:
        return SINGLE_PROCESS
    for name in names:
        if not values.get(name, "").isdecimal():
            remedy = "start it with torchrun, or unset WORLD_SIZE"
            raise ValueError(f"WORLD_SIZE is set, but {name} is {values.get(name)!r}: {remedy}")
    return World(*(int(values[name]) for name in names))
