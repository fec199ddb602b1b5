"""Which images make which batch: a function of seed, epoch and batch number alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sansmax.errors import InputError

Key = tuple[int, ...]


class Share(NamedTuple):
    """Part `number` of the `of` parts that a batch is shared out in."""

    number: int = 0
    of: int = 1

    def positions(self, n: int, pairs: bool = False) -> list[int]:
        """Where the samples of this part stand in a batch of n: side by side, nearly as many in each part.

        With `pairs` the first and the last sample of a batch, the second and the last but one, and so on, are in one
        part, in their order: they are mixed with each other.
        """
        if not pairs:
            return list(range(n * self.number // self.of, n * (self.number + 1) // self.of))
        half = n // 2
        first, end = half * self.number // self.of, half * (self.number + 1) // self.of
        middle = [half] if n % 2 and self.number == 0 else []
        return [*range(first, end), *middle, *range(n - end, n - first)]


WHOLE = Share()


class EpochSampler(Sampler[list[Key]]):
    """Batches of keys (epoch, index); a training run can be taken up at any batch of any epoch.

    The order of an epoch depends on `seed` and the epoch. `labels`, where given, balances the classes: an epoch
    still has n images, of every class as many, the images of a class in turn; an image that comes again within an
    epoch has the key (epoch, index, times before). State is read when the first batch is asked for. With a `share` of
    several, a batch is this part of it, which can be empty; `pairs` as in `Share.positions`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        labels: np.ndarray | None = None,
        share: Share = WHOLE,
        pairs: bool = False,
    ):
        if batch_size < 1 or n < 1:
            raise InputError(f"batches need at least 1 image each, {n} images and batch_size {batch_size} were given")
        if drop_last and n < batch_size:
            raise InputError(f"{n} images make no full batch of {batch_size}; lower batch_size or keep the last batch")
        self.n, self.batch_size, self.seed, self.shuffle, self.drop_last = n, batch_size, seed, shuffle, drop_last
        self.labels = None if labels is None else np.asarray(labels)
        self.share, self.pairs = share, pairs
        self._epoch = 0
        self._start = (0, 0)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return self._epoch

    @property
    def sampler(self) -> "EpochSampler":
        """Itself: trainers look here for the object whose epoch they set."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch: to its first batch, unless `start_at` named a batch of this very epoch."""
        self._epoch = int(epoch)
        if self._epoch != self._start[0]:
            self._start = (self._epoch, 0)

    def start_at(self, epoch: int, batch: int) -> None:
        """Takes up an epoch at a batch; the batches before it are left out."""
        if not 0 <= batch <= len(self):
            raise InputError(f"an epoch has {len(self)} batches, it cannot start at batch {batch}")
        self._epoch = int(epoch)
        self._start = (self._epoch, int(batch))

    def __len__(self) -> int:
        """The batches of a whole epoch, wherever this one starts."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first = self._start
        keys = self._keys(epoch)
        for batch in range(first, len(self)):
            whole = keys[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [whole[i] for i in self.share.positions(len(whole), self.pairs)]

    def _keys(self, epoch: int) -> list[Key]:
        rng = np.random.default_rng([self.seed, epoch])
        if self.labels is not None:
            return _balanced(rng, epoch, self.labels, self.n)
        order = rng.permutation(self.n) if self.shuffle else np.arange(self.n)
        return [(epoch, int(i)) for i in order]

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration starts."""
        return {"epoch": self._start[0], "batch": self._start[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was."""
        self.start_at(state["epoch"], state["batch"])


def _balanced(rng: np.random.Generator, epoch: int, labels: np.ndarray, n: int) -> list[Key]:
    classes = rng.permutation(np.unique(labels))
    keys: list[Key] = []
    for k, label in enumerate(classes):
        mine = np.flatnonzero(labels == label)
        wanted = n // len(classes) + (k < n % len(classes))
        for times in range(-(-wanted // len(mine))):
            drawn = rng.permutation(mine)[: wanted - times * len(mine)]
            keys += [(epoch, int(i), times) if times else (epoch, int(i)) for i in drawn]
    return [keys[i] for i in rng.permutation(len(keys))]
