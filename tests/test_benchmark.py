"""The benchmark: real processes at tiny sizes; nothing here depends on how fast anything is."""

import contextlib
import os
import signal
import statistics
from dataclasses import replace

import pytest
import torch
from runs import refused, sansmax
from torch.utils.flop_counter import FlopCounterMode

from sansmax import ops
from sansmax.engine import benchmark, suites, targets
from sansmax.engine.benchmark import COLUMNS, Limits, Past, measure
from sansmax.engine.cases import PRODUCTS, SUITES, Case, Setup, target_cases
from sansmax.engine.contestants import network_step, step_of
from sansmax.engine.peers import PEERS
from sansmax.engine.suites import cases_of
from sansmax.engine.workers import Workers
from sansmax.errors import InputError
from sansmax.report import benchmark as report
from sansmax.report import scaling
from sansmax.report.scaling import scaling_figure
from sansmax.report.tables import read_rows

NAMES = ("seqnorm", "seqnorm:linear", "softmax", PRODUCTS)
SMALL = {"dim": 16, "heads": 2}
FEW = Limits(budget=20.0, memory_mib=4096, repeats=3)


@pytest.fixture(scope="module")
def workers():
    """One process with the libraries loaded, for all tests."""
    with Workers() as one:
        yield one


@pytest.fixture(autouse=True)
def shared(workers, monkeypatch):
    monkeypatch.setattr(benchmark, "Workers", lambda: contextlib.nullcontext(workers))


def layer(tokens=8, contestants=NAMES, **changes):
    return Case("layer", "layer", tokens, 16, 2, contestants, **changes)


def by_name(rows):
    return {row["contestant"]: row for row in rows}


# The measurement


@pytest.mark.slow
def test_every_contestant_of_every_case_is_a_row(tmp_path, monkeypatch):
    asked, samples = Workers.request, []

    def listening(self, limit, **request):
        for answer in asked(self, limit, **request):
            samples.extend(answer.get("samples", {}).values())
            yield answer

    monkeypatch.setattr(Workers, "request", listening)
    cases = cases_of("attention", Setup(tokens=(8, 20), **SMALL), kinds=("layer",), contestants=NAMES)
    deep = Setup(tokens=(8,), **SMALL, directions=("forward",), quick=True)
    cases += cases_of("attention", deep, kinds=("encoder",), contestants=NAMES)
    done = benchmark.benchmark("attention", tmp_path, cases, FEW, again="type this")
    rows = read_rows(tmp_path / "attention.csv")
    assert tuple(rows[0]) == COLUMNS
    found = [(r["case"], r["direction"], r["tokens"], r["contestant"]) for r in rows]
    wanted = [("layer", d, n, m) for n in (8, 20) for d in ("forward", "forward+backward") for m in NAMES]
    assert found == wanted + [("encoder", "forward", 8, m) for m in NAMES]
    for row, own in zip(rows, samples, strict=True):
        assert row["reason"] is None
        assert 0 < row["seconds_min"] == min(own)
        assert row["seconds"] == statistics.median(own)
        assert row["repeats"] == len(own) == 3
        assert (row["dim"], row["heads"], row["batch"], row["threads"]) == (16, 2, 1, 1)
        assert row["depth"] == (1 if row["case"] == "layer" else 3)
    assert done.complete and len(done.rows) == len(rows)
    page = (tmp_path / "attention.md").read_text()
    assert "type this" in page and "## encoder, forward: 16 channels, 2 heads, 3 blocks, float32, cpu" in page
    pictures = [path.name for path in tmp_path.glob("*.png")]
    assert sorted(pictures) == ["attention.png", "attention_layer_training.png"]
    assert all(f"]({name})" in page for name in pictures)


def test_memory_is_that_of_the_pass_alone():
    # scores of 2 heads, 2048 x 2048 in float32, are 32 MiB; the linear orders need a hundredth
    rows, _ = measure([layer(2048, ("seqnorm:quadratic", "seqnorm:linear", PRODUCTS))], FEW)
    peaks = {name: row["peak_mib"] for name, row in by_name(rows).items()}
    assert 32 <= peaks["seqnorm:quadratic"] < 140
    assert peaks["seqnorm:linear"] is None or peaks["seqnorm:linear"] < 16
    assert peaks[PRODUCTS] is None


