"""Whether scores are true of the network: tokens removed for real, one by one and in the order of their scores.

A token is removed by its mask, exactly: nothing is put in its place and the others stay where they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sansmax.engine.explain import answer_of, log_odds
from sansmax.errors import InputError
from sansmax.report.deletion import CurveSet, deletion_picture
from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

# tokens of all masked copies that run side by side
BATCH_TOKENS = 65536
# (b, n) masks, True for tokens that are there, to b answers
Answer = Callable[[Bool[Tensor, "b n"]], Float[Tensor, "b"]]


@dataclass(frozen=True)
class Removal:
    """What the scores of some tokens say and what removing each of them did, `(m,)` each."""

    tokens: np.ndarray
    scores: np.ndarray
    effects: np.ndarray

    @property
    def correlation(self) -> float:
        """Pearson's correlation of scores and true effects; NaN for fewer than two tokens or where nothing changes."""
        if len(self.scores) < 2 or not (self.scores.std() > 0 and self.effects.std() > 0):
            return float("nan")
        return float(np.corrcoef(self.scores, self.effects)[0, 1])

    @property
    def relative_error(self) -> float:
        """Size of score - effect over the size of the effects: 0 is perfect, and unlike correlation sees a factor."""
        return float(np.linalg.norm(self.scores - self.effects) / np.linalg.norm(self.effects))


@dataclass(frozen=True)
class Faithfulness:
    """How true the scores of one picture or bag are: single removals, and curves."""

    name: str
    tokens: int
    removal: Removal
    curves: CurveSet


def image_answer(model: nn.Module, image: Float[Tensor, "1 c h w"], class_index: int) -> Answer:
    """Log-odds of a class of one picture as a function of the mask of its patches."""

    def answer(mask: Tensor) -> Tensor:
        return log_odds(model(image.expand(len(mask), -1, -1, -1), mask=mask), class_index)

    return answer


def bag_answer(
    network: nn.Module,
    features: Float[Tensor, "n d"],
    coords: Float[Tensor, "n 2"] | None,
    index: int,
    task: str = "classification",
    *,
    absent: float = 0.0,
) -> Answer:
    """The answer of a network for one bag (`explain.answer_of`) as a function of the mask of its tokens.

    `absent` is the weight of a token that is removed. With 0 it is as if it had never been there. Landmarks of SOFT are
    means over stretches of the tokens that are there, so all later tokens then move up, and some into another
    landmark; a tiny weight such as 1e-12 removes the token and leaves the stretches as they are.
    """

    def answer(mask: Tensor) -> Tensor:
        places = None if coords is None else coords.expand(len(mask), -1, -1)
        weight = mask.to(features.dtype).clamp_min(absent) if absent else mask
        return answer_of(network(features.expand(len(mask), -1, -1), places, mask=weight), index, task)

    return answer


