"""A picture in, an answer out: the same path for the command line, notebooks and tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.data.images import check_pixels, read_image
from sansmax.data.loading import Preprocess
from sansmax.data.tokens import PixelSource, open_pixels
from sansmax.engine.build import build_preprocess, check_image_size, patch_size, takes_mask
from sansmax.engine.config import DataConfig
from sansmax.engine.explain import occlusion_scores, token_scores
from sansmax.engine.predict_slide import SlideOptions, predict_slide
from sansmax.engine.run import Run
from sansmax.engine.sources import is_slide
from sansmax.engine.stream import stream_tokens
from sansmax.errors import InputError, unknown_name
from sansmax.models.vit import VisionTransformer

NATIVE = "native"
# squares painted over to explain networks that have no weight per token, along each side of the picture
OCCLUSION_CELLS = 14


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture.

    `probabilities[i]` is that of `classes[i]`. `scores` (rows, columns), where asked for, is the effect of each token
    on the log-odds of `score_class`: positive speaks for it. `xy_level0` (rows * columns, 2) is the upper left corner
    (x, y) of each token in pixels of the picture as it is stored, in the order of `scores.ravel()`. The tokens of a
    slide are no grid: `scores` (N,) are those of its patches with tissue, squares of `side` level-0 pixels.
    """

    name: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    scores: np.ndarray | None = None
    score_class: str | None = None
    score_method: str | None = None
    xy_level0: np.ndarray | None = None
    side: float | None = None

    @property
    def predicted(self) -> str:
        """The class with the largest probability."""
        return self.classes[int(self.probabilities.argmax())]

    def to_dict(self) -> dict[str, Any]:
        """Name, predicted class and probabilities, as plain values for JSON."""
        pairs = zip(self.classes, self.probabilities.tolist(), strict=True)
        return {"name": self.name, "predicted": self.predicted, "probabilities": dict(pairs)}


