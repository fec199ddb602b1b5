"""Recipes: their options, networks, sizes and schedules are what they say, and timm's parts train by them."""

import argparse
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad, random_seed
from torch.utils.flop_counter import FlopCounterMode

import sansmax  # noqa: F401  (registers the networks)
from sansmax.models.dense import mask_rcnn, retinanet, segmenter

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
if not (RECIPES / "README.md").exists():
    pytest.skip("the recipes are not part of this distribution", allow_module_level=True)
IN1K = sorted(RECIPES.glob("*_in1k.yaml"))
DENSE = sorted([*RECIPES.glob("*_coco.yaml"), *RECIPES.glob("*_ade20k.yaml")])
PUBLISHED = [*IN1K, *DENSE]
# of the parser of timm's train.py, those that the recipes use
TRAIN_OPTIONS = {
    "model": str,
    "img_size": int,
    "crop_pct": float,
    "interpolation": str,
    "batch_size": int,
    "epochs": int,
    "opt": str,
    "opt_eps": float,
    "weight_decay": float,
    "clip_grad": float,
    "sched": str,
    "lr_base": float,
    "lr_base_size": int,
    "lr_base_scale": str,
    "warmup_epochs": int,
    "warmup_lr": float,
    "min_lr": float,
    "drop_path": float,
    "smoothing": float,
    "aa": str,
    "color_jitter": float,
    "train_interpolation": str,
    "reprob": float,
    "remode": str,
    "mixup": float,
    "cutmix": float,
    "aug_repeats": (int, float),
    "model_ema": bool,
    "model_ema_decay": float,
    "dist_bn": str,
    "sync_bn": bool,
    "amp": bool,
    "seed": int,
    "workers": int,
}
# the rest of what timm's parts read of its arguments, with train.py's defaults
DEFAULTS = {"momentum": 0.9, "cooldown_epochs": 0, "clip_grad": None, "hflip": 0.5}


def name_of(path):
    return path.name


def head(path):
    """The comment at the top, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#"))


def fields(path):
    """The parts of the head by their labels, each in one line."""
    found = re.findall(r"^(\w+): +(.+(?:\n {4,}.+)*)", head(path), flags=re.MULTILINE)
    return {label: " ".join(text.split()) for label, text in found}


def command(path):
    """The words of the command in the head."""
    block = re.search(r"^  ((?:torchrun|python) .*?)\n\n", head(path), flags=re.MULTILINE | re.DOTALL)
    assert block, "no command"
    return shlex.split(block[1].replace("\\\n", " "))


def options(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return float(found[1].replace(",", ""))


def count(model):
    return sum(p.numel() for p in model.parameters())


def outline(name):
    """The network without its numbers, where timm's layers can be built so."""
    try:
        return timm.create_model(name, device="meta")
    except TypeError:
        # before 1.0.21
        return timm.create_model(name)


# What is there


def test_there_is_a_recipe_for_every_published_number():
    sizes, dense = ("tiny", "small", "medium", "large", "huge"), ("tiny", "small", "medium", "large")
    wanted = {f"{family}_{size}_in1k" for family in ("soft", "soft_norm") for size in sizes}
    wanted |= {f"sima_{name}_in1k" for name in ("deit_small_patch16_224", "small_12_p16", "cvt_13")}
    wanted |= {f"soft_norm_{size}_{detector}_coco" for size in dense for detector in ("retinanet", "mask_rcnn")}
    wanted |= {f"soft_norm_{size}_upernet_ade20k" for size in ("small", "medium")}
    assert {path.stem for path in PUBLISHED} == wanted


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_a_recipe_says_what_to_expect_and_what_is_not_known(path):
    said = fields(path)
    assert list(said) == ["Trains", "Cost", "Expected", "Settings", "Unchecked", "Differs"]
    assert "GPU hours: not measured" in said["Cost"]
    assert "https://" in said["Expected"]
    assert said["Expected"].endswith("Not trained here.")
    if "commit d3febc3" not in said["Expected"]:
        assert "unchecked" in said["Expected"]


@pytest.mark.parametrize("page", [RECIPES / "README.md", ROOT / "docs" / "guide" / "recipes.md"], ids=name_of)
def test_the_table_has_every_recipe_with_its_numbers(page):
    text = page.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+\.yaml)` \| (.+) \|$", text, flags=re.MULTILINE))
    assert set(rows) == set(map(name_of, PUBLISHED))
    for path in PUBLISHED:
        said = fields(path)
        cells = [re.sub(r" \[\d\]|`", "", cell) for cell in rows[path.name].split(" | ")]
        network, ours, published, macs, published_macs, accuracy, result = cells
        assert options(path)["model"] in network.split()
        assert f"{ours} parameters" in said["Trains"]
        assert re.search(rf"\(published[^)]*?: {published}[,)]", said["Trains"])
        assert said["Expected"].startswith(accuracy)
        assert result == "not trained here"
        if path in IN1K:
            assert f" {macs} multiply-adds (published" in said["Trains"]
            assert f"{published_macs}" in said["Trains"].split("multiply-adds")[1]


