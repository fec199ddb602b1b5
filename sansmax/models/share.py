"""Saves a network so that others load it by name: a folder, or a repository of the Hugging Face hub.

config.json        architecture, its arguments, classes, preprocessing: what `timm.create_model` builds it from
model.safetensors  the weights
README.md          the model card

    save_pretrained(model, "breast", labels=["benign", "malignant"])
    timm.create_model("local-dir:breast", pretrained=True)
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sansmax.errors import InputError
from sansmax.files import replacing, write_text
from sansmax.models.card import MARK, ModelCard, card_text
from sansmax.models.hub_config import describe
from sansmax.models.weights import network_inside

__all__ = ["ModelCard", "push_to_hub", "save_pretrained"]


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
    model_args: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Path:
    """Writes `config.json`, `model.safetensors` and a model card into `folder`, and returns it.

    The folder is loaded by `timm.create_model("local-dir:FOLDER", pretrained=True)` after `import sansmax`, by
    `transformers`, and by `sansmax.load_checkpoint`. Files are replaced whole; a README.md that somebody wrote is kept
    unless a `card` is given.

    `labels` are the names of the classes in order. `data_config` says how images were prepared: any of timm's
    `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, or `run.preprocess.to_dict()` of a training
    run; by default what the model's configuration says. The arguments of `create_model` are those that timm recorded;
    older timm does not, give them as `model_args` then ({} for none), as well as others for those that are no plain
    values.

    With `check` the network is built again from what is to be written, and must give the same output for one image.

    Raises ValueError for a model that was not built by `timm.create_model`, that cannot be built again from the
    arguments known, for labels or settings that do not fit, and for a folder of a training run.
    """
    network = _checked(model)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    if (folder / "run.json").is_file():
        raise InputError(f"{folder} is the folder of a training run; give another one")
    config = describe(network, labels, data_config, model_args)
    if check:
        check_rebuilt(network, config)
    _write(network, folder, config, card, address=f"local-dir:{folder.resolve().name}")
    return folder


def _write(network: nn.Module, folder: Path, config: Mapping[str, Any], card: ModelCard | None, address: str) -> None:
    from safetensors.torch import save

    with replacing(folder / "model.safetensors") as partial:
        # its own writer makes files that nobody else may read
        partial.write_bytes(save(_tensors(network), metadata={"format": "pt"}))
    readme = folder / "README.md"
    if card is not None or not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        count = sum(p.numel() for p in network.parameters())
        write_text(readme, card_text(card or ModelCard(), config, count, address))
    # last: a folder without it is not taken for a model
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The weights in memory of their own each, as safetensors wants them."""
    return {name: x.detach().cpu().clone().contiguous() for name, x in network.state_dict().items()}


def _checked(model: nn.Module) -> nn.Module:
    network = network_inside(model)
    if not (getattr(network, "pretrained_cfg", None) or {}).get("architecture"):
        raise InputError(
            f"{type(network).__name__} was not built by timm.create_model, and nobody could build it by name; build it "
            "so (sansmax.models.list_models() names the networks), and load its weights with load_checkpoint"
        )
    if network is not model and hasattr(model, "feature_info"):
        raise InputError("the model was built with features_only=True; save the whole network, built without it")
    return network


# Whether it can be loaded


def check_rebuilt(network: nn.Module, config: Mapping[str, Any]) -> None:
    """Builds the network that `config` describes, with the weights of this one, and compares their outputs.

    Raises ValueError where it cannot be built, its parameters have other names, or its output is another.
    """
    name, arguments = config["architecture"], config.get("model_args", {})
    words = f"timm.create_model({name!r}, " + ", ".join(f"{k}={v!r}" for k, v in arguments.items()) + ")"
    way_out = "build the model with timm.create_model alone, or say with model_args={...} what differs"
    try:
        with torch.random.fork_rng(devices=[]):
            again = timm.create_model(name, num_classes=config["num_classes"], **arguments)
    except Exception as error:
        raise InputError(f"{words} fails, so that nobody could load the model ({error}); {way_out}") from error
    have, want = network.state_dict(), again.state_dict()
    if {k: x.shape for k, x in have.items()} != {k: x.shape for k, x in want.items()}:
        differ = [k for k in {**have, **want} if k not in have or k not in want or have[k].shape != want[k].shape]
        raise InputError(f"{words} builds another network, which differs at {', '.join(differ[:5])}; {way_out}")
    where = next(network.parameters())
    again = again.to(where.device, where.dtype).eval()
    # the very tensors, in the types they have
    again.load_state_dict(have, assign=True)
    image = torch.randn(1, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
    first, second = (_output(net, image.to(where.device, where.dtype)) for net in (network, again))
    # the same code with the same numbers; another mechanism differs by far more
    if not torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max()), equal_nan=True):
        raise InputError(f"{words} gives other outputs with the same weights; {way_out}")


@torch.no_grad()
def _output(network: nn.Module, image: Tensor) -> Tensor:
    training = [module for module in network.modules() if module.training]
    try:
        return network.eval()(image).float()
    finally:
        for module in training:
            module.training = True


# The hub


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    labels: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
    model_args: Mapping[str, Any] | None = None,
    check: bool = True,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add model",
    endpoint: str | None = None,
) -> str:
    """Uploads what `save_pretrained` writes to the repository `repo_id` ("OWNER/NAME"); returns the commit's address.

    The repository is made if it is not there, `private` if asked for; `revision` is a branch, made if it is not there.
    A model card that is in the repository is kept unless a `card` is given. `token` is an access token that may write,
    by default that of `hf auth login` or HF_TOKEN. `endpoint` is the address of another hub.

    Others load it by `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` after `import sansmax`.

    Raises ValueError as `save_pretrained` does, and where the hub refuses or cannot be reached.
    """
    network = _checked(model)
    config = describe(network, labels, data_config, model_args)
    if check:
        check_rebuilt(network, config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(network, folder, config, card, address=f"hf-hub:{repo_id}")
        try:
            return _upload(folder, repo_id, card is None, private, token, revision, commit_message, endpoint)
        except Exception as error:
            if explained := _explained(error, repo_id):
                raise explained from error
            raise


def _upload(
    folder: Path,
    repo_id: str,
    keep_card: bool,
    private: bool,
    token: str | None,
    revision: str | None,
    message: str,
    endpoint: str | None,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="sansmax")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kept = ["README.md"] if keep_card and api.file_exists(repo_id, "README.md", revision=revision) else None
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision, ignore_patterns=kept
    )
    return commit.commit_url


def _explained(error: Exception, repo_id: str) -> InputError | None:
    """The error of the hub with the way out; None for one that is no matter of the hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(error, HFValidationError):
        return InputError(f"{repo_id!r} is no name of a repository: {error}. Give OWNER/NAME")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return InputError(
            f"the hub does not let you write to {repo_id} ({status or 'no token'}); log in once with `hf auth login`, "
            "or give token= with an access token that may write, and check that the owner is you or a group of yours"
        )
    if isinstance(error, HfHubHTTPError) and status is not None:
        return InputError(f"the hub refused {repo_id} ({status}): {error}")
    # the library behind it (requests, httpx) has errors of its own for a network that is not there
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        return InputError(
            f"the hub could not be reached ({type(error).__name__}: {error}); check the network, proxy and "
            "HF_HUB_OFFLINE, or save_pretrained(model, FOLDER) now and `hf upload` the folder later"
        )
    return None
