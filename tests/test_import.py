"""Importing the package loads what networks need, touches nothing, and asks the network for nothing."""

import json
import subprocess
import sys

import pytest

FRESH = """
import json, random, socket, sys, warnings

warnings.simplefilter("error")
def refused(*args, **kwargs):
    raise OSError("the network was asked on import")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refused

import torch

def switches():
    return {
        "default type": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradient": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "random": hash(torch.get_rng_state().numpy().tobytes()),
        "filters": len(warnings.filters),
        "hooks": repr(sys.excepthook),
    }

# the libraries are not ours to judge
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
random.seed(0)
before, drawn = switches(), random.getstate()
import sansmax

print(json.dumps({
    "modules": sorted(sys.modules),
    "changed": [name for name, value in switches().items() if value != before[name]],
    "drew": random.getstate() != drawn,
    "models": timm.list_models("seqnorm_*"),
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a new interpreter says of itself after `import sansmax`."""
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return json.loads(run.stdout)


HEAVY = ["lightning", "pytorch_lightning", "sklearn", "matplotlib", "typer", "rich", "pandas", "scipy", "pydantic"]
HEAVY += ["tifffile", "imagecodecs", "beartype", "tensorboard", "wandb"]


def test_only_what_networks_need_is_loaded(fresh):
    loaded = {name.partition(".")[0] for name in fresh["modules"]}
    assert not loaded & set(HEAVY)
    parts = {name.split(".")[1] for name in fresh["modules"] if name.startswith("sansmax.")}
    assert parts <= {"errors", "models", "ops"}


def test_nothing_global_is_changed(fresh):
    assert fresh["changed"] == []
    assert not fresh["drew"]
    assert not fresh["cuda"]


def test_networks_are_registered(fresh):
    assert "seqnorm_vit_tiny_patch16_224" in fresh["models"]
