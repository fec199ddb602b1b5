"""A detector on a softmax-free pyramid: train it, measure it, and draw what it finds beside the truth.

    python examples/detection.py
    python examples/detection.py --detector mask_rcnn
    python examples/detection.py --coco train2017 instances_train2017.json --coco-test val2017 instances_val2017.json \
        --model soft_tiny --checkpoint soft_tiny.pth --freeze-norm --min-size 800 --epochs 12 --lr 1e-4

Without --coco it makes mosaics of handwritten digits, writes them in the format of COCO and reads them from there: some
minutes on two cores with a narrow pyramid (`NARROW` below). AP is by COCO's rules at an overlap of one half.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead

import sansmax
from sansmax.data.coco import CocoImages, collate
from sansmax.data.dense_mosaics import DenseMosaics, write_coco
from sansmax.models.dense import mask_rcnn, retinanet
from sansmax.report.dense import average_precision, detection_picture

STEPS = {"retinanet": 800, "mask_rcnn": 300}
NARROW = {"embed_dims": (32, 64, 128, 192), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 6)}


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", choices=["retinanet", "mask_rcnn"], default="retinanet")
    add("--model", help="a network of timm, in full; by default a narrow soft_tiny with an FPN of 64 channels")
    add("--checkpoint", help="weights of the network to start from, official or own")
    add("--freeze-norm", action="store_true", help="leave batch norms as the checkpoint has them")
    add("--coco", nargs=2, metavar=("IMAGES", "ANNOTATIONS"), help="a folder of images and COCO's JSON")
    add("--coco-test", nargs=2, metavar=("IMAGES", "ANNOTATIONS"), help="what to measure on; default: the training set")
    add("--folder", help="where to keep the mosaics; by default a temporary folder")
    add("--mosaics", nargs=2, type=int, default=(1000, 100), metavar=("TRAIN", "TEST"), help="how many to make")
    add("--size", type=int, default=160, help="width and height of a mosaic in pixels")
    add("--min-size", type=int, help="resize images to this shorter side; default: that of the mosaics, 800 for --coco")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default: 800, for mask_rcnn 300")
    length.add_argument("--epochs", type=float)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--hflip", type=float, help="chance to mirror an image; default: 0.5 for --coco, 0 for digits")
    add("--workers", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--picture", default="detection.png")
    args = parser.parse_args()
    if min(args.batch_size, args.steps or 1, *args.mosaics) < 1 or (args.epochs or 1) <= 0 or args.lr <= 0:
        parser.error("--batch-size, --steps, --epochs, --mosaics and --lr must be above 0")
    if args.coco_test and not args.coco:
        parser.error("--coco-test needs --coco, the set to train on")
    return args


def open_sets(args: argparse.Namespace, folder: Path) -> tuple[CocoImages, CocoImages]:
    """The set to train on and the set to measure on."""
    masks = args.detector == "mask_rcnn"
    if args.coco:
        train = CocoImages(*args.coco, masks=masks)
        return train, CocoImages(*args.coco_test, masks=masks) if args.coco_test else train
    found = []
    for split, count in zip(("train", "test"), args.mosaics, strict=True):
        images, annotations = write_coco(DenseMosaics(split, count, args.size), folder / split)
        found.append(CocoImages(images, annotations, masks=masks))
    return found[0], found[1]


def build(args: argparse.Namespace, classes: int) -> torch.nn.Module:
    """The detector; the background is one class more."""
    narrow, size = args.model is None, args.min_size or (800 if args.coco else args.size)
    network, options = args.model or "soft_tiny", NARROW if narrow else {}
    if args.checkpoint:
        network = timm.create_model(network, **options)
        sansmax.load_checkpoint(network, args.checkpoint, adapt_classifier=True)
        options = {}
    given = {"freeze_norm": args.freeze_norm, "min_size": size, "max_size": size * 5 // 3, "model_arguments": options}
    if not narrow:
        return {"retinanet": retinanet, "mask_rcnn": mask_rcnn}[args.detector](network, classes + 1, **given)
    # for small pictures: fewer channels, smaller anchors, fewer regions; and group norm, for a start from nothing
    norm = partial(torch.nn.GroupNorm, 8)
    if args.detector == "mask_rcnn":
        few = {"rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 100, "box_batch_size_per_image": 64}
        model = mask_rcnn(network, classes + 1, out_channels=64, anchor_scale=4.0, **given, **few)
        heads = model.roi_heads
        heads.box_head, heads.box_predictor = TwoMLPHead(64 * 7**2, 256), FastRCNNPredictor(256, classes + 1)
        heads.mask_head, heads.mask_predictor = (
            MaskRCNNHeads(64, [64, 64], 1, norm),
            MaskRCNNPredictor(64, 64, classes + 1),
        )
        return model
    model = retinanet(network, classes + 1, out_channels=64, anchor_scale=2.5, **given)
    anchors = model.anchor_generator.num_anchors_per_location()[0]
    model.head = RetinaNetHead(64, anchors, classes + 1, norm)
    return model


def batches(data: CocoImages, args: argparse.Namespace, steps: int) -> Iterator[tuple]:
    """Batches in a new order each time round, until there were `steps`."""
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=collate)
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            yield batch
            done += 1


def mirrored(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
    """The image and its objects seen in a mirror."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    turned = {**target, "boxes": torch.stack((width - x1, y0, width - x0, y1), 1)}
    if "masks" in target:
        turned["masks"] = target["masks"].flip(-1)
    return image.flip(-1), turned