class Predictor:
    """A network with its classes and preprocessing, ready for pictures."""

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        preprocess: Preprocess,
        device: str | torch.device = "cpu",
        tta_hflip: bool = False,
    ) -> None:
        self.network = network.to(device).eval()
        self.classes, self.preprocess, self.device = tuple(classes), preprocess, torch.device(device)
        self.tta_hflip = tta_hflip

    @classmethod
    def of(cls, run_or_model: "str | Path | Run | nn.Module | Predictor", device: str = "auto") -> "Predictor":
        """From the folder of a run, an opened run, or a network of timm's registry (classes by its label names)."""
        if isinstance(run_or_model, Predictor):
            return run_or_model
        where = pick_device(device)
        if isinstance(run_or_model, nn.Module):
            return cls._of_network(run_or_model, where)
        run = run_or_model if isinstance(run_or_model, Run) else Run.open(run_or_model)
        return cls(run.load_model(where), run.classes, run.preprocess, where, run.config.tta_hflip)

    @classmethod
    def _of_network(cls, network: nn.Module, device: str) -> "Predictor":
        cfg: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
        num_classes = int(getattr(network, "num_classes", 0))
        if not cfg or num_classes < 1:
            raise InputError("the model has no configuration or no classes; make it with timm.create_model(...)")
        chans, *size = getattr(network, "in_chans", None) or cfg["input_size"][0], *cfg["input_size"][1:]
        if (embed := getattr(network, "patch_embed", None)) is not None and getattr(embed, "img_size", None):
            size = list(embed.img_size)
        names = cfg.get("label_names") or [str(i) for i in range(num_classes)]
        data = DataConfig(image_size=(int(size[0]), int(size[1])))
        return cls(network, names, build_preprocess(network, data, int(chans)), device)

    def class_index(self, name: str | int) -> int:
        """The number of a class given by its name or number; InputError with the nearest names."""
        if isinstance(name, int) and not isinstance(name, bool):
            if not 0 <= name < len(self.classes):
                raise InputError(f"class {name} does not exist; there are {len(self.classes)}, counted from 0")
            return name
        if name not in self.classes:
            raise unknown_name("class", str(name), self.classes)
        return self.classes.index(str(name))

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "b c h w"]) -> np.ndarray:
        """Class probabilities `(b, classes)` in float64 of preprocessed pictures.

        With `tta_hflip` the mean over each picture and its mirror image.
        """
        images = images.to(self.device)
        p = self.network(images).double().softmax(1)
        if self.tta_hflip:
            p = (p + self.network(images.flip(-1)).double().softmax(1)) / 2
        return p.cpu().numpy()

    def __call__(
        self,
        picture: str | Path | np.ndarray,
        *,
        image_size: int | str | None = None,
        scores: bool | str | int = False,
        chunk_tokens: int = 65536,
        progress: Callable[[int, int], None] | None = None,
        name: str | None = None,
        slide: SlideOptions | None = None,
    ) -> Prediction:
        """The answer for a picture given by its path or its pixels.

        `image_size` None: the size of training; a number of pixels; or "native": the picture at its own resolution,
        in chunks of tokens (never mirrored). `scores` True explains the predicted class, a class name or number that
        class. A slide (several levels, or huge) is read at its own resolution unless a number of pixels is
        given, or as `slide` says; with these options any picture is.
        """
        if slide is not None or (image_size in (None, NATIVE) and is_slide(picture)):
            return predict_slide(self, picture, slide, scores=scores, progress=progress, name=name)
        name = name or (str(picture) if isinstance(picture, str | Path) else "picture")
        if image_size == NATIVE:
            pixels = open_pixels(picture) if isinstance(picture, str | Path) else picture
            return self._native(pixels, name, scores, chunk_tokens, progress)
        if isinstance(image_size, str):
            raise InputError(f'image_size is a number of pixels or "{NATIVE}", got {image_size!r}')
        pixels = read_image(picture) if isinstance(picture, str | Path) else picture
        check_pixels(pixels)
        preprocess = self._resized(image_size)
        x = preprocess(pixels)[None].to(self.device)
        probabilities = self.probabilities(x)[0]
        if scores is False:
            return Prediction(name, self.classes, probabilities)
        index = int(probabilities.argmax()) if scores is True else self.class_index(scores)
        if isinstance(self.network, VisionTransformer) and takes_mask(self.network):
            values, method = token_scores(self.network, x, [index])[0], "mask gradient"
        else:
            side = patch_size(self.network)
            step = side[0] if side else max(1, -(-min(x.shape[-2:]) // OCCLUSION_CELLS))
            values, method = occlusion_scores(self.network, x, index, step), "occlusion"
        grid = values.double().cpu().numpy()
        corners = token_corners(grid.shape, preprocess, pixels.shape[:2])
        return Prediction(name, self.classes, probabilities, grid, self.classes[index], method, corners)

    def _resized(self, image_size: int | None) -> Preprocess:
        if image_size is None:
            return self.preprocess
        check_image_size(self.network, (image_size, image_size))
        settings = {**self.preprocess.to_dict(), "image_size": (image_size, image_size)}
        return Preprocess.from_dict(settings)

    def _native(
        self,
        pixels: np.ndarray,
        name: str,
        scores: bool | str | int,
        chunk_tokens: int,
        progress: Callable[[int, int], None] | None,
    ) -> Prediction:
        patch = patch_size(self.network)
        obstacle = getattr(self.network, "stream_obstacle", "it is not a network of this package")
        if patch is None or not isinstance(self.network, VisionTransformer) or obstacle is not None:
            raise InputError(
                f"{type(self.network).__name__} cannot read a picture at its own resolution: {obstacle}. Give "
                "--image-size in pixels, or train a network such as seqnorm_vit_tiny_patch16_224"
            )
        p = self.preprocess
        source = PixelSource(pixels, patch, in_chans=p.in_chans, mean=p.mean, std=p.std)
        asked = "predicted" if scores is True else [] if scores is False else [self.class_index(scores)]
        result = stream_tokens(self.network, source, scores=asked, chunk_tokens=chunk_tokens, progress=progress)
        probabilities = result.logits.double().softmax(1)[0].cpu().numpy()
        if result.scores is None:
            return Prediction(name, self.classes, probabilities)
        rows, columns = source.grid
        yx = np.indices((rows, columns)).reshape(2, -1).T * np.array(patch)
        grid = result.scores[:, 0].reshape(rows, columns)
        return Prediction(
            name,
            self.classes,
            probabilities,
            grid,
            self.classes[result.score_classes[0]],
            "mask gradient",
            yx[:, ::-1].copy(),
        )


def predict(
    path_or_array: str | Path | np.ndarray, run_or_model: str | Path | Run | nn.Module | Predictor, **options: Any
) -> Prediction:
    """The answer of a run (or a network of timm's) for one picture; options are those of `Predictor.__call__`."""
    return Predictor.of(run_or_model)(path_or_array, **options)


def pick_device(device: str) -> str:
    """ "auto" is the first of cuda, mps, cpu that is there."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def input_box(preprocess: Preprocess, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of the network's input in pixels of the picture of `size` (height, width).

    With "pad" the input reaches beyond the picture.
    """
    height, width = size
    if preprocess.resize_mode == "squash":
        return 0.0, 0.0, float(width), float(height)
    ratios = [want / have for want, have in zip(preprocess.image_size, size, strict=True)]
    scale = min(ratios) if preprocess.resize_mode == "pad" else max(ratios) / preprocess.crop_pct
    shown_h, shown_w = (side / scale for side in preprocess.image_size)
    left, upper = (width - shown_w) / 2, (height - shown_h) / 2
    return left, upper, left + shown_w, upper + shown_h


def token_corners(grid: tuple[int, ...], preprocess: Preprocess, size: tuple[int, int]) -> np.ndarray:
    """The upper left corner (x, y) of each token in pixels of the picture, `(rows * columns, 2)`."""
    left, upper, right, lower = input_box(preprocess, size)
    y, x = np.indices(grid).reshape(2, -1)
    return np.stack([left + x * (right - left) / grid[1], upper + y * (lower - upper) / grid[0]], axis=1)


def shown_picture(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The part of a picture that the network saw, at the picture's own resolution, padded where it was."""
    left, upper, right, lower = (round(v) for v in input_box(preprocess, pixels.shape[:2]))
    height, width = pixels.shape[:2]
    inside = pixels[max(upper, 0) : min(lower, height), max(left, 0) : min(right, width)]
    around = [(max(-upper, 0), max(lower - height, 0)), (max(-left, 0), max(right - width, 0)), (0, 0)]
    fill = round(sum(preprocess.mean) / len(preprocess.mean) * np.iinfo(pixels.dtype).max)
    return np.pad(inside, around[: pixels.ndim], constant_values=fill)