def faithfulness(
    name: str,
    answer: Answer,
    scores: np.ndarray,
    *,
    removed: int = 64,
    steps: int = 20,
    orders: int = 3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Faithfulness:
    """Both tests of the scores `(n,)` of one picture or bag: `removed` random tokens by themselves, and the curves.

    Costs `removed` + 2 `steps` (1 + `orders`) forward passes. Set the network to evaluation mode before.
    """
    scores = np.asarray(scores, np.float64).ravel()
    rng = np.random.default_rng(seed)
    tokens = np.sort(rng.choice(len(scores), min(removed, len(scores)), replace=False))
    effects = removal_effects(answer, tokens, len(scores), device=device)
    drawn = curves(answer, scores, steps=steps, orders=orders, seed=seed, device=device)
    return Faithfulness(name, len(scores), Removal(tokens, scores[tokens], effects), drawn)


def removal_effects(
    answer: Answer,
    tokens: Sequence[int] | np.ndarray,
    count: int,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """How much the answer falls when each of `tokens` of the `count` there are is removed by itself, float64.

    Raises InputError where a token is removed that is the only one.
    """
    if count < 2:
        raise InputError("a bag of one token cannot lose it: removing tokens needs at least two")
    index = torch.as_tensor(np.asarray(tokens), device=device)
    step = max(1, BATCH_TOKENS // count)
    whole = _answers(answer, torch.ones(1, count, dtype=torch.bool, device=device))
    effects = []
    for part in index.split(step):
        mask = torch.ones(len(part), count, dtype=torch.bool, device=device)
        mask[torch.arange(len(part), device=device), part] = False
        effects.append(whole - _answers(answer, mask))
        if progress is not None:
            progress(sum(map(len, effects)), len(index))
    return np.concatenate(effects)


def curves(
    answer: Answer,
    scores: np.ndarray,
    *,
    steps: int = 20,
    orders: int = 3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> CurveSet:
    """Deletion and insertion curves by score, largest first, beside `orders` random orders.

    Deletion starts with all tokens and removes down to one; insertion starts with one and adds up to all. Raises
    InputError for fewer than two tokens.
    """
    scores = np.asarray(scores, np.float64).ravel()
    count = len(scores)
    if count < 2:
        raise InputError("a bag of one token cannot lose it: curves need at least two tokens")
    gone = np.unique(np.rint(np.linspace(0, count - 1, min(steps, count - 1) + 1)).astype(np.int64))
    rng = np.random.default_rng(seed)
    by_score = np.argsort(-scores, kind="stable")
    randoms = [rng.permutation(count) for _ in range(orders)]
    both = [_curve_pair(answer, order, gone, device) for order in (by_score, *randoms)]
    deletion, insertion = (np.stack([pair[k] for pair in both]) for k in (0, 1))
    return CurveSet(gone / count, (gone + 1) / count, deletion[0], insertion[0], deletion[1:], insertion[1:])


def _curve_pair(
    answer: Answer, order: np.ndarray, gone: np.ndarray, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Answers with the first `gone` tokens of `order` removed, and with the first `gone` + 1 alone."""
    rank = torch.as_tensor(np.argsort(order, kind="stable"), device=device)
    counts = torch.as_tensor(gone, device=device)[:, None]
    step = max(1, BATCH_TOKENS // len(order))
    parts = counts.split(step)
    deleted = np.concatenate([_answers(answer, rank[None] >= part) for part in parts])
    inserted = np.concatenate([_answers(answer, rank[None] <= part) for part in parts])
    return deleted, inserted


@torch.no_grad()
def _answers(answer: Answer, mask: Tensor) -> np.ndarray:
    return answer(mask).double().cpu().numpy()


def mean_curves(results: Sequence[Faithfulness], points: int = 41) -> CurveSet:
    """The mean over pictures or bags of different sizes, each read at the same shares of its tokens."""
    share = np.linspace(0, 1, points)

    def mean(at: str, name: str) -> np.ndarray:
        lines = []
        for result in results:
            x, y = getattr(result.curves, at), getattr(result.curves, name)
            lines.append(np.stack([np.interp(share, x, row) for row in np.atleast_2d(y)]))
        return np.mean(lines, axis=0)

    return CurveSet(
        share,
        share,
        mean("removed", "deletion")[0],
        mean("present", "insertion")[0],
        mean("removed", "random_deletion"),
        mean("present", "random_insertion"),
    )


def faithfulness_rows(results: Sequence[Faithfulness]) -> list[dict[str, Any]]:
    """One row of figures for each picture or bag."""
    return [
        {
            "name": r.name,
            "tokens": r.tokens,
            "removed": len(r.removal.tokens),
            "correlation": r.removal.correlation,
            "relative_error": r.removal.relative_error,
            **r.curves.areas(),
        }
        for r in results
    ]


MEANING = (
    "*Correlation*: scores against the change of the answer when each of some tokens, drawn at random, is truly "
    "removed and the network runs again; 1 is perfect. *Relative error*: size of the difference over the size of the "
    "changes; unlike the correlation it sees a wrong factor. *Deletion*: mean answer while tokens are removed, the "
    "highest scores first; lower is better. *Insertion*: mean answer while tokens are added in that order; higher is "
    "better. Beside each stands the same for random orders. The answer is the log-odds of the class (the value, or the "
    "log-risk)."
)


def write_faithfulness(folder: str | Path, results: Sequence[Faithfulness], *, title: str = "Faithfulness") -> Path:
    """faithfulness.md with a table and the mean curves as faithfulness.png, and the figures as faithfulness.csv."""
    if not results:
        raise InputError("there is nothing to report on; explain at least one picture or bag")
    folder = Path(folder)
    rows = faithfulness_rows(results)
    deletion_picture(mean_curves(results), folder / "faithfulness.png", title=title)
    write_rows(folder / "faithfulness.csv", tuple(rows[0]), rows)
    heads = [name.replace("_", " ") for name in rows[0]]
    cells = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    page = table(heads, cells) + "\n\n![Deletion and insertion curves](faithfulness.png)\n\n" + MEANING
    return write_summary(folder / "faithfulness.md", title, [("", page)])
