"""Which tokens speak for an answer: the gradient of the mask, and occlusion for networks without one.

Every sum over tokens in our networks runs over weights w_j, 1 for a token that is there and 0 for one that is not.
The derivative of the answer by w_j at w = 1 is the first-order effect of token j, signed, exact for all tokens in one
backward pass of linear cost: removing token j lowers the answer by about its score.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.errors import InputError, unknown_name
from sansmax.models.vit import VisionTransformer

# what a network of bags is asked, by its task: the quantity that a score is a change of
QUANTITY = {"classification": "log-odds", "multilabel": "log-odds", "regression": "value", "survival": "risk"}


def log_odds(logits: Float[Tensor, "b k"], class_index: int) -> Float[Tensor, "b"]:
    """log(p / (1 - p)) of one class: its logit less the log-sum-exp of the others."""
    others = torch.cat((logits[:, :class_index], logits[:, class_index + 1 :]), dim=1)
    return logits[:, class_index] - others.logsumexp(1)


def answer_of(logits: Float[Tensor, "b k"], index: int, task: str = "classification") -> Float[Tensor, "b"]:
    """The number that scores explain: log-odds of a class, the log-odds of a label, a value, or the log-risk.

    The outputs of "multilabel" are the log-odds of labels already; those of "regression" are values; "survival" has one
    output. Raises InputError for another task, and for an `index` that is none of the outputs.
    """
    if task not in QUANTITY:
        raise unknown_name("task", task, QUANTITY)
    if task == "classification":
        check_class(index, logits.shape[1])
        return log_odds(logits, index)
    if not 0 <= index < logits.shape[1]:
        raise InputError(f"output {index} does not exist: the network has {logits.shape[1]}, counted from 0")
    return logits[:, index]


def bag_scores(
    network: nn.Module,
    features: Float[Tensor, "n d"],
    coords: Float[Tensor, "n 2"] | None,
    index: int,
    task: str = "classification",
) -> Float[Tensor, "n"]:
    """The gradient of a bag's answer by the weight of each of its tokens: the effect of removing it, to first order.

    `coords` are the tokens' corners in tile sides, `index` the class or output that is explained, `task` says what its
    answer is (`answer_of`). Evaluation mode is the caller's to set. Raises InputError for an empty bag.
    """
    if not len(features):
        raise InputError("an empty bag has no tokens to explain; leave it out")
    weight = features.new_ones(1, len(features), requires_grad=True)
    with torch.enable_grad():
        logits = network(features[None], None if coords is None else coords[None], mask=weight)
        (scores,) = torch.autograd.grad(answer_of(logits, index, task).sum(), weight)
    return scores[0].detach()


def token_scores(
    model: VisionTransformer, images: Float[Tensor, "b c h w"], class_index: Sequence[int]
) -> Float[Tensor, "b gh gw"]:
    """The gradient of each image's log-odds of its class by the weight of each patch, on the token grid.

    Positive: the patch speaks for the class. The mean over the batch does not enter: images are independent. Evaluation
    mode is the caller's to set. Raises InputError unless `class_index` is one class of the network for each image.
    """
    if len(class_index) != images.shape[0]:
        raise InputError(
            f"scores need one class for each image: {images.shape[0]} images, {len(class_index)} class_index"
        )
    grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    for index in class_index:
        check_class(index, model.num_classes)
    weight = images.new_ones(images.shape[0], grid[0] * grid[1], requires_grad=True)
    with torch.enable_grad():
        logits = model(images, mask=weight)
        answer = torch.stack([log_odds(logits[i : i + 1], c)[0] for i, c in enumerate(class_index)])
        (scores,) = torch.autograd.grad(answer.sum(), weight)
    return scores.unflatten(1, grid).detach()


@torch.no_grad()
def occlusion_scores(
    model: nn.Module, image: Float[Tensor, "1 c h w"], class_index: int, patch: int, batch_size: int = 32
) -> Float[Tensor, "gh gw"]:
    """How much the log-odds of the class fall when one square of `patch` px is painted in the image's mean colour.

    For any classifier; one forward pass per square. Squares at the right and lower edge may be cut.
    """
    height, width = image.shape[-2:]
    rows, columns = -(-height // patch), -(-width // patch)
    whole = log_odds(model(image), class_index)
    mean = image.mean(dim=(-2, -1), keepdim=True)
    scores = []
    for start in range(0, rows * columns, batch_size):
        cells = range(start, min(start + batch_size, rows * columns))
        painted = image.repeat(len(cells), 1, 1, 1)
        for i, cell in enumerate(cells):
            y, x = cell // columns * patch, cell % columns * patch
            painted[i, :, y : y + patch, x : x + patch] = mean[0]
        scores.append(whole - log_odds(model(painted), class_index))
    return torch.cat(scores).view(rows, columns)


def check_class(index: int, num_classes: int) -> None:
    """Raises InputError unless `index` is one of the network's classes and log-odds exist."""
    if num_classes < 2:
        raise InputError(f"scores are log-odds of a class and need at least 2 classes; the network has {num_classes}")
    if not 0 <= index < num_classes:
        raise InputError(f"class {index} does not exist: the network has classes 0 to {num_classes - 1}")


def upsample_scores(scores: Float[Tensor, "gh gw"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Scores on the token grid as one value per pixel, each patch in one colour."""
    return F.interpolate(scores[None, None], size=size, mode="nearest-exact")[0, 0]
