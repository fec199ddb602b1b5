"""Trains a network from the pixels of whole slides to their labels, without a tile encoder and without tiles.

    python examples/train_on_slides.py --slides 16 --size 4096 --epochs 4

Every slide goes through the network whole, at 1 micrometre per pixel, all its patches with tissue attending to each
other; the gradients are exact, and the memory is that of a chunk. The slides are synthetic: half of them hold planted
tissue. Then an unseen slide is classified, and its scores say where the planted tissue is.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

import sansmax
from sansmax.data.slides.synthetic import write_synthetic_slide
from sansmax.engine.memory import peak_mib
from sansmax.engine.stream_training import streamed_logits

MPP = 1.0


def write(folder: Path, count: int, size: int, first_seed: int) -> list[tuple[Path, int]]:
    """Slides, every other one with planted tissue."""
    slides = []
    for seed in range(first_seed, first_seed + count):
        path, label = folder / f"slide{seed}.tif", seed % 2
        planted = {"planted": 4 * label, "planted_share": 0.1 * label}
        write_synthetic_slide(path, (size, size), mpp=0.5, seed=seed, **planted)
        slides.append((path, label))
    return slides


def main() -> None:
    """Trains, and looks at two unseen slides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096, help="side of a slide in pixels of 0.5 micrometres")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    small = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "pos_embed": "none", "num_classes": 2}
    model = timm.create_model("seqnorm_vit_tiny_patch16_224", **small)
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    with tempfile.TemporaryDirectory() as name:
        slides = write(Path(name), arguments.slides, arguments.size, first_seed=0)
        order = np.random.default_rng(0)
        for epoch in range(arguments.epochs):
            losses, began = [], time.perf_counter()
            for i in order.permutation(len(slides)):
                path, label = slides[i]
                logits = streamed_logits(model, path, mpp=MPP, store="disk")
                loss = F.cross_entropy(logits, torch.tensor([label]))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
            seconds = time.perf_counter() - began
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {seconds:.0f} s, peak {peak_mib():.0f} MiB")
        for path, label in write(Path(name), 2, arguments.size, first_seed=1000):
            found = sansmax.stream(model, path, mpp=MPP, scores=[1])
            probability = found.logits.softmax(1)[0, 1].item()
            print(f"unseen slide, planted {label}: probability {probability:.3f}, {len(found.xy):,} patches")


if __name__ == "__main__":
    main()