# ImageNet


@pytest.mark.parametrize("path", IN1K, ids=name_of)
def test_options_are_those_of_timms_script(path):
    for name, value in options(path).items():
        assert isinstance(value, TRAIN_OPTIONS[name]), f"{name}: {value!r}"
    script = ["torchrun", "--nproc-per-node", "8", "train.py", "--config", f"recipes/{path.name}"]
    assert command(path) == [*script, "--device-modules", "sansmax", "--data-dir", "/data/imagenet"]


@pytest.mark.parametrize("path", IN1K, ids=name_of)
def test_the_network_has_the_stated_size(path):
    said, name = fields(path), options(path)["model"]
    trains = said["Trains"]
    assert trains.startswith(f"{name}, ")
    ours = count(outline(name))
    assert number(r"([\d,]+) parameters", trains) == ours
    published = number(r"\(published[^:]*: (\d+)M", trains)
    if abs(ours / 1e6 - published) >= 1:
        # the one that the authors' table and code describe differently
        other = outline(f"{name}_24m")
        assert name.endswith("_small") and abs(count(other) / 1e6 - published) < 1
        assert f"{name}_24m ({count(other):,} parameters" in said["Differs"]


# the deeper ones take seconds each
@pytest.mark.parametrize("path", [p for p in IN1K if "tiny" in p.name or "sima" in p.name], ids=name_of)
def test_the_multiply_adds_are_counted(path):
    model = timm.create_model(options(path)["model"]).eval()
    # with gradients, as in training: products without them may go to another library, which is not counted
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    stated = number(r"([\d.]+)G multiply-adds", fields(path)["Trains"])
    assert round(counter.get_total_flops() / 2e9, 2) == stated


@pytest.mark.parametrize("path", IN1K, ids=name_of)
def test_images_are_those_that_the_network_expects(path):
    given, model = options(path), outline(options(path)["model"])
    assert resolve_data_config(given, model=model) == resolve_data_config({}, model=model)
    for name in ("img_size", "crop_pct", "interpolation"):
        assert name in given


def arguments(path, gpus, **changes):
    """The recipe as the arguments of train.py, with the rate that it takes from `gpus`."""
    args = argparse.Namespace(**{**DEFAULTS, **options(path), **changes})
    assert args.lr_base_scale == "linear"
    args.lr = args.lr_base * args.batch_size * gpus / args.lr_base_size
    return args


