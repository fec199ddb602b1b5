"""Batches of labelled images, the same ones whatever the number of workers and wherever a run is taken up."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sansmax.data.augment import Augment
from sansmax.data.images import to_tensor
from sansmax.data.kept import KeptPixels
from sansmax.data.preprocess import Preprocess
from sansmax.data.sampling import WHOLE, EpochSampler, Key, Share
from sansmax.data.sets import ArrayImages, ImageSet
from sansmax.errors import unknown_name

__all__ = ["Augment", "Batch", "EpochSampler", "ImageLoader", "Preprocess", "TensorImages", "make_loader"]

CACHE_LIMIT = 1 << 30


class Batch(NamedTuple):
    """Normalised images with their labels, and where they stand in their set."""

    images: Float[Tensor, "b c h w"]
    labels: Int64[Tensor, "b"]
    indices: Int64[Tensor, "b"]


class TensorImages(Dataset[tuple[Tensor, int, int]]):
    """An image set as tensors; item (epoch, index) is augmented by numbers drawn from (seed, epoch, index) alone."""

    def __init__(
        self,
        images: ImageSet,
        preprocess: Preprocess,
        augment: Augment | None = None,
        *,
        seed: int = 0,
        kept: KeptPixels | None = None,
    ):
        self.images, self.preprocess, self.seed, self.kept = images, preprocess, seed, kept
        self.augment = None if augment is None or augment.is_none else augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        index = key[1]
        pixels = self._pixels(index)
        if self.augment is None:
            image = self.preprocess.scaled(pixels)
        else:
            with _seeded(self.seed, key):
                image = self._augmented(pixels)
        return self.preprocess.normalise(image), int(self.images.labels[index]), index

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int, int]]:
        """The items of one batch."""
        return [self[key] for key in keys]

    def _augmented(self, pixels: np.ndarray) -> Tensor:
        assert self.augment is not None
        if self.augment.crop_scale is None:
            return self.augment(self.preprocess.scaled(pixels))
        return self.augment(to_tensor(pixels, self.preprocess.in_chans), self.preprocess.image_size)

    def decode(self, index: int) -> np.ndarray:
        """The pixels before anything random: resized; whole where a random part of them is to be resized."""
        pixels = self.images.read(index)
        whole = self.augment is not None and self.augment.crop_scale is not None
        return pixels if whole else self.preprocess.resize(pixels)

    def _pixels(self, index: int) -> np.ndarray:
        if self.kept is None:
            return self.decode(index)
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self.decode(index)
            self.kept.put(index, pixels)
        return pixels


@contextmanager
def _seeded(seed: int, key: Key) -> Iterator[None]:
    """Sets the generators of torch, numpy and Python for one image, and leaves them as they were."""
    words = np.random.SeedSequence([seed, *key]).generate_state(3, np.uint32).tolist()
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(words[0])
        random.seed(words[1])
        np.random.seed(words[2])  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


class ImageLoader(DataLoader):
    """A torch DataLoader that gives `Batch`es in the order of its `EpochSampler`.

    Reading from it draws nothing from the global random generators. Workers start when the first batch is asked
    for, so `set_epoch` and `start_at` still count after `iter(loader)`.
    """

    batch_sampler: EpochSampler

    def set_epoch(self, epoch: int) -> None:
        """Goes to an epoch, see `EpochSampler.set_epoch`."""
        self.batch_sampler.set_epoch(epoch)

    def start_at(self, epoch: int, batch: int) -> None:
        """Takes up an epoch at a batch, see `EpochSampler.start_at`."""
        self.batch_sampler.start_at(epoch, batch)

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except (OSError, EOFError) as error:
            # a worker that ends while it hands over a batch breaks the connection before it counts as ended
            workers = getattr(getattr(self, "_iterator", None), "_workers", [])
            if not wait([w.sentinel for w in workers], timeout=1):
                raise
            raise RuntimeError("DataLoader worker (pid unknown) ended while it handed over a batch") from error


def make_loader(
    image_set: ImageSet,
    preprocess: Preprocess,
    augment: Augment | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    drop_last: bool | None = None,
    balanced: bool = False,
    cache: str = "auto",
    pin_memory: bool = False,
    share: Share = WHOLE,
    pairs: bool = False,
) -> ImageLoader:
    """A loader over an image set.

    `drop_last` leaves out an incomplete last batch; by default where the order is shuffled and there is a full one.
    `balanced` shows every class equally often. `cache` "auto" keeps decoded, resized pixels in memory where they
    take less than 1 GiB; "none" does not. With a `share` of several, this part of each batch, see `EpochSampler`.
    """
    if cache not in ("auto", "none"):
        raise unknown_name("cache", cache, ("auto", "none"))
    dataset = TensorImages(image_set, preprocess, augment, seed=seed)
    if cache == "auto":
        dataset.kept = _room_for(dataset)
    sampler = EpochSampler(
        len(image_set),
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=(shuffle and len(image_set) >= batch_size) if drop_last is None else drop_last,
        labels=image_set.labels if balanced else None,
        share=share,
        pairs=pairs,
    )
    return ImageLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate, (preprocess.in_chans, *preprocess.image_size)),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # the loader draws a seed for its workers, here and not from the global generator
        generator=torch.Generator(),
    )


def _room_for(dataset: TensorImages) -> KeptPixels | None:
    """Memory for all images, judged by the first few; None where it is too much or nothing is gained."""
    images = dataset.images
    if len(images) == 0:
        return None
    probe = [images.read(i) for i in range(min(8, len(images)))]
    if isinstance(images, ArrayImages) and probe[0].shape[:2] == dataset.preprocess.image_size:
        return None
    whole = dataset.augment is not None and dataset.augment.crop_scale is not None
    slot = max((p if whole else dataset.preprocess.resize(p)).nbytes for p in probe)
    # slots begin where a uint16 may begin
    slot += slot % 2
    return KeptPixels(len(images), slot) if slot * len(images) < CACHE_LIMIT else None


def _collate(shape: tuple[int, ...], items: list[tuple[Tensor, int, int]]) -> Batch:
    if not items:
        # a part of a batch without images
        none = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, *shape), none, none)
    images, labels, indices = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