def train(model: torch.nn.Module, data: CocoImages, args: argparse.Namespace) -> int:
    """AdamW with a short warm-up and a cosine; prints the losses ten times."""
    per_epoch = math.ceil(len(data) / args.batch_size)
    steps = args.steps or (math.ceil(args.epochs * per_epoch) if args.epochs else STEPS[args.detector])
    hflip = args.hflip if args.hflip is not None else 0.5 * bool(args.coco)
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    flat = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": args.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    warm = max(1, min(100, steps // 10))
    rate = lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * i / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, total = time.perf_counter(), 0.0
    model.train()
    for i, (images, targets) in enumerate(batches(data, args, steps)):
        pairs = [mirrored(*p) if torch.rand(()) < hflip else p for p in zip(images, targets, strict=True)]
        images = [image.to(args.device) for image, _ in pairs]
        losses = model(images, [{k: v.to(args.device) for k, v in target.items()} for _, target in pairs])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        every = max(1, steps // 10)
        if (i + 1) % every == 0:
            print(
                f"step {i + 1:4} of {steps}, loss {total / every:.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )
            total = 0.0
    return steps


@torch.no_grad()
def find(model: torch.nn.Module, data: CocoImages, args: argparse.Namespace) -> list[dict]:
    """What the detector finds in every image, as arrays; masks as bool."""
    found = []
    model.eval()
    for images, _ in DataLoader(data, args.batch_size, num_workers=args.workers, collate_fn=collate):
        for objects in model([image.to(args.device) for image in images]):
            arrays = {name: value.cpu() for name, value in objects.items()}
            if "masks" in arrays:
                arrays["masks"] = arrays["masks"][:, 0] > 0.5
            found.append({name: value.numpy() for name, value in arrays.items()})
    return found


def main(args: argparse.Namespace, folder: Path) -> None:
    """The whole way, from the pictures to the picture."""
    torch.manual_seed(args.seed)
    data, test = open_sets(args, folder)
    print(data.describe())
    model = build(args, len(data.classes)).to(args.device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.detector} on {args.model or 'a narrow soft_tiny'}, {count:.1f}M parameters", flush=True)
    steps = train(model, data, args)
    found, truth = find(model, test, args), [test.truth(i) for i in range(len(test))]
    values = average_precision(found, truth)
    mean = sum(values.values()) / len(values)
    worst = min(values, key=lambda label: values[label])
    print(f"AP@0.5 {mean:.3f} on {len(test)} images, lowest {values[worst]:.3f} ({test.classes[worst - 1]})")
    shown = range(min(4, len(test)))
    unseen = "images not trained on" if test is not data else "images, the ones it was trained on"
    path = detection_picture(
        [test.read(i) for i in shown],
        [found[i] for i in shown],
        [truth[i] for i in shown],
        args.picture,
        classes=test.classes,
        least=0.4,
        title=f"AP@0.5 {100 * mean:.0f} % after {steps} steps",
        note=f"{args.detector}, {count:.1f}M parameters; {len(test)} {unseen}; with scores, dashed where wrong",
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
