"""Ranks: the processes of one job, as torchrun starts them. Each has the whole model and its share of the requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pke_fast.errors import InputError, PKEError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # while the first rank measures alone; gloo notices at once when one ends


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    Attributes:
        rank: from 0.
        size: how many there are; 1 where a process works alone, and nothing is sent then.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: every size-th of them."""
        return items[self.rank :: self.size]

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the ranks, in place."""
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)

    def gathered(self, share: Sequence[T]) -> list[T]:
        """All ranks' shares in the order of the items that `mine` was given."""
        if self.size == 1:
            return list(share)
        shares = self.everyones(list(share))
        total = sum(len(part) for part in shares)
        return [shares[i % self.size][i // self.size] for i in range(total)]

    def agree(self, what: str, value: str) -> None:
        """Checks that every rank came with the same.

        Raises:
            InputError: one came with another; on all ranks alike.
        """
        if self.size == 1:
            return
        values = self.everyones(value)
        if len(set(values)) > 1:
            odd = next(rank for rank, theirs in enumerate(values) if theirs != values[0])
            raise InputError(
                f"the ranks came with different {what}",
                expected=f"the same on all {self.size} ranks",
                got=f"rank {odd} differs from rank 0",
                do="start every rank with the same arguments, files and versions",
            )

    def wait(self) -> None:
        """Returns once all ranks are here."""
        if self.size > 1:
            self.everyones(None)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, for all of them."""
        if self.size == 1:
            return work()
        values: list[Any] = [work() if self.first else None]
        with _together():
            torch.distributed.broadcast_object_list(values)
        return cast(T, values[0])

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns; the first rank has done it before the others begin."""
        done = [work()] if self.first else []
        self.wait()
        return done[0] if done else work()

    def everyones(self, mine: T) -> list[T]:
        """What each rank came with, by rank."""
        if self.size == 1:
            return [mine]
        values: list[Any] = [None] * self.size
        with _together():
            torch.distributed.all_gather_object(values, mine)
        return values


ALONE = Ranks()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and nccl's errors, when a peer is gone or doesn't come
        raise PKEError(
            "another rank of the job has ended",
            got=str(error).splitlines()[0],
            do="see its own error above; nothing was written, and with --resume the job goes on from its last state",
        ) from error


def ranks_started() -> int:
    """How many ranks torchrun (or accelerate launch) started; 1 where nobody did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_rank() -> bool:
    """Whether this process is the one that talks, before the ranks have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def ranks_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun (or accelerate launch) started this process among; `ALONE` where nobody did.

    Args:
        device: where this rank works; decides how the ranks talk.

    Raises:
        InputError: two ranks have one GPU; on all ranks alike.
    """
    if ranks_started() < 2:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)  # or every rank would put something on the first GPU too
    with _together():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # objects go by gloo
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if cuda:
            _check_apart(ranks, device)
        yield ranks
        with _together():
            torch.distributed.barrier()  # gloo's threads don't like a peer that leaves first
    finally:
        torch.distributed.destroy_process_group()


def _check_apart(ranks: Ranks, device: str) -> None:
    """Raises InputError where two ranks have one GPU: each may see one alone, so its number doesn't tell."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # torch 2.4 has none
    gpus = ranks.everyones(uuid and str(uuid))
    shared = next((gpu for gpu in gpus if gpu and gpus.count(gpu) > 1), None)
    if shared:
        raise InputError(
            "several ranks on one GPU",
            expected="a GPU for each",
            got=f"ranks {', '.join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared)} on one",
            do="start as many ranks on a machine as it has GPUs, and leave out --device",
        )


def local_device(device: str) -> str:
    """The device of this rank where the user named none: ranks of one machine take one GPU each."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"
