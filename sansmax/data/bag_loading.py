"""Batches of patients' bags by a budget of tokens, the same ones whatever reads them and wherever a run is taken up.

A step of training sees `batch_size` patients. Their bags lie side by side, without padding, in packs of at most
`pack_tokens` tokens; how they are packed changes memory, and no number. Which patients make a step is a function of
seed and epoch, which tokens of a bag are kept of seed, epoch and patient. Several processes share out the patients of
a step by their tokens, so that each has nearly as many of these; a process reads its own bags only.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sansmax.data.sampling import WHOLE, EpochSampler, Key, Share
from sansmax.errors import InputError

# bags that take less stay in memory between epochs
CACHE_BYTES = 1 << 30


class Bags(Protocol):
    """What is asked of a folder of bags."""

    def read(self, slide_id: str) -> Any:
        """The bag of a slide, with `features` (N, D) and `grid` (N, 2) or None."""
        ...

    def length(self, slide_id: str) -> int:
        """Its number of tokens; nothing of the features is read."""
        ...


class Tokens(NamedTuple):
    """All tokens of one patient: features (N, D), coordinates (N, 2) in tile sides from the middle of each slide."""

    features: np.ndarray
    coords: np.ndarray | None


class Pack(NamedTuple):
    """Bags side by side: `lengths` tokens of each, `indices` (k,) says whose they are.

    Where bags are mixed, the share `shares` (k,) of a bag's tokens is of that patient and the rest of `partners` (k,).
    """

    features: Float[Tensor, "1 t d"]
    coords: Float[Tensor, "1 t 2"] | None
    lengths: tuple[int, ...]
    indices: Int64[Tensor, "k"]
    partners: Int64[Tensor, "k"] | None = None
    shares: Float[Tensor, "k"] | None = None


class Keep(NamedTuple):
    """Random subsets of tokens in training: a share drawn between two bounds, and never more than so many tokens."""

    low: float = 1.0
    high: float = 1.0
    most: int | None = None

    def number(self, n: int, rng: np.random.Generator) -> int:
        """How many of n tokens are kept."""
        count = max(1, round(n * rng.uniform(self.low, self.high)))
        return min(n, count if self.most is None else min(count, self.most))

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray | None:
        """Which of n tokens are kept, in their order; None: all."""
        count = self.number(n, rng)
        return None if count >= n else np.sort(rng.choice(n, count, replace=False))


def mixed(own: Tokens, other: Tokens, rng: np.random.Generator) -> tuple[Tokens, float]:
    """As many tokens as `own` has, a random share of them replaced by tokens of `other`; and the share that is its own.

    The share is drawn evenly between 0 and 1. With targets mixed alike, the answer has to grow with the share of tokens
    that speak for it, which a network of normalised attention does not learn from whole bags alone.
    """
    n = len(own.features)
    kept = round(n * rng.uniform())
    taken = min(n - kept, len(other.features))
    parts = [(own, _some(n, kept, rng)), (other, _some(len(other.features), taken, rng))]
    features = np.concatenate([t.features[i] for t, i in parts])
    coords = [t.coords[i] for t, i in parts if t.coords is not None]
    return Tokens(features, np.concatenate(coords) if len(coords) == 2 else None), kept / len(features)


def _some(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(n, count, replace=False))


class PatientBags:
    """The tokens of each case: all its slides one after the other, coordinates of each slide from its own middle.

    Raises InputError for features of another width than `width`, that are not finite, and, with `needs_coords`, for a
    bag without coordinates.
    """

    def __init__(
        self, bags: Bags, slides: Sequence[Sequence[str]], *, width: int | None = None, needs_coords: bool = False
    ) -> None:
        self.bags, self.slides, self.width, self.needs_coords = bags, [tuple(s) for s in slides], width, needs_coords
        self._kept: dict[int, Tokens] = {}
        self._keeps = False

    def __len__(self) -> int:
        return len(self.slides)

    def length(self, index: int) -> int:
        """Tokens of a case; nothing of the features is read."""
        return sum(self.bags.length(slide) for slide in self.slides[index])

    def keep_in_memory(self, limit: int = CACHE_BYTES) -> bool:
        """Keeps what is read where all of it takes less than `limit` bytes; says whether it does."""
        tokens = sum(self.length(i) for i in range(len(self)))
        self._keeps = tokens * (self.width or 1024) * 4 <= limit
        return self._keeps

    def read(self, index: int) -> Tokens:
        """The tokens of a case."""
        if index in self._kept:
            return self._kept[index]
        parts = [self._slide(slide) for slide in self.slides[index] if self.bags.length(slide)]
        if not parts:
            width = self.width or 0
            return Tokens(np.zeros((0, width), np.float32), np.zeros((0, 2), np.float32))
        whole = parts[0]
        if len(parts) > 1:
            coords = [p.coords for p in parts if p.coords is not None]
            every = len(coords) == len(parts)
            whole = Tokens(np.concatenate([p.features for p in parts]), np.concatenate(coords) if every else None)
        if self._keeps:
            self._kept[index] = whole
        return whole

    def _slide(self, slide: str) -> Tokens:
        bag = self.bags.read(slide)
        features = np.asarray(bag.features)
        if self.width is not None and features.shape[1] != self.width:
            raise InputError(
                f"slide {slide}: features of width {features.shape[1]}, the network reads {self.width}: they are of "
                "another encoder; use the one of training"
            )
        # a sum in float64 is finite where all its terms are
        if not np.isfinite(features.sum(dtype=np.float64)):
            raise InputError(f"slide {slide}: features hold NaN or infinity; extract this slide again, or leave it out")
        grid = bag.grid
        if grid is None and self.needs_coords:
            raise InputError(
                f"slide {slide}: the bag has no coordinates or no side of a tile, and the network reads positions; "
                "tokenize the slide again, or train with --set model.options.pos_embed=none"
            )
        if grid is not None:
            grid = (grid - grid.mean(axis=0, dtype=np.float64)).astype(np.float32)
        return Tokens(features, grid)


def empty_cases(bags: Bags, slides: Sequence[Sequence[str]]) -> list[int]:
    """Which cases have no token in any of their slides."""
    reader = PatientBags(bags, slides)
    return [i for i in range(len(reader)) if reader.length(i) == 0]


def packs_of(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Which bags lie side by side: neighbours, as many as the budget of tokens holds, one at least."""
    packs: list[list[int]] = []
    filled = 0
    for i, n in enumerate(lengths):
        if not packs or filled + n > pack_tokens:
            packs.append([])
            filled = 0
        packs[-1].append(i)
        filled += n
    return packs


