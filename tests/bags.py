"""Bags of features in memory for the tests, with cases whose planted tokens carry the answer."""

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.cases import Cases
from sansmax.engine.bag_config import load_bag_config
from sansmax.errors import unknown_name

WIDTH = 12
KEYS = {
    "model.name": "seqnorm_slide_small",
    "model.options.embed_dim": 16,
    "model.options.depth": 1,
    "model.options.num_heads": 2,
    "epochs": 2,
    "batch_size": 6,
    "seed": 3,
    "tokens.batch_tokens": 80,
}
# every random number there is, and an average with a memory
RANDOM = {
    "tokens.keep": [0.4, 0.9],
    "tokens.noise": 0.1,
    "tokens.drop": 0.1,
    "optim.model_ema_decay": 0.9,
    "model.options.drop_rate": 0.1,
    "model.options.proj_drop_rate": 0.1,
    "model.options.drop_path_rate": 0.2,
}
TASKS = {"classification": ("benign", "tumour"), "multilabel": ("a", "b", "c"), "regression": ("x", "y")}
TASKS["survival"] = ("risk",)


class MemoryBags:
    """What `open_bags` gives, without files."""

    def __init__(self, bags, encoder="toy", width=WIDTH):
        self.bags, self.encoder, self.width, self.layout = dict(bags), encoder, width, "memory"
        self.ids, self.note, self.place = tuple(sorted(self.bags)), f"{len(self.bags)} bags in memory", "memory"

    def read(self, slide_id):
        if slide_id not in self.bags:
            raise unknown_name("slide", slide_id, self.ids)
        return self.bags[slide_id]

    def length(self, slide_id):
        return len(self.bags[slide_id])


def bag(name, features, seed=0, **changes):
    rng = np.random.default_rng(seed)
    xy = rng.integers(0, 40, (len(features), 2)) * 256
    return Bag(name, features, xy=xy, **{"tile_level0": 256.0, "encoder": "toy", **changes})


def toy(task="classification", n=24, seed=0, slides=2, low=4, high=30, strength=3.0):
    """Bags and cases of `n` patients; the mean of a direction of the features says what is to be predicted."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((3, WIDTH))
    hidden = rng.standard_normal((n, 3))
    bags, of = {}, []
    for i in range(n):
        names = tuple(f"p{i:02}-s{k}" for k in range(1 + i % slides))
        for name in names:
            tokens = rng.standard_normal((int(rng.integers(low, high)), WIDTH)) + strength / 3 * hidden[i] @ directions
            bags[name] = bag(name, tokens.astype(np.float32), seed=len(bags))
        of.append(names)
    return MemoryBags(bags), Cases(
        task, tuple(f"p{i:02}" for i in range(n)), tuple(of), targets(task, hidden, rng), TASKS[task]
    )


def targets(task, hidden, rng):
    if task == "classification":
        return (hidden[:, 0] > 0).astype(np.int64)
    if task == "multilabel":
        y = (hidden > 0).astype(float)
        return np.where(rng.random(y.shape) < 0.1, np.nan, y)
    if task == "regression":
        return np.stack([100 + 20 * hidden[:, 0], 1e-3 * hidden[:, 1]], axis=1)
    time = np.ceil(4 * np.exp(-hidden[:, 0]))
    return np.stack([time, rng.random(len(hidden)) < 0.7], axis=1).astype(float)


def config(**keys):
    """The configuration of a tiny run; dots of a key are written as two underscores."""
    return load_bag_config(None, {**KEYS, **{name.replace("__", "."): value for name, value in keys.items()}})
