"""Learning from a trained network: its probabilities, or its answers, beside the labels.

soft  T^2 KL(q_T || p_T), with q_T and p_T the softmax of the teacher's and the student's logits divided by T:
      https://arxiv.org/abs/1503.02531
hard  cross entropy with the class that the teacher finds most probable: https://arxiv.org/abs/2012.12877, equation 3

The loss of an image is (1 - alpha) that of its label + alpha that of the teacher, both multiplied by what the image
counts. The teacher sees the very picture that the student sees, moved and mixed as it is, in its own size, channels,
mean and standard deviation. It is no part of the module that is trained: not in checkpoints, averages or optimisers.

Shapes: b images, c classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from sansmax.data.images import luminance
from sansmax.data.preprocess import Preprocess
from sansmax.engine.build import create_model, weights_sha256
from sansmax.engine.config import DataConfig, DistillConfig, ModelConfig
from sansmax.engine.losses import Losses, in_full
from sansmax.engine.run import Run, is_run
from sansmax.errors import InputError, listed
from sansmax.models.weights import load_checkpoint


class Teacher:
    """A trained network in evaluation mode, and how it wants its pictures.

    `student` is how the pictures come, `own` how the network takes them. `order` says which of its classes is which of
    the student's. It is no module, so that nothing that walks over modules finds it.
    """

    def __init__(
        self,
        network: nn.Module,
        student: Preprocess,
        own: Preprocess,
        config: DistillConfig,
        order: Sequence[int] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.student, self.own, self.config = student, own, config
        self.order = None if order is None or list(order) == sorted(order) else list(order)

    @property
    def sha256(self) -> str:
        """Of the weights: a run that is taken up needs the same teacher."""
        return weights_sha256(self.network)

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "b _ _ _"]) -> Float[Tensor, "b c"]:
        """The teacher's logits for a batch of the student's, in the student's order of the classes."""
        self.network.to(images.device)
        logits = in_full(self.network(as_preprocessed(images, self.student, self.own)))
        return logits if self.order is None else logits[:, self.order]

    def blended(self, losses: Losses, student: Float[Tensor, "b c"], images: Float[Tensor, "b _ _ _"]) -> Losses:
        """Losses of the labels and of the teacher, by `alpha`."""
        teacher, student = self.logits(images), in_full(student)
        if self.config.kind == "soft":
            taught = soft_losses(student, teacher, self.config.temperature)
        else:
            taught = F.cross_entropy(student, teacher.argmax(1), reduction="none")
        alpha = self.config.alpha
        return Losses((1 - alpha) * losses.losses + alpha * losses.weights * taught, losses.weights)


def soft_losses(student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"], temperature: float) -> Float[Tensor, "b"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image.

    T^2 keeps the size of the gradient, which falls as 1 / T^2.
    """
    p, q = ((x / temperature).log_softmax(1) for x in (student, teacher))
    return temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)


def as_preprocessed(images: Float[Tensor, "b _ _ _"], have: Preprocess, want: Preprocess) -> Float[Tensor, "b _ _ _"]:
    """A batch of one preprocessing as that of another: channels, size, mean and standard deviation.

    The picture's frame stays that of `have`, whatever the other's way to resize. Grey is repeated to three channels,
    colour becomes its luminance; sizes change by antialiased resampling.
    """
    same = (have.image_size, have.in_chans, _scale(have)) == (want.image_size, want.in_chans, _scale(want))
    if same:
        return images
    mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (have.mean, have.std))
    x = images * std + mean
    if have.in_chans != want.in_chans:
        x = x.expand(-1, 3, -1, -1) if want.in_chans == 3 else luminance(x)
    if have.image_size != want.image_size:
        x = F.interpolate(x, want.image_size, mode=want.interpolation, align_corners=False, antialias=True)
    mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (want.mean, want.std))
    return (x - mean) / std


def _scale(p: Preprocess) -> tuple[tuple[float, ...], ...]:
    return tuple(v * (p.in_chans if len(v) == 1 else 1) for v in (p.mean, p.std))


def load_teacher(distill: DistillConfig, classes: Sequence[str], student: Preprocess) -> Teacher | None:
    """The teacher of the configuration, None where there is none.

    `classes` are those of the student, `student` how its pictures are preprocessed. A run's network is taken with its
    own preprocessing; its classes must be the same, in any order. A network of timm's registry takes pictures by its
    `pretrained_cfg`: with published weights at the size they were made for, with `teacher_checkpoint` at the student's.

    Raises InputError where there is no such run or network, or its classes are others.
    """
    if distill.teacher is None:
        return None
    folder = Path(distill.teacher)
    if is_run(folder):
        if distill.teacher_checkpoint is not None:
            raise InputError(f"distill.teacher {folder} is a run with weights; leave out distill.teacher_checkpoint")
        run = Run.open(folder)
        if set(run.classes) != set(classes):
            raise InputError(
                f"the teacher {folder} tells apart {listed(run.classes)}, the data have {listed(list(classes))}; "
                "a teacher needs the same classes"
            )
        order = [run.classes.index(name) for name in classes]
        return Teacher(run.load_model(), student, run.preprocess, distill, order)
    network, own = _named_teacher(distill, len(classes), student)
    return Teacher(network, student, own, distill)


def _named_teacher(distill: DistillConfig, num_classes: int, student: Preprocess) -> tuple[nn.Module, Preprocess]:
    name, file = distill.teacher, distill.teacher_checkpoint
    assert name is not None
    if file is None:
        network = _created(name, None, 3, True)
        if getattr(network, "num_classes", num_classes) != num_classes:
            raise InputError(
                f"the published weights of the teacher {name} are of {getattr(network, 'num_classes', '?')} classes, "
                f"the data have {num_classes}; train a teacher on these data first and give its run to distill.teacher"
            )
        return network, _preprocess_of(network, None, 3)
    for in_chans in dict.fromkeys((3, student.in_chans)):
        network = _created(name, student.image_size, in_chans, False, num_classes)
        try:
            load_checkpoint(network, file, resize_pos_embed=True)
        except InputError:
            if in_chans == student.in_chans:
                raise
            continue
        return network, _preprocess_of(network, student.image_size, in_chans)
    raise AssertionError


def _created(
    name: str, size: tuple[int, int] | None, in_chans: int, pretrained: bool, num_classes: int | None = None
) -> nn.Module:
    import timm

    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        raise InputError(
            f"the teacher {name} is neither the folder of a run nor a network of timm's registry (`sansmax models`)"
        )
    if size is not None:
        return create_model(ModelConfig(name=name), DataConfig(image_size=size), num_classes or 0, in_chans)
    try:
        return timm.create_model(name, pretrained=pretrained, in_chans=in_chans)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise InputError(
            f"the published weights of the teacher {name} cannot be had: {error}; give distill.teacher_checkpoint, or "
            "the folder of a run"
        ) from None


def _preprocess_of(network: nn.Module, size: tuple[int, int] | None, in_chans: int) -> Preprocess:
    cfg = resolve_model_data_config(network)
    mean, std = ((sum(v) / len(v),) if len(v) not in (1, in_chans) else tuple(v) for v in (cfg["mean"], cfg["std"]))
    way = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    return Preprocess(size or tuple(cfg["input_size"][1:]), in_chans, mean, std, interpolation=way)
