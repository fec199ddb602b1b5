"""What a run starts from, what it leaves as it is, and what it learns from a teacher."""

import os
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from runs import RANDOM, folder_of_pictures, refused, result_of, rows_of, tiny, train_only
from safetensors.torch import load_file, save_file

from sansmax import predict, stream
from sansmax.data.images import to_tensor
from sansmax.data.loading import make_loader
from sansmax.data.open import open_data
from sansmax.data.preprocess import Preprocess
from sansmax.engine.build import build_model
from sansmax.engine.callbacks import Recorder
from sansmax.engine.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, load_config
from sansmax.engine.distill import Teacher, as_preprocessed, load_teacher, soft_losses
from sansmax.engine.freezing import freeze, keep_statistics
from sansmax.engine.losses import image_losses
from sansmax.engine.module import Classifier
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run
from sansmax.engine.starting import start_model
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError

SOFTMAX = {
    "model__name": "vit_tiny_patch16_224",
    "model__options": {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
}


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """A run of timm's own vision transformer, attention as peaked and answers as sure as after long training."""
    folder = tmp_path_factory.mktemp("softmax") / "run"
    train_only(tiny(**SOFTMAX, optim__lr=0.003, epochs=1), folder)
    sharper = {"qkv.weight": 6.0, "head.weight": 30.0}
    factors = (
        (name, x, next((f for end, f in sharper.items() if name.endswith(end)), 1.0))
        for name, x in weights(folder).items()
    )
    save_file({name: x * factor for name, x, factor in factors}, folder / "model.safetensors")
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def loader_of(run, split="val"):
    data = open_data(run.config.data.source, seed=run.config.seed)
    return make_loader(getattr(data, split), run.preprocess, batch_size=20)


def in_a_state(state):
    """Whether an optimiser's state holds a parameter at all."""
    return {k: v for k, v in state["state"].items() if v}


# Where weights come from


def test_weights_of_other_classes_start_a_network_with_a_new_classifier(softmax, tmp_path, capfd):
    data = folder_of_pictures(tmp_path / "data", classes=("a", "b", "c"))
    config = tiny(
        **{**SOFTMAX, "data__source": str(data), "data__image_size": 48, "data__in_chans": 3},
        model__initial_checkpoint=str(softmax),
        model__freeze="backbone",
        epochs=1,
    )
    train_only(config, tmp_path / "run", reporter=Reporter())
    report, said = (tmp_path / "run" / "initial_checkpoint.txt").read_text(), capfd.readouterr().err
    # the channels of the picture, its grid, and its classes are others
    for line in (
        "a new classifier of 3 classes",
        "resized pos_embed: 4 x 4 to 6 x 6",
        "adapted patch_embed.proj.weight: 1 to 3 channels",
        "kept as the model had it: head.weight",
        "frozen: ",
    ):
        assert line in report and line in said, (report, said)
    old, new = weights(softmax), weights(tmp_path / "run")
    same = {k for k, v in old.items() if v.shape == new[k].shape and torch.equal(v, new[k])}
    assert same == set(old) - {"head.weight", "head.bias", "pos_embed", "patch_embed.proj.weight"}


def test_a_run_goes_on_when_what_it_started_from_is_gone(softmax, tmp_path):
    shutil.copytree(softmax, tmp_path / "first")
    config = tiny(**SOFTMAX, model__initial_checkpoint=str(tmp_path / "first"), epochs=1)
    train_only(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "first")
    before = result_of(tmp_path / "run")
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == before
    for checkpoint in (tmp_path / "run").glob("*.ckpt"):
        checkpoint.unlink()
    with pytest.raises(InputError, match="first"):
        train_only(None, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--initial-checkpoint", "none.pth"), "there is no file or folder of weights none.pth"),
        (("--initial-checkpoint", "{run}", "--model", "resnet10t"), "missing (-)"),
        (("--initial-checkpoint", "{run}", "--set", "pretrained=true"), "give pretrained or initial_checkpoint"),
        (("--convert", "nonsense"), "model.convert='nonsense' on"),
        (("--model", "resnet10t", "--convert", "sima"), "has no `blocks` with attention layers"),
        (("--set", "freeze=blocksz"), "'blocksz' names no parameter or layer; there are blocks"),
        (("--set", "freeze='*'"), "nothing is left to train"),
        (("--model", "dla46_c", "--set", "grad_checkpointing=true"), "dla46_c cannot make its activations again"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(words, message, softmax, tmp_path):
    words = [word.format(run=softmax) for word in words]
    what = ("train", "mosaics:grid=4,train=8,val=4,test=4", "-o", tmp_path / "run", "--image-size", "32")
    assert message in refused(*what, *words)
    assert not (tmp_path / "run").exists()


# Another attention


@pytest.fixture(scope="module")
def converted(softmax, tmp_path_factory):
    """A run whose network began as the softmax run's, its attention swapped."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    config = tiny(**SOFTMAX, model__initial_checkpoint=str(softmax), model__convert="seqnorm", epochs=1)
    train_only(config, folder)
    return folder


def test_a_converted_run_is_opened_again_and_says_what_it_said_in_training(converted):
    run = Run.open(converted)
    network = run.load_model()
    assert network.attention == "seqnorm"
    (batch,) = loader_of(run)
    with torch.no_grad():
        logits = network(batch.images)
    loss = torch.nn.functional.cross_entropy(logits.double(), batch.labels).item()
    assert rows_of(converted)[0]["val_loss"] == pytest.approx(loss, rel=1e-6)
    pixels = open_data(run.config.data.source, seed=run.config.seed).val.read(0)
    answer = predict(pixels, converted, scores=True)
    np.testing.assert_allclose(answer.probabilities, logits[0].softmax(0).numpy(), rtol=1e-4)
    assert answer.scores is not None
    streamed = stream(network, pixels, chunk_tokens=7)
    torch.testing.assert_close(streamed.logits[0], logits[0], rtol=1e-4, atol=1e-5)


def test_weights_are_loaded_where_they_fit_before_or_after_the_swap(softmax, converted):
    run = Run.open(converted)
    data, model = run.config.data, run.config.model
    before = start_model(model, data, 10, run.preprocess.in_chans)
    plain = weights(softmax)
    assert all(torch.equal(before.state_dict()[k], v) for k, v in plain.items() if "attn.qkv" in k)
    again = start_model(
        model.model_copy(update={"initial_checkpoint": str(converted)}), data, 10, run.preprocess.in_chans
    )
    assert again.state_dict().keys() == weights(converted).keys()
    assert [k for k, v in weights(converted).items() if not torch.equal(again.state_dict()[k], v)] == []


# What stays


def test_what_is_frozen_stays_to_the_last_bit_and_the_rest_learns(softmax, tmp_path):
    config = tiny(
        **SOFTMAX,
        model__initial_checkpoint=str(softmax),
        model__freeze=["patch_embed", "*.0.*", "pos_embed"],
        optim__model_ema_decay=0.5,
        epochs=1,
    )
    train_only(config, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    old = weights(softmax)
    held = {k for k in old if k.startswith(("patch_embed", "blocks.0.")) or k == "pos_embed"}
    for place in ("network", "ema.module"):
        changed = {k for k, v in old.items() if not torch.equal(v, state["state_dict"][f"{place}.{k}"])}
        assert not changed & held and len(changed) > 0.9 * (len(old) - len(held)), place
    assert all(torch.equal(weights(tmp_path / "run")[k], old[k]) for k in held)
    (optimizer,) = state["optimizer_states"]
    assert len(in_a_state(optimizer)) == len(old) - len(held)


def test_statistics_of_frozen_batch_norms_stay():
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    frozen = freeze(network, ["conv1", "bn1", "layer1"])
    module = Classifier(network, OptimConfig(), 3, 1, 1, 0)
    for state in (module, module.eval(), module.train()):
        state.train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network(torch.randn(4, 1, 32, 32))
    changed = {k for k, v in before.items() if not torch.equal(v, network.state_dict()[k])}
    still = {k for k in before if k.startswith(("conv1", "bn1", "layer1"))}
    assert still and changed == set(before) - still
    assert all(not network.get_parameter(n).requires_grad for n in frozen)
    keep_statistics(network)


def test_activations_made_again_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = ModelConfig(
            name="seqnorm_vit_pico_patch8_128",
            grad_checkpointing=again,
            options={"depth": 2, "proj_drop_rate": 0.3, "drop_path_rate": 0.5},
        )
        network = start_model(model, DataConfig(image_size=16), 3, 1)
        assert network.grad_checkpointing is again
        torch.manual_seed(1)
        network(torch.randn(3, 1, 16, 16)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # what evaluates has none of it
    assert not build_model(model, DataConfig(image_size=16), 3, 1).grad_checkpointing


# A teacher


def preprocess(size=(8, 8), in_chans=1, mean=(0.5,), std=(0.5,), **how):
    return Preprocess(size, in_chans, mean, std, **how)


def teacher_of(network, **config):
    return Teacher(network, preprocess(), preprocess(), DistillConfig(teacher="x", **config))


@pytest.fixture
def taught():
    """Logits of a student, a teacher's network, images and labels."""
    torch.manual_seed(4)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).double()
    images, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,))
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    return student, network, images, labels


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_its_definition(taught, temperature):
    student, network, images, labels = taught
    with torch.no_grad():
        teacher = network(images)
    q, p = (teacher / temperature).exp(), (student.detach() / temperature).exp()
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    exact = temperature**2 * (q * (q.log() - p.log())).sum(1)
    torch.testing.assert_close(soft_losses(student, teacher, temperature), exact, rtol=1e-12, atol=0)
    losses = image_losses(student, labels, OptimConfig(smoothing=0.1), torch.tensor([1.0, 2.0, 5.0]))
    said = teacher_of(network, alpha=0.3, temperature=temperature).blended(losses, student, images)
    blended = 0.7 * losses.losses + 0.3 * losses.weights * exact
    torch.testing.assert_close(said.losses, blended, rtol=1e-12, atol=0)
    assert torch.equal(said.weights, losses.weights)


