"""The probabilities of a network over labelled images, and the report on them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sansmax.data.loading import Preprocess, make_loader
from sansmax.data.sets import ImageSet


@torch.no_grad()
def probabilities_of(
    network: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Softmax probabilities `(n, classes)` in float64, in the order of the set."""
    loader = make_loader(images, preprocess, batch_size=batch_size, workers=workers, cache="none")
    network = network.to(device).eval()
    parts = []
    done = 0
    for batch in loader:
        logits = network(batch.images.to(device)).double().cpu()
        parts.append(logits.softmax(1).numpy())
        done += len(logits)
        if progress is not None:
            progress(done, len(images))
    return np.concatenate(parts)
