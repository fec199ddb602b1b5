"""A class for every pixel from a softmax-free pyramid: train it, measure it, and draw what it finds beside the truth.

    python examples/segmentation.py
    python examples/segmentation.py --images train/images --masks train/masks \
        --test-images val/images --test-masks val/masks --classes 150 --crop 512 \
        --model soft_tiny --checkpoint soft_tiny.pth --freeze-norm --epochs 100 --lr 1e-4

Without --images it makes mosaics of handwritten digits, writes them as folders of images and masks and reads them from
there: some minutes on two cores with a narrow pyramid (`NARROW` below). The classes are the background and ten digits.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import sansmax
from sansmax.data.dense_mosaics import DenseMosaics, write_masks
from sansmax.data.mask_folder import MaskFolder
from sansmax.models.dense import Segmenter, segmenter
from sansmax.report.dense import class_iou, segmentation_picture

NARROW = {"embed_dims": (32, 64, 128, 192), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 6)}


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a network of timm, in full; by default a narrow soft_tiny with an FPN of 64 channels")
    add("--checkpoint", help="weights of the network to start from, official or own")
    add("--freeze-norm", action="store_true", help="leave batch norms as the checkpoint has them")
    add("--images", help="a folder of images to train on")
    add("--masks", help="a folder of masks with the same names")
    add("--test-images", help="images to measure on; default: those of the training")
    add("--test-masks", help="their masks")
    add("--classes", type=int, help="how many classes the masks have; default: looked up in the masks")
    add("--folder", help="where to keep the mosaics; by default a temporary folder")
    add("--mosaics", nargs=2, type=int, default=(1000, 100), metavar=("TRAIN", "TEST"), help="how many to make")
    add("--size", type=int, default=160, help="width and height of a mosaic in pixels")
    add(
        "--crop",
        type=int,
        help="train on pieces of this width and height; default: four fifths of a mosaic, 512 for --images",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default: 800")
    length.add_argument("--epochs", type=float)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--hflip", type=float, help="chance to mirror an image; default: 0.5 for --images, 0 for digits")
    add("--workers", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--picture", default="segmentation.png")
    args = parser.parse_args()
    if min(args.batch_size, args.steps or 1, *args.mosaics) < 1 or (args.epochs or 1) <= 0 or args.lr <= 0:
        parser.error("--batch-size, --steps, --epochs, --mosaics and --lr must be above 0")
    if bool(args.images) != bool(args.masks) or bool(args.test_images) != bool(args.test_masks):
        parser.error("images and masks go together: give --images with --masks, --test-images with --test-masks")
    if args.test_images and not args.images:
        parser.error("--test-images needs --images and --masks, the set to train on")
    args.crop = args.crop or (512 if args.images else args.size * 4 // 5)
    args.hflip = args.hflip if args.hflip is not None else 0.5 * bool(args.images)
    return args


def open_sets(args: argparse.Namespace, folder: Path) -> tuple[MaskFolder, MaskFolder]:
    """The set to train on and the set to measure on."""
    if args.images:
        train = MaskFolder(args.images, args.masks, args.classes)
        if not args.test_images:
            return train, train
        return train, MaskFolder(args.test_images, args.test_masks, len(train.classes))
    classes = ["background", *DenseMosaics.classes]
    found = []
    for split, count in zip(("train", "test"), args.mosaics, strict=True):
        images, masks = write_masks(DenseMosaics(split, count, args.size), folder / split)
        found.append(MaskFolder(images, masks, classes))
    return found[0], found[1]


class Pieces(Dataset):
    """A piece of `size` x `size` px from a random place of every image, mirrored at times.

    Where an image is smaller it is filled up with zeros that do not count.
    """

    def __init__(self, data: MaskFolder, size: int, hflip: float) -> None:
        self.data, self.size, self.hflip = data, size, hflip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.data[i]
        right, below = (max(0, self.size - n) for n in (mask.shape[1], mask.shape[0]))
        image = F.pad(image, (0, right, 0, below))
        mask = F.pad(mask, (0, right, 0, below), value=self.data.ignore)
        top, left = (int(torch.randint(n - self.size + 1, ())) for n in mask.shape)
        here = (..., slice(top, top + self.size), slice(left, left + self.size))
        image, mask = image[here], mask[here]
        return (image.flip(-1), mask.flip(-1)) if torch.rand(()) < self.hflip else (image, mask)


def build(args: argparse.Namespace, classes: int) -> Segmenter:
    """The network with its head."""
    narrow = args.model is None
    name, options = args.model or "soft_tiny", NARROW if narrow else {}
    widths = {"out_channels": 64, "head_channels": 64} if narrow else {}
    if args.checkpoint:
        network = timm.create_model(name, **options)
        sansmax.load_checkpoint(network, args.checkpoint, adapt_classifier=True)
        return segmenter(network, classes, freeze_norm=args.freeze_norm, **widths)
    return segmenter(name, classes, freeze_norm=args.freeze_norm, model_arguments=options, **widths)


def batches(data: Dataset, args: argparse.Namespace, steps: int) -> Iterator[tuple]:
    """Batches in a new order each time round, until there were `steps`."""
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers)
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            yield batch
            done += 1


def train(model: torch.nn.Module, data: MaskFolder, args: argparse.Namespace) -> int:
    """AdamW with a short warm-up and a cosine; prints the loss ten times."""
    per_epoch = math.ceil(len(data) / args.batch_size)
    steps = args.steps or (math.ceil(args.epochs * per_epoch) if args.epochs else 800)
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    flat = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": args.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    warm = max(1, min(100, steps // 10))
    rate = lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, total, every = time.perf_counter(), 0.0, max(1, steps // 10)
    model.train()
    for i, (images, masks) in enumerate(batches(Pieces(data, args.crop, args.hflip), args, steps)):
        logits = model(images.to(args.device))
        loss = F.cross_entropy(logits, masks.to(args.device), ignore_index=data.ignore)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (i + 1) % every == 0:
            print(
                f"step {i + 1:4} of {steps}, loss {total / every:.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )
            total = 0.0
    return steps


@torch.no_grad()
def find(model: torch.nn.Module, data: MaskFolder, device: str) -> list[np.ndarray]:
    """The class of every pixel of every image, whole images one by one since they differ in size."""
    model.eval()
    return [model(data[i][0][None].to(device)).argmax(1)[0].cpu().numpy() for i in range(len(data))]


def main(args: argparse.Namespace, folder: Path) -> None:
    """The whole way, from the pictures to the picture."""
    torch.manual_seed(args.seed)
    data, test = open_sets(args, folder)
    print(f"{len(data)} images to train on, {len(test)} to measure on, {len(data.classes)} classes")
    model = build(args, len(data.classes)).to(args.device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"FPN on {args.model or 'a narrow soft_tiny'}, {count:.1f}M parameters", flush=True)
    steps = train(model, data, args)
    found, truth = find(model, test, args.device), [test.truth(i) for i in range(len(test))]
    values = class_iou(found, truth, len(test.classes), test.ignore)
    mean, worst = float(np.nanmean(values)), int(np.nanargmin(values))
    print(f"mIoU {mean:.3f} on {len(test)} images, lowest {values[worst]:.3f} ({test.classes[worst]})")
    shown = range(min(4, len(test)))
    unseen = "images not trained on" if test is not data else "images, the ones it was trained on"
    path = segmentation_picture(
        [test.read(i) for i in shown],
        [found[i] for i in shown],
        [truth[i] for i in shown],
        args.picture,
        classes=test.classes,
        ignore=test.ignore,
        title=f"mIoU {100 * mean:.0f} % after {steps} steps",
        note=f"FPN on a pyramid, {count:.1f}M parameters; {len(test)} {unseen}",
    )
    print(f"picture: {path}")


def run() -> None:
    """`main`, with an end in one line where the input is wrong or Ctrl-C is pressed."""
    args = arguments()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            main(args, Path(args.folder or temporary))
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    run()