def test_laws_of_learning_from_a_teacher(taught):
    student, network, images, labels = taught
    losses = image_losses(student, labels, OptimConfig())
    assert torch.equal(teacher_of(network, alpha=0.0).blended(losses, student, images).losses, losses.losses)
    # who says what the teacher says has nothing to learn
    twin = network(images).detach().requires_grad_()
    said = teacher_of(network, alpha=1.0).blended(image_losses(twin, labels, OptimConfig()), twin, images)
    (gradient,) = torch.autograd.grad(said.losses.sum(), twin)
    assert said.losses.abs().max() < 1e-15 and gradient.abs().max() < 1e-15
    # the gradient for a high temperature is that of the squared difference of centred logits
    with torch.no_grad():
        apart = student - network(images)
    apart = (apart - apart.mean(1, keepdim=True)) / 3
    (gradient,) = torch.autograd.grad(soft_losses(student, network(images).detach(), 1e5).sum(), student)
    torch.testing.assert_close(gradient, apart, rtol=1e-4, atol=1e-6)
    hard = teacher_of(network, alpha=1.0, kind="hard").blended(losses, student, images).losses
    answers = network(images).argmax(1)
    torch.testing.assert_close(hard, -student.log_softmax(1)[torch.arange(6), answers], rtol=1e-12, atol=0)