def test_over_the_budget_is_a_row_with_the_reason():
    limits = replace(FEW, budget=1e-9)
    rows, _ = measure([layer(8), layer(16)], limits)
    first, second = by_name(rows[:4]), by_name(rows[4:])
    assert first["softmax"]["reason"].startswith("takes about ")
    assert second["softmax"]["reason"].startswith("would take about ")
    assert first["softmax"]["seconds"] is second["softmax"]["seconds"] is None


def test_more_memory_than_allowed_is_a_row_with_the_reason():
    cases = [layer(n, ("seqnorm:quadratic", "softmax")) for n in (4096, 8192)]
    rows, _ = measure(cases, replace(FEW, memory_mib=48))
    first, second = by_name(rows[:2]), by_name(rows[2:])
    assert first["seqnorm:quadratic"]["reason"] == "needs more than 48 MiB"
    assert second["seqnorm:quadratic"]["reason"] == "needs more than 48 MiB at 4,096 tokens"
    assert first["softmax"]["reason"] is None and first["softmax"]["seconds"] > 0


@pytest.mark.parametrize("what", ["memory", "times"])
def test_a_process_that_is_killed_is_a_row_with_the_reason(what, monkeypatch):
    asked = Workers.request

    def killing(self, limit, **request):
        for answer in asked(self, limit, **request):
            if answer.get("begin") == "softmax" and request["what"] == what:
                os.kill(answer["pid"], signal.SIGKILL)
            yield answer

    monkeypatch.setattr(Workers, "request", killing)
    rows, complete = measure([layer(1024), layer(2048)], FEW)
    first, second = by_name(rows[:4]), by_name(rows[4:])
    assert complete
    assert first["softmax"]["reason"] == "ended by the system (SIGKILL), probably for want of memory"
    assert second["softmax"]["reason"] == f"{first['softmax']['reason']} at 1,024 tokens"
    for name in ("seqnorm", "seqnorm:linear", PRODUCTS):
        assert first[name]["seconds"] > 0 and first[name]["reason"] is None


def test_a_contestant_that_fails_is_a_row_with_what_it_said():
    rows, _ = measure([layer(8, ("seqnorm", "softmax"), dtype="int64")], FEW)
    assert all(row["reason"].startswith("fails: ") and row["seconds"] is None for row in rows)


def test_a_fault_of_ours_is_no_row():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        measure([replace(layer(), kind="nonsense")], FEW)


def test_no_sign_of_life_is_an_answer():
    with Workers() as one:
        # not even the libraries are loaded by then
        assert list(one.request(0.05, what="memory", case=vars(layer()), name="softmax")) == [{"ended": None}]
        assert one.process is None


def test_a_missing_peer_is_a_reason_and_an_error_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(benchmark, "missing", lambda name: "some-package")
    monkeypatch.setattr(suites, "missing", lambda name: "some-package")
    rows, _ = measure([layer(8, ("nystrom", "softmax"))], FEW)
    assert rows[0]["reason"].startswith("some-package is not installed: pip install 'sansmax[bench]'")
    with pytest.raises(InputError, match=r"nystrom needs the package some-package: pip install 'sansmax\[bench\]'"):
        cases_of("attention", Setup(), contestants=("nystrom",))


def test_ctrl_c_keeps_what_is_measured(tmp_path, monkeypatch):
    asked, seen = Workers.request, []

    def stopped(self, limit, **request):
        seen.append(request["case"]["tokens"])
        if seen[-1] == 16:
            # the table grows with the groups; pictures and page come at the end
            assert len(read_rows(tmp_path / "attention.csv")) == 1
            raise KeyboardInterrupt
        yield from asked(self, limit, **request)

    monkeypatch.setattr(Workers, "request", stopped)
    words = ("--case", "layer", "--contestants", "softmax", "--tokens", "8,16", "--dim", "16", "--heads", "2")
    said = sansmax("benchmark", *words, "--direction", "forward", "--output", tmp_path)
    assert said.status == 130
    assert [row["tokens"] for row in read_rows(tmp_path / "attention.csv")] == [8]
    assert "Stopped before the end: 1 rows." in (tmp_path / "attention.md").read_text()


# What is computed