@pytest.mark.parametrize("path", IN1K, ids=name_of)
def test_the_learning_rate_warms_up_and_follows_a_cosine(path):
    args = arguments(path, gpus=8)
    assert args.lr == pytest.approx(number(r"the peak is ([\d.e-]+\d)", fields(path)["Settings"]), rel=1e-9)
    assert f"{args.epochs} epochs on 8 GPUs x {args.batch_size} images" in fields(path)["Cost"]
    optimizer = create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], **optimizer_kwargs(args))
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    assert epochs == args.epochs
    for t in range(epochs):
        schedule.step(t)
        slope = (args.lr - args.warmup_lr) / args.warmup_epochs
        cosine = args.min_lr + 0.5 * (args.lr - args.min_lr) * (1 + math.cos(math.pi * t / epochs))
        wanted = args.warmup_lr + t * slope if t < args.warmup_epochs else cosine
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("path", IN1K, ids=name_of)
def test_matrices_and_kernels_alone_are_decayed(path):
    args = arguments(path, gpus=8)
    model = outline(args.model)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    assert type(optimizer).__name__ == "AdamW" and {g["eps"] for g in optimizer.param_groups} == {1e-8}
    decayed = {names[p] for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    kept = {names[p] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed | kept == set(names.values())
    tables = {name for name in names.values() if re.search(r"(^|\.)(pos_embed|cls_token)$", name)}
    assert kept == tables | {name for p, name in names.items() if p.ndim <= 1}


# Training, as the script does it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red and blue pictures, as folders of classes."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        for label, colour in (("blue", (20, 40, 220)), ("red", (220, 40, 20))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (45, 40), tuple(c + 2 * i for c in colour)).save(folder / f"{i}.png")
    return root


FAMILIES = {
    "soft_tiny": "soft_tiny_in1k",
    "soft_norm_tiny": "soft_norm_tiny_in1k",
    "sima_nano_12_p16": "sima_small_12_p16_in1k",
    "sima_deit_tiny_patch16_224": "sima_deit_small_patch16_224_in1k",
    "sima_cvt_13": "sima_cvt_13_in1k",
    "seqnorm_vit_tiny_patch16_224": "sima_deit_small_patch16_224_in1k",
}
# `--model-kwargs`: fewer layers, and pictures that are large enough for some landmarks
SMALL = {"img_size": 64, "num_classes": 2}
FEWER = {
    "soft_tiny": {"depths": (1, 1, 1, 1)},
    "soft_norm_tiny": {"depths": (1, 1, 1, 1)},
    "sima_cvt_13": {"depths": (1, 1, 2)},
}
CPU = torch.device("cpu")


def kwargs_of(name):
    return {**SMALL, **FEWER.get(name, {"depth": 2})}


class Script:
    """timm's parts, put together in the order of its train.py; on one CPU, so without the options for several GPUs."""

    def __init__(self, name, pictures, folder, resume=None):
        given = {
            "model": name,
            "img_size": SMALL["img_size"],
            "batch_size": 4,
            "epochs": 2,
            "warmup_epochs": 1,
            "amp": False,
        }
        # enough for a few steps to show
        args = self.args = arguments(RECIPES / f"{FAMILIES[name]}.yaml", 1, **given, lr_base=0.05, model_ema_decay=0.5)
        random_seed(args.seed, 0)
        # what it always says of a network, asked for or not
        unset = dict.fromkeys(("drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
        said = {"in_chans": 3, "drop_rate": 0.0, "drop_path_rate": args.drop_path, "scriptable": False}
        self.model = timm.create_model(name, pretrained=False, checkpoint_path="", **said, **unset, **kwargs_of(name))
        self.images = resolve_data_config(vars(args), model=self.model)
        self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(args))
        self.first = resume_checkpoint(self.model, resume, self.optimizer, log_info=False) if resume else 0
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay)
        if resume:
            timm.models.load_checkpoint(self.ema.module, resume, use_ema=True)
        self.train, self.test = self.loader(pictures, "train"), self.loader(pictures, "validation")
        self.saver = CheckpointSaver(
            self.model, self.optimizer, args=args, model_ema=self.ema, checkpoint_dir=folder, recovery_dir=folder
        )
        self.schedule, self.last = create_scheduler_v2(self.optimizer, **scheduler_kwargs(args))
        if self.first:
            self.schedule.step(self.first)
        self.losses = []

    def loader(self, pictures, split):
        args, training = self.args, split == "train"
        data = create_dataset("", root=pictures, split=split, is_training=training, batch_size=args.batch_size)
        shared = {key: self.images[key] for key in ("input_size", "mean", "std")}
        shared |= {"batch_size": args.batch_size, "num_workers": 0, "device": CPU, "persistent_workers": False}
        if not training:
            kept = {key: self.images[key] for key in ("interpolation", "crop_pct")}
            return create_loader(data, **shared, **kept)
        mixing = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "label_smoothing": args.smoothing}
        augment = {"re_prob": args.reprob, "re_mode": args.remode, "hflip": args.hflip, "auto_augment": args.aa}
        augment |= {"color_jitter": args.color_jitter, "interpolation": args.train_interpolation}
        collate = FastCollateMixup(**mixing, num_classes=2)
        return create_loader(data, is_training=True, collate_fn=collate, **shared, **augment)

    def run(self, stop=None):
        criterion = SoftTargetCrossEntropy()
        for epoch in range(self.first, stop or self.last):
            # the same draws in an epoch whatever came before
            random_seed(self.args.seed, epoch)
            self.model.train()
            for x, target in self.train:
                loss = criterion(self.model(x), target)
                self.optimizer.zero_grad()
                loss.backward()
                if self.args.clip_grad is not None:
                    dispatch_clip_grad(self.model.parameters(), value=self.args.clip_grad, mode="norm")
                self.optimizer.step()
                self.ema.update(self.model)
                self.losses.append(loss.item())
            self.schedule.step(epoch + 1)
            self.saver.save_checkpoint(epoch, metric=self.accuracy(self.ema.module))
        return self

    @torch.no_grad()
    def accuracy(self, model):
        right = [(model.eval()(x).argmax(1) == target).float().mean().item() for x, target in self.test]
        return 100 * sum(right) / len(right)


# timm's data sets leave the files of pictures to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_timms_parts_train_every_family_and_read_it_again(name, pictures, tmp_path, assert_same):
    folders = [tmp_path / part for part in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    whole = Script(name, pictures, folders[0])
    start = {key: p.detach().clone() for key, p in whole.model.named_parameters()}
    whole.run()
    assert len(whole.losses) == 4 and all(math.isfinite(loss) for loss in whole.losses)
    still = [key for key, p in whole.model.named_parameters() if torch.equal(p, start[key])]
    assert still == []

    # the checkpoint: the average where there is one, as `create_model` takes it
    read = timm.create_model(name, checkpoint_path=str(folders[0] / "last.pth.tar"), **kwargs_of(name)).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert_same(read(x), whole.ema.module.eval()(x), "average")
        assert (read(x) - whole.model.eval()(x)).abs().max() > 1e-4

    # all that training needs is in it: stopped and resumed is the same as whole
    Script(name, pictures, folders[1]).run(stop=1)
    resumed = Script(name, pictures, folders[1], resume=str(folders[1] / "last.pth.tar")).run()
    assert resumed.losses == whole.losses[2:]
    for key, value in whole.ema.module.state_dict().items():
        assert torch.equal(value, resumed.ema.module.state_dict()[key]), key


def script_of_timm():
    """timm's train.py: where `SANSMAX_TIMM_TRAIN` says, or beside a timm that is installed from its repository."""
    path = Path(os.environ.get("SANSMAX_TIMM_TRAIN") or Path(timm.__file__).resolve().parent.parent / "train.py")
    if not path.is_file() and "SANSMAX_TIMM_TRAIN" in os.environ:
        pytest.fail(f"SANSMAX_TIMM_TRAIN names {path}, which is not there")
    if not path.is_file():
        pytest.skip("timm's train.py is not in its package; set SANSMAX_TIMM_TRAIN to its path")
    return path


def run_script(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_script_trains_every_family(name, pictures, tmp_path):
    script = script_of_timm()
    recipe = RECIPES / f"{FAMILIES[name]}.yaml"
    log = run_script(
        script,
        *("--config", recipe, "--device-modules", "sansmax", "--model", name, "--data-dir", pictures),
        *("--num-classes", 2, "--img-size", 64, "--model-kwargs", "img_size=64", "--device", "cpu", "--workers", 0),
        *("--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0, "--output", tmp_path, "--experiment", "run"),
    )
    # a newer train.py says which keys of a file it does not know
    unknown = [key for key in options(recipe) if re.search(rf"unknown.*\b{key}\b", log, flags=re.IGNORECASE)]
    assert unknown == []
    path = str(tmp_path / "run" / "last.pth.tar")
    model = timm.create_model(name, num_classes=2, img_size=64, checkpoint_path=path).eval()
    assert torch.isfinite(model(torch.randn(2, 3, 64, 64))).all()


def test_timms_script_knows_every_option():
    text = script_of_timm().read_text(encoding="utf-8")
    known = {flag.replace("-", "_") for flag in re.findall(r"['\"]--([\w-]+)['\"]", text)}
    assert known >= set(TRAIN_OPTIONS)


# COCO and ADE20K


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples():
    return {name: example(name) for name in ("detection", "segmentation")}


@pytest.mark.parametrize("path", DENSE, ids=name_of)
def test_the_command_gives_the_options_to_the_example(path, examples, monkeypatch):
    words, given = command(path), options(path)
    name = "detection" if path.stem.endswith("coco") else "segmentation"
    assert words[:2] == ["python", f"examples/{name}.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    parsed = vars(examples[name].arguments())
    assert {key: parsed[key] for key in given} == given
    monkeypatch.setattr(sys, "argv", words[1:2])
    defaults = vars(examples[name].arguments())
    # and no option that the file does not tell of
    assert {key for key in parsed if parsed[key] != defaults[key]} <= set(given)


# the widest ones take a second each
@pytest.mark.parametrize("path", [p for p in DENSE if "large" not in p.name], ids=name_of)
def test_the_detector_has_the_stated_size(path):
    given, said = options(path), fields(path)
    network = outline(given["model"])
    if path.stem.endswith("coco"):
        build = {"retinanet": retinanet, "mask_rcnn": mask_rcnn}[given["detector"]]
        model = build(network, 80 + 1)
    else:
        model = segmenter(network, given["classes"])
    assert number(r"([\d,]+) parameters", said["Trains"]) == count(model)
    if path.stem.endswith("coco"):
        # of the two small ones too, the published size fits the one that is trained
        assert abs(count(model) / 1e6 - number(r"\(published: (\d+)M", said["Trains"])) < 1


@pytest.mark.parametrize("path", DENSE, ids=name_of)
def test_a_dense_recipe_says_that_it_differs(path):
    said = fields(path)
    assert "one GPU" in said["Differs"]
    assert "the repository has no code" in said["Unchecked"]
    if "small" in path.name:
        assert "soft_norm_small_24m" in said["Differs"]