def test_a_teacher_is_no_part_of_what_is_trained(taught):
    _, network, _, _ = taught
    torch.nn.init.constant_(network[1].bias, 0.5)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 3))
    module = Classifier(student, OptimConfig(model_ema_decay=0.9), 3, 1, 1, 0, None, teacher_of(network.train()))
    assert not {id(p) for p in network.parameters()} & {id(p) for p in module.parameters()}
    assert len(module.state_dict()) == 4 and not any("teacher" in k for k in module.state_dict())
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("colour", [False, True])
def test_a_teacher_sees_the_picture_in_its_own_way(colour):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 3) if colour else (24, 20), dtype=np.uint8)
    have = preprocess((24, 20), 3 if colour else 1, (0.3,), (0.2,))
    want = (
        preprocess((24, 20), 1 if colour else 3, (0.4,), (0.6,))
        if colour
        else preprocess((24, 20), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    said = as_preprocessed(have(pixels)[None], have, want)[0]
    torch.testing.assert_close(said, want(pixels), rtol=0, atol=1e-5)
    # smaller, as the picture itself would be made smaller
    small = preprocess((12, 10), want.in_chans, want.mean, want.std)
    said = as_preprocessed(have(pixels)[None], have, small)[0]
    # kept pixels are rounded to 1 / 255
    assert (said - small(pixels)).abs().max() <= 1 / 255 / min(small.std)
    same = have(pixels)[None]
    assert as_preprocessed(same, have, preprocess((24, 20), have.in_chans, (0.3,) * have.in_chans, (0.2,))) is same
    assert to_tensor(pixels, have.in_chans).shape == same.shape[1:]


def test_a_run_teaches_by_the_names_of_its_classes(softmax):
    run = Run.open(softmax)
    images = torch.randn(3, run.preprocess.in_chans, 32, 32)
    config = DistillConfig(teacher=str(softmax))
    with torch.no_grad():
        own = run.load_model()(images)
    straight = load_teacher(config, run.classes, run.preprocess)
    turned = load_teacher(config, run.classes[::-1], run.preprocess)
    assert torch.equal(straight.logits(images), own)
    assert torch.equal(turned.logits(images), own.flip(1))
    with pytest.raises(InputError, match="a teacher needs the same classes"):
        load_teacher(config, ("cat", "dog"), run.preprocess)
    with pytest.raises(InputError, match="neither the folder of a run nor a network"):
        load_teacher(DistillConfig(teacher="vit_tinny"), run.classes, run.preprocess)
    with pytest.raises(InputError, match="teacher_checkpoint needs the name"):
        load_config(None, {"distill.teacher_checkpoint": "a.pth"})


def test_a_named_network_teaches_with_a_checkpoint(softmax, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    config = DistillConfig(teacher="test_vit", teacher_checkpoint=str(tmp_path / "teacher.pth"))
    teacher = load_teacher(config, ("a", "b"), preprocess((32, 32), 1, (0.2,), (0.3,)))
    assert teacher.own.in_chans == 3 and teacher.own.mean == tuple(network.pretrained_cfg["mean"])
    images = torch.randn(2, 1, 32, 32)
    seen = (images * 0.3 + 0.2 - torch.tensor(teacher.own.mean).view(3, 1, 1)) / torch.tensor(teacher.own.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(images), network(seen), rtol=1e-5, atol=1e-5)


def test_a_run_is_not_taken_up_with_another_teacher(softmax, tmp_path, monkeypatch):
    own = shutil.copytree(softmax, tmp_path / "teacher")
    original = Recorder.on_train_batch_end

    def stopping(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, trainer, *args)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Recorder, "on_train_batch_end", stopping)
        train_only(tiny(**SOFTMAX, distill__teacher=str(own)), tmp_path / "run")
    there = weights(own)
    save_file({**there, "head.bias": there["head.bias"] + 1e-3}, own / "model.safetensors")
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"the weights of the teacher .* are not those that the run has learned from"):
        train_only(None, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    shutil.copy(softmax / "model.safetensors", own / "model.safetensors")
    train_only(None, tmp_path / "run", resume=True)
    assert len(rows_of(tmp_path / "run")) == 2


def divergence(network, teacher, loader):
    """Mean KL divergence from the teacher over a split."""
    with torch.no_grad():
        parts = [soft_losses(network(b.images), teacher(b.images), 1.0) for b in loader]
    return torch.cat(parts).mean().item()


def test_a_softmax_free_network_comes_closer_to_its_softmax_teacher(softmax, tmp_path):
    config = tiny(
        **{**SOFTMAX, "data__source": "mosaics:grid=4,share=0.4,train=128,val=20,test=20"},
        model__initial_checkpoint=str(softmax),
        model__convert="sima",
        distill__teacher=str(softmax),
        distill__alpha=1.0,
        distill__temperature=1.0,
        monitor="last",
        epochs=5,
        optim__lr=0.01,
        optim__weight_decay=0.0,
        augment__hflip=0.0,
    )
    train_only(config, tmp_path / "run")
    run, teacher = Run.open(tmp_path / "run"), Run.open(softmax).load_model()
    before = start_model(config.model, config.data, len(run.classes), run.preprocess.in_chans).eval()
    untaught, taught = (divergence(n, teacher, loader_of(run)) for n in (before, run.load_model()))
    assert taught < 0.5 * untaught, (taught, untaught)


# All of it together, stopped and taken up


@pytest.mark.parametrize(("opt", "steps"), [("nadamuon", 2), ("lamb", 1)])
def test_a_run_with_everything_goes_on_to_the_same_bits(opt, steps, softmax, tmp_path, monkeypatch):
    keys = {
        **RANDOM,
        "optim.opt": opt,
        "optim.layer_decay": 0.7,
        "optim.grad_accum_steps": steps,
        "model.freeze": ["patch_embed"],
        "model.grad_checkpointing": True,
        "distill.teacher": str(softmax),
        "balanced": True,
    }
    if opt == "lamb":
        keys |= {"optim.mixup": 0.0, "optim.cutmix": 0.0, "optim.loss": "focal"}
    config = tiny(**{k.replace(".", "__"): v for k, v in keys.items()})
    train_only(config, tmp_path / "whole")
    original, done = Recorder.on_train_batch_end, []

    def stopping(self, trainer, *args):
        if trainer.global_step == 4 // steps + 1 and not done:
            done.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_train_batch_end", stopping)
        with pytest.raises(Stopped, match=f"epoch 2, batch {steps + 1} of 4"):
            train_only(config, tmp_path / "run")
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [4 // steps, 8 // steps]
