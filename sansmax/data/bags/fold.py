"""Which cases train, choose and test: one split, whose parts share no case."""

from collections.abc import Mapping
from dataclasses import dataclass

from sansmax.errors import InputError, listed

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Fold:
    """The ids of one split: `train` is fitted, `val` stops training and chooses, `test` is looked at once.

    Raises InputError where a case is in two parts, or where there is nothing to train on.
    """

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            both = sorted(set(getattr(self, a)) & set(getattr(self, b)))
            if both:
                raise InputError(
                    f"{len(both)} patients are both in {a} and in {b}: {listed(both, 10)}; "
                    "a patient belongs to one part"
                )
        if not self.train:
            raise InputError("a split needs patients to train on; its part 'train' is empty")

    def as_mapping(self) -> Mapping[str, tuple[str, ...]]:
        """The parts by name; empty ones are left out."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name)}
