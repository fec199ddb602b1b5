"""The command line: one clear message for each kind of wrong input, help, and what each verb prints."""

import re
import subprocess
import sys

import numpy as np
import pytest
from runs import KEYS, MODEL, SOURCE, TINY, folder_of_pictures, options, picture, read_csv, refused, sansmax, save, tiny
from typer.main import get_command

from sansmax.cli import app
from sansmax.engine.train import train

SMALL = (*TINY, "--image-size", "32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on pictures of two classes."""
    top = tmp_path_factory.mktemp("cli")
    folder_of_pictures(top / "data")
    said = sansmax("train", top / "data", "--output", top / "run", *SMALL, "--quiet")
    assert said == (0, "", ""), said
    return top / "run"


def nothing_was_written(folder):
    assert not folder.exists() or not any(folder.iterdir())


# What may be wrong with the images


def test_a_missing_path_is_named_with_the_nearest(tmp_path):
    (tmp_path / "images").mkdir()
    message = refused("train", tmp_path / "imagse", "--output", tmp_path / "run", *SMALL)
    assert f"there is no '{tmp_path}/imagse'" in message
    assert f"did you mean '{tmp_path}/images'?" in message
    nothing_was_written(tmp_path / "run")


def test_an_empty_class_folder_is_named(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    (data / "healthy").mkdir()
    (data / "healthy" / "notes.txt").write_text("x")
    message = refused("train", data, "--output", tmp_path / "run", *SMALL)
    assert f"the class folder {data}/healthy has no image (it holds .txt); remove it, or add images (" in message


def test_a_class_that_is_only_in_test_is_named(tmp_path):
    data = folder_of_pictures(tmp_path / "data", splits=("train", "test"))
    folder_of_pictures(data / "test", classes=("other",), count=2)
    message = refused("train", data, "--output", tmp_path / "run", *SMALL)
    assert "classes in test that train has not: other; add training images of them or remove them" in message


def test_broken_pictures_are_named_and_may_be_skipped(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    (data / "benign" / "b01.png").write_bytes(b"no picture")
    whole = (data / "benign" / "b02.png").read_bytes()
    (data / "benign" / "b02.png").write_bytes(whole[: len(whole) // 2])
    message = refused("train", data, "--output", tmp_path / "run", *SMALL)
    assert f"2 of 24 images of {data} cannot be read" in message
    assert "b01.png" in message and "b02.png" in message and "--skip-bad" in message
    nothing_was_written(tmp_path / "run")
    said = sansmax("train", data, "--output", tmp_path / "run", "--skip-bad", *SMALL)
    assert said.status == 0, said
    bad = read_csv(tmp_path / "run" / "bad_images.csv")
    assert [b["name"] for b in bad] == ["benign/b01.png", "benign/b02.png"]
    assert all(b["reason"] for b in bad)
    assert len(read_csv(tmp_path / "run" / "splits.csv")) == 22
    assert "2 images could not be read" in (tmp_path / "run" / "summary.md").read_text()


def table(tmp_path, header, *lines):
    folder_of_pictures(tmp_path / "data", count=6)
    path = tmp_path / "data" / "table.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_table_without_a_column_names_those_it_has(tmp_path):
    path = table(tmp_path, "file,finding,patient", "benign/b01.png,benign,1")
    message = refused("train", path, "--output", tmp_path / "run", *SMALL)
    assert "has no label column that can be recognised: the columns are file, finding, patient" in message
    assert "--label-column NAME" in message
    message = refused("train", path, "--output", tmp_path / "run", *SMALL, "--label-column", "findings")
    assert "has no column 'findings': the columns are file, finding, patient" in message
    assert "did you mean 'finding'?" in message


def test_a_group_in_two_splits_is_named(tmp_path):
    path = table(tmp_path, "file,label,patient,split", "benign/b01.png,a,p7,train", "benign/b02.png,b,p7,test")
    message = refused("train", path, "--output", tmp_path / "run", *SMALL)
    assert "1 groups in more than one split: p7 (train, test); images of one group (patient) must stay" in message


# What may be wrong with the configuration


WRONG = {
    "image size": (
        ("--image-size", "30"),
        "the image size 30 x 30 is not divisible by the patch size 8; use --image-size 24 or 32",
    ),
    "size": (("--image-size", "big"), "--image-size is a number of pixels such as 224, or HxW such as 384x512, got 'b"),
    "model": (("--model", "seqnorm_vit_pico_patch8_129"), f"did you mean '{MODEL}'"),
    "argument of the model": (("--set", "model.options.depht=2"), "depht=2"),
    "heads": (("--set", "model.options.num_heads=7"), "embed_dim 64 is not divisible by num_heads 7"),
    "key": (("--set", "optim.larning_rate=1"), "unknown key 'optim.larning_rate'"),
    "key of a section": (("--set", "data.batchsize=3"), "did you mean batch_size or "),
    "no value": (("--set", "epochs"), "--set takes key=value, got 'epochs'"),
    "value": (("--set", "epochs=many"), "epochs: Input should be a valid integer"),
    "too small": (("--set", "batch_size=0"), "batch_size: Input should be greater than or equal to 1, got 0"),
    "optimiser": (("--set", "optim.opt=adamww"), "unknown optimiser optim.opt 'adamww': did you mean 'adamw'"),
    "policy": (("--set", "augment.auto=foo"), "unknown augmentation policy 'foo'"),
    "mixing": (("--set", "mixup=0.5", "--set", "loss=focal"), "cannot be combined with mixup"),
    "mean": (("--set", "data.mean=[0.1,0.2]", "--set", "in_chans=1"), "data.mean has 2 values and the network 1"),
    "patience": (("--set", "patience=3", "--set", "monitor=last"), "patience needs a monitor to watch"),
    "no file": (("--config", "nowhere.yaml"), "the configuration nowhere.yaml does not exist"),
    "resume": (("--resume",), "holds no run to resume; leave out --resume to start one"),
    "both": (("--resume", "--overwrite"), "--overwrite starts anew and --resume goes on; give one of them"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_configuration_is_refused_before_images_are_read(what, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("images were read")

    monkeypatch.setattr("sansmax.engine.train.open_data", read)
    words, message = WRONG[what]
    assert message in refused("train", SOURCE, "--output", tmp_path / "run", *SMALL, *words)
    nothing_was_written(tmp_path / "run")


def test_a_device_that_is_not_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused("train", SOURCE, "--output", tmp_path / "run", *SMALL, "--set", "device=cuda")
    assert "device is cuda and there is none here; leave it at auto, or give device=cpu" in message
    nothing_was_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "is not valid YAML"),
        ("- epochs", "must hold keys and values such as 'epochs: 30', it holds a list"),
        ("epoch: 3", "did you mean epochs?"),
        ("optim:\n  lrate: 3", "unknown key 'optim.lrate'"),
    ],
)
def test_a_wrong_file_of_configuration_is_refused(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    words = ("train", SOURCE, "--output", tmp_path / "run", "--config", tmp_path / "config.yaml")
    assert message in refused(*words)


def test_what_has_to_be_given_is_named(tmp_path):
    assert "give the folder of the run: --output RUN" in refused("train", SOURCE)
    assert "give DATA to train on: a folder with one sub-folder per class" in refused("train", "-o", tmp_path / "run")


# What may be in the way of the output


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_run_is_kept_unless_it_may_be_replaced(run):
    before = everything(run)
    words = ("train", SOURCE, "--output", run, *SMALL)
    assert "holds another run; go on with it by --resume, replace it by --overwrite, or give" in refused(*words)
    # neither is it deleted for a command that cannot work
    assert "did you mean" in refused(*words, "--overwrite", "--model", "seqnorm_vit_pico_patch8_129")
    assert "there is no 'nowhere'" in refused("train", "nowhere", "--output", run, *SMALL, "--overwrite")
    assert everything(run) == before


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    train(tiny(epochs=1), tmp_path / "run")
    (tmp_path / "run" / "heatmaps").mkdir()
    (tmp_path / "run" / ".last.0123abcd.ckpt").touch()
    words = ("train", SOURCE, "--output", tmp_path / "run", *SMALL, "--overwrite")
    for name in ("notes.txt", "images/patient.png"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
        before = everything(tmp_path)
        first = name.partition("/")[0]
        assert f"holds files that are not of a run: {first}; move them away" in refused(*words)
        assert everything(tmp_path) == before
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "images").rmdir()
    assert sansmax(*words, "--seed", "5").status == 0
    assert not (tmp_path / "run" / "heatmaps").exists()
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_foreign_files_and_folders_are_never_touched(flags, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    words = ("train", SOURCE, *SMALL, *flags, "--output")
    assert "is not empty and holds no run" in refused(*words, tmp_path / "thesis")
    assert "is a file; give a folder" in refused(*words, tmp_path / "file")
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    said = sansmax("train", SOURCE, "--output", tmp_path / "file" / "run", *SMALL)
    assert said.status == 2
    assert f"the folder {tmp_path}/file/run cannot be made: Not a directory" in said.err


def test_a_run_is_not_taken_up_with_other_images(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    assert sansmax("train", data, "--output", tmp_path / "run", *SMALL).status == 0
    # as if it had been stopped
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace('"finished"', '"started"'))
    save(data / "benign" / "new.png", picture(0, 99))
    said = sansmax("train", "--resume", "--output", tmp_path / "run")
    assert said.status == 2
    assert f"the images of {data} are not those the run {tmp_path}/run began with" in said.err


# What may be wrong with a run or a picture


@pytest.mark.parametrize("verb", ["evaluate", "predict", "heatmap"])
def test_a_folder_that_is_no_run_is_named(verb, run, tmp_path):
    (tmp_path / "p.png").write_bytes((run.parent / "data" / "benign" / "b00.png").read_bytes())
    assert f"the run {tmp_path}/no does not exist" in refused(verb, tmp_path / "no", tmp_path / "p.png")
    assert "is not a run: it has no config.yaml and run.json" in refused(verb, tmp_path, tmp_path / "p.png")


@pytest.mark.parametrize("verb", ["evaluate", "predict", "heatmap"])
def test_a_run_with_damaged_files_names_them(verb, run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = run.parent / "data"
    what = data if verb == "evaluate" else data / "benign" / "b00.png"
    weights = (copy / "model.safetensors").read_bytes()
    for damaged in (weights[:-100], weights[:20], b""):
        (copy / "model.safetensors").write_bytes(damaged)
        assert f"{copy}/model.safetensors is damaged" in refused(verb, copy, what)
    (copy / "model.safetensors").unlink()
    message = refused(verb, copy, what)
    assert "has no weights yet" in message and f"sansmax train --resume --output {copy}" in message
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "run.json").write_text("{")
    assert f"{copy}/run.json is damaged" in refused(verb, copy, what)


@pytest.mark.parametrize("verb", ["predict", "heatmap"])
def test_pictures_that_are_not_there_are_named(verb, run, tmp_path):
    assert f"the picture {tmp_path}/no.png does not exist" in refused(verb, run, tmp_path / "no.png")
    assert f"the folder {tmp_path} holds no pictures (" in refused(verb, run, tmp_path)
    (tmp_path / "bad.png").write_bytes(b"x")
    message = refused(verb, run, tmp_path / "bad.png")
    assert f"cannot read {tmp_path}/bad.png" in message
    message = refused(verb, run, run.parent / "data" / "benign" / "b00.png", "--image-size", "33")
    assert "33 x 33 is not divisible by the patch size 8" in message


def test_wrong_arguments_of_the_other_verbs_are_named(run, tmp_path):
    one = run.parent / "data" / "benign" / "b00.png"
    assert "unknown class 'maligant': did you mean 'malignant'?" in refused("heatmap", run, one, "--class", "maligant")
    assert "--split must be one of train, val, test, all" in refused(
        "evaluate", run, run.parent / "data", "--split", "x"
    )
    (tmp_path / "file").touch()
    assert f"--output {tmp_path}/file is a file" in refused("heatmap", run, one, "--output", tmp_path / "file")
    assert "must end in .csv" in refused("predict", run, one, "--output", tmp_path / "x.txt")
    assert "does not exist; make it first" in refused("predict", run, one, "--output", tmp_path / "no" / "x.csv")
    (tmp_path / "bad.png").write_bytes(b"x")
    said = sansmax("predict", run, tmp_path / "bad.png", "--skip-bad")
    assert said.status == 2 and "none of the 1 pictures can be read" in said.err
    assert "no model matches 'nope'; try" in refused("models", "nope")


# Errors, help, and what is printed


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "predict", "no", "x.png"], ["predict", "no", "x.png", "--debug"]):
        said = sansmax(*words)
        assert said.status == 2
        assert said.err.startswith("Traceback") and "InputError: the run no does not exist" in said.err
        assert "\nerror: the run no does not exist" in said.err


def test_a_process_of_its_own_ends_with_status_2_and_one_message():
    done = subprocess.run([sys.executable, "-m", "sansmax", "predict", "no", "x.png"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the run no does not exist; `sansmax train DATA --output no` makes one\n"


def test_a_fault_of_ours_is_told_from_wrong_input(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr("sansmax.engine.train.open_data", broken)
    said = sansmax("train", SOURCE, "--output", tmp_path / "run", *SMALL)
    assert said.status == 1
    assert "a fault of ours: KeyError: 'surprise'\nrepeat with --debug to see where" in said.err
    said = sansmax("train", SOURCE, "--output", tmp_path / "run", *SMALL, "--debug")
    assert said.status == 1
    assert said.err.startswith("Traceback") and 'raise KeyError("surprise")' in said.err


VERBS = dict(get_command(app).commands)


def test_the_verbs_are_those_promised():
    pictures = {"train", "evaluate", "predict", "heatmap", "benchmark", "models", "doctor", "demo"}
    assert set(VERBS) == pictures | {"tokenize", "bags", "convert-bags", "compare"}
    said = sansmax("--help")
    assert said.status == 0
    assert all(re.search(rf"^  {name} ", said.out, re.M) for name in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_option_with_its_meaning(verb):
    for flag in ("--help", "-h"):
        said = sansmax(verb, flag)
        assert said.status == 0 and said.err == ""
    for parameter in VERBS[verb].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            line = rf"^  .*{re.escape(max(parameter.opts, key=len))}\b"
            assert re.search(line, said.out, re.M), parameter.name


def test_unknown_verbs_and_options_end_with_status_2():
    for words in (["trian"], ["train", "--epoch", "3"], ["train", "--epochs", "x"], ["predict"]):
        said = sansmax(*words)
        assert said.status == 2 and "Usage: sansmax" in said.err and said.out == "", said


def test_doctor_prints_a_finding_a_line():
    said = sansmax("doctor")
    assert said.status == 0 and said.err == ""
    lines = said.out.splitlines()
    assert all(re.fullmatch(r"(PASS|WARN)  \w[\w-]*: \S.*", line) for line in lines)
    # what is not as it should be says what to do
    assert all("; mend: " in line for line in lines if line.startswith("WARN"))
    assert not any("; mend: " in line for line in lines if line.startswith("PASS"))
    assert {"Python", "torch", "timm", "lightning", "device", "threads", "bfloat16"} <= {
        line.split()[1].rstrip(":") for line in lines
    }


def test_doctor_fails_for_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr("sansmax.engine.doctor.version", lambda name: "1.0.0" if name == "torch" else "9999")
    said = sansmax("doctor")
    assert said.status == 1
    bad = [line for line in said.out.splitlines() if line.startswith("FAIL")]
    assert bad == ["FAIL  torch: 1.0.0 (needs 2.8 or newer); mend: pip install --upgrade 'torch>=2.8'"]


def test_models_lists_ours_and_those_that_match():
    said = sansmax("models")
    ours = said.out.splitlines()
    assert {MODEL, "soft_tiny", "sima_small_12_p16"} <= set(ours)
    assert all(line.startswith(("seqnorm_", "sima_", "soft_", "softmax_", "cvt_", "abmil_")) for line in ours)
    assert sansmax("models", "resnet10t*").out.split() == ["resnet10t"]


def test_progress_is_plain_lines_away_from_a_terminal(tmp_path):
    said = sansmax("train", SOURCE, "--output", tmp_path / "run", *options({**KEYS, "epochs": 2}))
    assert said.status == 0
    assert "\x1b" not in said.err + said.out and "\r" not in said.err
    assert len(re.findall(r"^epoch   [12]/2  train loss \d\.\d{4}  val loss \d\.\d{4}", said.err, re.M)) == 2
    assert said.out == f"run: {tmp_path}/run\nread: {tmp_path}/run/summary.md\n"
    np.testing.assert_array_equal([r["epoch"] for r in read_csv(tmp_path / "run" / "metrics.csv")], ["1", "2"])
