"""Batches for training a neural map: from points in memory, or from a stream larger than memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 16_384  # points of a stream that the linear skip is fitted to


class Batches:
    """Batches of normalised points on the device: drawn at random from a tensor, or read in turn from an iterable.

    Args:
        name: of the side, for messages.
        data: points (n, D), or an iterable of (b, D).
        batch: points per draw on this rank.
        map_: the map, which normalises the points of an iterable.
        seed: of the draws.
        rank: of this process.
        world: number of processes.
        width: D.
    """

    def __init__(self, name: str, data, batch: int, map_, seed: int, rank: int, world: int, width: int):
        self.name, self.data, self.batch, self.map, self.drawn, self.width = name, data, batch, map_, 0, width
        self.rank, self.world = rank, world
        if isinstance(data, Tensor):
            self.data = data.float().to(map_.device)
            self.generator = torch.Generator(map_.device)
            self.seed = seed
        else:
            self.iterator, self.rest = iter(()), None

    def draw(self, batches: int) -> Tensor:
        """Return points (batches, batch, D)."""
        self.drawn += 1
        if isinstance(self.data, Tensor):
            # seeded by the draw's number, so that resuming needs no generator state
            self.generator.manual_seed((self.seed * 1_000_003 + self.drawn) * 4099 + self.rank)
            shape = (batches, self.batch)
            return self.data[torch.randint(len(self.data), shape, generator=self.generator, device=self.data.device)]
        whole = self._read(batches * self.batch * self.world)
        points = whole.unflatten(0, (batches, self.world, self.batch))[:, self.rank].flatten(0, 1)
        return self.map.normalised(points.float().to(self.map.device)).unflatten(0, (batches, self.batch))

    def skip(self, count: int, batches: int) -> None:
        """Skip what `count` draws of `batches` batches each would take."""
        if isinstance(self.data, Tensor):
            self.drawn = count
        else:
            for _ in range(count):
                self._read(batches * self.batch * self.world)

    def first(self) -> Tensor:
        """Return all points, or the first few of an iterable."""
        if isinstance(self.data, Tensor):
            return self.data
        return checked_batch(self.name, next(iter(self.data), None), self.width)[:16]

    def sample(self) -> Tensor:
        """Return points for a closed-form fit: all of a tensor, the first of a stream."""
        if isinstance(self.data, Tensor):
            return self.data.double().cpu()
        points, count = [], 0
        for batch in self.data:
            points.append(self.map.points(self.name, checked_batch(self.name, batch, self.width)))
            count += len(batch)
            if count >= SAMPLE:
                break
        return torch.cat(points)

    def _read(self, count: int) -> Tensor:
        while self.rest is None or len(self.rest) < count:
            batch = next(self.iterator, None)
            if batch is None:
                self.iterator = iter(self.data)
                batch = next(self.iterator, None)
            batch = checked_batch(self.name, batch, self.width)
            self.rest = batch if self.rest is None else torch.cat([self.rest, batch])
        points, self.rest = self.rest[:count], self.rest[count:]
        return points


class WithoutFirst:
    """An iterable without its first batches, which are held out."""

    def __init__(self, data: Iterable[Tensor], count: int):
        self.data, self.count = data, count

    def __iter__(self):
        return (batch for i, batch in enumerate(self.data) if i >= self.count)


def checked_batch(name: str, batch: Tensor | None, width: int | None = None) -> Tensor:
    """Return a batch of an iterable, or raise a ValueError saying what is wrong with it."""
    if batch is None:
        raise ValueError(f"{name}: the iterable has no points, or none besides the held-out ones.")
    right = isinstance(batch, Tensor) and batch.ndim == 2 and width in (None, batch.shape[1])
    if not right or not batch.isfinite().all():
        found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        fix = " (a TensorDataset yields tuples: wrap it to yield tensors)" if isinstance(batch, list | tuple) else ""
        raise ValueError(f"{name}: expected batches of finite points (b, {width or 'D'}), got {found}{fix}.")
    return batch