@pytest.mark.parametrize(("direction", "layers", "mlps"), [("forward", 2, 2), ("forward+backward", 5, 6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_alone_are_those_of_the_layer_and_of_the_mlps(direction, layers, mlps, batch):
    n, c = 40, 16
    how = {"direction": direction, "batch": batch}
    for case, expected in [
        (layer(n, **how), layers * 2 * n * c * c),
        (replace(layer(n, **how), kind="encoder", depth=3), 3 * (layers * 2 * n * c * c + mlps * 2 * n * c * 4 * c)),
    ]:
        with FlopCounterMode(display=False) as count:
            network_step(case, PRODUCTS)()
        assert count.get_total_flops() == batch * expected


def test_a_pass_with_gradients_leaves_those_of_one_pass():
    module = torch.nn.Linear(16, 16, dtype=torch.float64)
    step = step_of(module, replace(layer(), direction="forward+backward", dtype="float64"))
    step()
    once = module.weight.grad.clone()
    step()
    torch.testing.assert_close(module.weight.grad, once)


def test_formulas_written_out_are_the_operations(assert_same):
    q, k, v = torch.randn(3, 2, 3, 40, 8, dtype=torch.float64)
    assert_same(targets.sima_written_out(q, k, v), ops.sima_attention(q, k, v))
    landmarks = q[:, :, ::8]
    assert_same(targets.soft_written_out(q, v, landmarks), ops.soft_attention(q, v, landmarks))


def test_targets_run_by_name():
    cases = [replace(case, tokens=64, batch=1, depth=1, **SMALL) for case in target_cases(Setup())]
    assert {case.name for case in target_cases(Setup())} >= {
        "sima attention alone",
        "soft layer (49 landmarks)",
        "block training step",
        "encoder in chunks",
    }
    assert {(c.tokens, c.batch, c.dim) for c in target_cases(Setup()) if c.kind == "block"} == {
        (49, 32, 384),
        (196, 32, 384),
    }
    rows, _ = measure(list(dict.fromkeys(cases)), FEW)
    for row in rows:
        # the peers are packages of their own
        assert row["seconds"] or (row["contestant"] in PEERS and "is not installed" in row["reason"]), row


def test_growth_is_that_between_the_last_two_sizes():
    past = Past()
    assert past.expected(("a",), 100) == 0
    past.add(("a",), 10, 1.0)
    assert past.expected(("a",), 100) == 1.0
    past.add(("a",), 20, 4.0)
    assert past.expected(("a",), 40) == pytest.approx(16)
    assert past.expected(("b",), 40) == 0
    # nothing grows faster than by the square, or is taken to stand still
    past.add(("a",), 40, 400.0)
    assert past.expected(("a",), 80) == pytest.approx(1600)


# What is reported


def row(contestant, seconds, threads=1, tokens=64, **changes):
    facts = {**layer(tokens, threads=threads).facts(), "peak_mib": 3.0, "reason": None}
    return {**facts, "contestant": contestant, "seconds": seconds, **changes}


def test_ratios_are_of_medians_at_the_best_number_of_threads():
    rows = [row("softmax", 8.0), row("softmax", 6.0, 2), row("seqnorm", 2.0), row("seqnorm", 3.0, 2)]
    rows += [row(PRODUCTS, 1.0), row(PRODUCTS, 0.5, 2), row("nystrom", None, reason="would take long")]
    found = {key[-1]: value for key, value in report.ratios(rows).items()}
    assert found["seqnorm"] == {"seconds": 2.0, "fast": 3.0, "products": 4.0}
    assert found["softmax"] == {"seconds": 6.0, "fast": 1.0, "products": 12.0}
    assert found["nystrom"] == {"seconds": None, "fast": None, "products": None}
    (part,) = report.parts(rows)
    assert part.headers[2:6] == ["1 thread", "2 threads", "times as fast as softmax", f"times {PRODUCTS}"]
    assert [64, "seqnorm", "2 s", "3 s", "3", "4", 3, ""] in part.lines
    assert [64, "nystrom", "", "", "", "", 3, "would take long"] in part.lines


def test_ratios_stay_within_one_size():
    rows = [row("softmax", 8.0), row("seqnorm", 2.0, tokens=128)]
    assert [value["fast"] for value in report.ratios(rows).values()] == [1.0, None]


def test_a_chosen_order_is_held_to_the_best():
    def cell(tokens, *seconds):
        names = ("auto", "quadratic", "linear", "moments")
        own = [row(f"seqnorm:{n}", s, tokens=tokens) for n, s in zip(names, seconds, strict=True)]
        return [{**r, "case": "orders"} for r in own]

    rows = cell(16, 1.05, 1.0, 2.0, 3.0) + cell(64, 3.0, 4.0, 2.0, 3.0) + cell(256, 1.0, None, 2.0, 1.0)
    (part,) = report.order_parts(rows)
    assert part.lines == [[1, 16, "1.05 quadratic", "**1.50** linear", "1.00 moments"]]
    assert "Within 10 % in 2 of 3 cells; worst 1.50, median 1.05." in part.text
    assert report.is_orders(rows) and not report.is_orders([row("softmax", 1.0)])


def test_the_picture_tells_the_limit_from_the_contestants():
    names = ("softmax", "seqnorm", "a", "b", "c", PRODUCTS)
    rows = []
    for i, name in enumerate(names):
        for tokens in (64, 256):
            seconds = (0.01 if name == PRODUCTS else 3.0 - 0.4 * i) * tokens
            rows.append({**row(name, seconds, tokens=tokens, peak_mib=tokens * (i + 1)), "mechanism": name})
    figure = scaling_figure(rows, limit=PRODUCTS, heading="Time of a day")
    # not of the limit, which none can undercut
    assert figure.texts[0].get_text().startswith("At 256 tokens c is 2.1 times as fast as softmax")
    time = figure.axes[0]
    assert time.get_title() == "Time of a day"
    assert [line.get_linestyle() for line in time.lines if len(line.get_xdata()) == 2] == ["-"] * 5 + ["--"]
    # a line each, beside six
    assert f"{PRODUCTS} 1.00" in [text.get_text() for text in time.texts]
    colours = scaling.mechanism_colours([str(i) for i in range(10)])
    assert len(set(colours.values())) == 10


# The command line


def test_the_verb_writes_and_prints(tmp_path):
    words = ("--case", "layer", "--tokens", "8", "--dim", "16", "--heads", "2", "--repeats", "1")
    said = sansmax("benchmark", *words, "--contestants", "seqnorm,softmax", "--dtype", "bfloat16", "-o", tmp_path)
    assert said.status == 0, said
    assert "times as fast as" in said.out and f"written: {tmp_path}/attention.csv" in said.out
    assert {p.name for p in tmp_path.iterdir()} == {"attention.csv", "attention.md"}
    page = (tmp_path / "attention.md").read_text()
    assert "sansmax benchmark --case layer --tokens 8 " in page and "- machine: " in page


def test_orders_and_targets_are_suites_of_their_own(tmp_path):
    words = ("--tokens", "8,32", "--dim", "16", "--heads", "2", "--batch", "1", "--repeats", "1", "-o", tmp_path)
    said = sansmax("benchmark", "orders", *words, "--contestants", "seqnorm")
    assert said.status == 0, said
    assert "of 2 cells; worst" in (tmp_path / "orders.md").read_text()
    names = {r["contestant"] for r in read_rows(tmp_path / "orders.csv")}
    assert names == {f"seqnorm:{order}" for order in ("auto", "quadratic", "linear", "moments")}
    assert set(SUITES) == {"attention", "orders", "targets"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attentoin", "unknown suite 'attentoin': did you mean 'attention'?"),
        ("--contestants seqnrom", "unknown contestant 'seqnrom': did you mean 'seqnorm'"),
        ("--contestants seqnorm:linaer", "seqnorm:linaer cannot be built: order"),
        ("--contestants softmax:moments", "softmax:moments cannot be built"),
        ("--case layers", "unknown case 'layers': did you mean 'layer'?"),
        ("--dtype float23", "unknown dtype 'float23': did you mean 'float32'"),
        ("--direction back", "unknown direction 'back'"),
        ("--device gpu", "device must be cpu or cuda, got 'gpu'"),
        ("--dim 384 --heads 5", "384 channels are not divisible by 5 heads"),
        ("--tokens 0,4", "tokens must be whole numbers above 0, got 0, 4"),
        ("--tokens 4,x", "--tokens is whole numbers with commas between them, such as 196,1024, got '4,x'"),
        ("--threads 0", "threads must be whole numbers above 0, got 0"),
        ("--budget 0", "budget must be above 0, got 0"),
        ("targets --contestants seqnorm", "the suite targets has its own contestants"),
        (
            "orders --contestants softmax",
            "softmax has one order of computation; the suite orders takes those that choose",
        ),
        ("orders --contestants seqnorm:linear", "the suite orders takes mechanisms of the package, without an order"),
    ],
)
def test_wrong_arguments_are_errors(words, message, tmp_path):
    assert message in refused("benchmark", *words.split(), "--output", tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path):
    message = refused("benchmark", "--device", "cuda", "--output", tmp_path)
    assert message.startswith("there is no CUDA device on this machine; leave out --device")