def shared_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Which bags each of so many parts has, so that they have nearly as many tokens; a part can be empty.

    The longest bag first, each to the part with the fewest tokens so far (Graham 1969): the fullest part has at most
    4/3 of the tokens that the best way to share them out would give it. In a part the bags are in their order.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = filled.index(min(filled))
        found[least].append(i)
        filled[least] += lengths[i]
    return [sorted(part) for part in found]


def pack(tokens: Sequence[Tokens], indices: Sequence[int]) -> Pack:
    """Bags side by side, in float32; coordinates where all bags have them."""
    features = np.concatenate([t.features for t in tokens]) if len(tokens) > 1 else tokens[0].features
    coords = [t.coords for t in tokens if t.coords is not None]
    places = torch.from_numpy(np.concatenate(coords))[None] if len(coords) == len(tokens) else None
    lengths = tuple(len(t.features) for t in tokens)
    wide = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    return Pack(wide[None], places, lengths, torch.tensor(list(indices)))


class Draw(NamedTuple):
    """The bag at a place of a step, the place of the one it is mixed with (its own: none), and what draws how."""

    position: int
    partner: int
    rng: np.random.Generator


class BagLoader:
    """Steps of training or validation: lists of packs, read ahead by `workers` threads while the last step computes.

    An epoch has `ceil(n / batch_size)` steps of nearly as many patients each. `mix` is the probability that a bag is
    mixed with another one of its step (`mixed`). `set_epoch` and `start_at` are those of `EpochSampler`. Bags have to
    have tokens. With a `share` of several, a step is this part of its patients, by tokens; it can be empty.
    """

    def __init__(
        self,
        reader: PatientBags,
        *,
        batch_size: int,
        pack_tokens: int,
        seed: int = 0,
        shuffle: bool = False,
        keep: Keep | None = None,
        mix: float = 0.0,
        workers: int = 1,
        labels: np.ndarray | None = None,
        share: Share = WHOLE,
    ) -> None:
        if pack_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, got {pack_tokens}")
        steps = -(-len(reader) // max(1, batch_size))
        even = -(-len(reader) // max(1, steps))
        self.sampler = EpochSampler(len(reader), even, seed=seed, shuffle=shuffle, labels=labels)
        self.reader, self.pack_tokens, self.seed, self.workers = reader, pack_tokens, seed, max(1, workers)
        self.keep, self.mix, self.share = keep, mix, share

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def batch_sampler(self) -> EpochSampler:
        """The sampler: trainers look here for it."""
        return self.sampler

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch, see `EpochSampler.set_epoch`."""
        self.sampler.set_epoch(epoch)

    def start_at(self, epoch: int, batch: int) -> None:
        """Takes up an epoch at a step, see `EpochSampler.start_at`."""
        self.sampler.start_at(epoch, batch)

    def __iter__(self) -> Iterator[list[Pack]]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="bags") as pool:
            ahead: list[tuple[list[Key], list[Draw], dict[int, Future[Tokens]]]] = []
            try:
                for keys in self.sampler:
                    own = self._own(keys)
                    needed = dict.fromkeys(i for draw in own for i in (draw.position, draw.partner))
                    ahead.append((keys, own, {i: pool.submit(self.tokens, keys[i]) for i in needed}))
                    if len(ahead) > 1:
                        yield self._packed(*ahead.pop(0))
                while ahead:
                    yield self._packed(*ahead.pop(0))
            finally:
                for _, _, futures in ahead:
                    for future in futures.values():
                        future.cancel()

    def _own(self, keys: list[Key]) -> list["Draw"]:
        """The bags of a step that are of this part, and whom they are mixed with."""
        positions = range(len(keys))
        if self.share.of > 1:
            positions = shared_out([self._length(key) for key in keys], self.share.of)[self.share.number]
        return [self._drawn(keys, i) for i in positions]

    def _length(self, key: Key) -> int:
        """Tokens of a patient in an epoch; nothing of the features is read."""
        n = self.reader.length(key[1])
        return n if self.keep is None else self.keep.number(n, np.random.default_rng([self.seed, *key]))

    def _drawn(self, keys: list[Key], position: int) -> "Draw":
        # numbers of their own, so that mixing does not change which tokens are kept
        rng = np.random.default_rng([self.seed, *keys[position], 1])
        if len(keys) > 1 and rng.random() < self.mix:
            return Draw(position, (position + 1 + int(rng.integers(len(keys) - 1))) % len(keys), rng)
        return Draw(position, position, rng)

    def _packed(self, keys: list[Key], own: list["Draw"], futures: dict[int, "Future[Tokens]"]) -> list[Pack]:
        bags, shares = [], []
        for draw in own:
            tokens, share = futures[draw.position].result(), 1.0
            if draw.partner != draw.position:
                tokens, share = mixed(tokens, futures[draw.partner].result(), draw.rng)
            bags.append(tokens)
            shares.append(share)
        index, partners = [keys[d.position][1] for d in own], [keys[d.partner][1] for d in own]
        groups = packs_of([len(b.features) for b in bags], self.pack_tokens)
        packs = [pack([bags[i] for i in group], [index[i] for i in group]) for group in groups]
        if not self.mix:
            return packs
        return [
            p._replace(partners=torch.tensor([partners[i] for i in g]), shares=torch.tensor([shares[i] for i in g]))
            for p, g in zip(packs, groups, strict=True)
        ]

    def tokens(self, key: Key) -> Tokens:
        """The tokens of a patient in an epoch: all, or a random subset that depends on seed, epoch and patient."""
        whole = self.reader.read(key[1])
        if self.keep is None:
            return whole
        kept = self.keep.draw(len(whole.features), np.random.default_rng([self.seed, *key]))
        if kept is None:
            return whole
        return Tokens(whole.features[kept], None if whole.coords is None else whole.coords[kept])
