"""Tuned tables: reading, writing, looking up; tuning once, whatever the processes; the command."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import elman
from elman import choice, cli, ops, routing, tables, timing, tuning
from elman.kernels import configs, cooperative, resident, step
from tests.machines import simulate_gpu

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU = "Simulated GPU"
PROBLEM = configs.Problem(16, 1024, 1, torch.bfloat16)
MADE = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "driver": "580",
    "date": "2026-01-31",
    "elman": "0.1",
    "commit": "x",
}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A simulated GPU without any table; the user's and the shipped ones are in tmp_path."""
    simulate_gpu(monkeypatch, GPU)
    for variable in ("ELMAN_AUTOTUNE", "ELMAN_BACKEND", "ELMAN_KERNELS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "shipped_path", lambda gpu: tmp_path / "shipped.json")
    tuning.forget()
    yield
    tuning.forget()


class Timer:
    """Instead of timing.measure: the last config is the quickest, and all calls are noted."""

    def __init__(self):
        self.calls = []

    def __call__(self, kernel, problem, tried, device):
        self.calls.append((kernel, problem))
        return [[9.0 - i, 10.0 - i, 11.0 - i] for i in range(len(tried))]


@pytest.fixture
def timer(monkeypatch):
    timer = Timer()
    monkeypatch.setattr(tuning, "measure", timer)
    return timer


def tried(kernel="step", problem=PROBLEM):
    """The configs that a tuner may time, the model's first choice first."""
    found = [config for config, _ in configs.candidates(kernel, problem, tuning.chip(CUDA))]
    assert len(found) > 1, "nothing to choose from"
    return found


def entry(config=None, kernel="step", us=1.5, **changes):
    """An entry whose config is by default not the model's first choice."""
    key = tables.key_of(kernel, PROBLEM)._replace(**changes)
    return tables.Entry(key, config or tried()[-1], us, us - 0.1, us + 0.1, 2.0, 4)


def store(*entries, path=None):
    """Writes a table of these entries, the user's unless another path is given."""
    table = tables.Table(GPU)
    for each in entries:
        table = table.with_entry(each, MADE)
    tables.write(path or tables.user_path(GPU), table)
    tuning.forget()


# On disk


def test_a_table_comes_back_as_it_was_written(tmp_path):
    failed = {"StepConfig(BLOCK_B=16)": "OutOfResources: shared memory"}
    times = {"StepConfig(BLOCK_B=32)": {"median": 1.5, "p20": 1.4, "p80": 1.6}}
    table = tables.Table(GPU)
    for each, made in (
        (replace(entry(), failed=failed, times=times, default_us=None), MADE),
        (entry(configs.ResidentConfig(**_defaults(configs.ResidentConfig)), "resident", backward=True), MADE),
        (entry(configs.CooperativeConfig(**_defaults(configs.CooperativeConfig)), "cooperative", D=2), MADE),
        (replace(entry(kernel="cudnn"), config=None), {**MADE, "torch": "2.13.0"}),
    ):
        table = table.with_entry(each, made)
    path = tmp_path / "deep" / "table.json"
    tables.write(path, table)
    read = tables.read(path, GPU)
    assert read == table
    assert [e.provenance for e in read.entries.values()].count(1) == 1
    assert list(path.parent.iterdir()) == [path]
    documented = tables.__doc__
    data = json.loads(path.read_text())
    for name in (*data, *data["entries"][0], *data["entries"][0]["us"], *data["provenance"][0]):
        assert f'"{name}"' in documented, name


def test_an_older_table_has_no_candidates_times():
    store(entry())
    path = tables.user_path(GPU)
    data = json.loads(path.read_text())
    del data["entries"][0]["times"]
    path.write_text(json.dumps(data))
    assert tables.read(path, GPU).entries == {entry().key: entry()}


def _defaults(kind):
    """A value of its type for each of a config's fields."""
    values = {"int": 16, "bool": True, "str": "ieee"}
    return {name: values[annotation] for name, annotation in kind.__annotations__.items()}


def test_no_file_is_an_empty_table(tmp_path):
    assert tables.read(tmp_path / "none.json", GPU) == tables.Table(GPU)


def test_a_write_that_fails_leaves_the_old_table(monkeypatch):
    store(entry())
    path = tables.user_path(GPU)
    before = path.read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store(entry(us=3.0))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def changed(**changes):
    """A change of the first entry of a file's data."""
    return lambda data: data["entries"][0].update(changes)


def without(name):
    return lambda data: data["entries"][0].pop(name)


def test_a_table_that_could_not_be_read_is_not_written():
    store(entry())
    before = tables.user_path(GPU).read_text()
    with pytest.raises(ValueError, match="'median' is 0"):
        store(replace(entry(), us=0.0))
    assert tables.user_path(GPU).read_text() == before


BROKEN = {
    "schema": (lambda data: data.update(schema=2), "schema is 2; expected 1"),
    "another GPU's": (lambda data: data.update(gpu="Other"), "gpu is 'Other'; expected 'Simulated GPU'"),
    "no entries": (lambda data: data.pop("entries"), "no 'entries'"),
    "no times": (without("us"), "no 'us'"),
    "no median": (changed(us={"p20": 1, "p80": 1}), "no 'median'"),
    "negative": (changed(us={"median": -1.0, "p20": 1.0, "p80": 1.0}), "'median' is -1.0"),
    "infinite": (changed(default_us=float("inf")), "'default_us' is inf"),
    "a candidate without times": (changed(times={"StepConfig()": {"median": 1.0}}), "no 'p20'"),
    "times are a list": (changed(times=[1.0]), "'times' is [1.0]"),
    "text for a size": (changed(H="1024"), "'H' is '1024'"),
    "true for a size": (changed(H=True), "'H' is True"),
    "no bucket": (changed(B=12), "a bucket for B"),
    "no such pass": (changed(**{"pass": "sideways"}), "'pass' is 'sideways'"),
    "no such dtype": (changed(dtype="int8"), "'dtype' is 'int8'"),
    "no provenance": (changed(provenance=1), "provenance 1"),
    "an entry is a list": (lambda data: data.update(entries=[[]]), "no 'H'"),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_or_foreign_file_names_itself_and_the_remedy(change, words):
    store(entry())
    path = tables.user_path(GPU)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="can't be used") as raised:
        tuning.tune("step", PROBLEM, CUDA)
    for part in (str(path), words, "Delete it"):
        assert part in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"1"], ids=repr)
def test_a_file_that_is_no_table(content):
    store()
    tables.user_path(GPU).write_bytes(content)
    with pytest.raises(ValueError, match="Delete it"):
        tuning.tune("step", PROBLEM, CUDA)


def another_schema(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))


def a_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("spoil", "remedy"), [(another_schema, "Delete it"), (a_directory, "can be read")])
def test_an_unusable_table_stops_no_call(spoil, remedy, timer, capsys, tmp_path):
    store(entry(), path=tmp_path / "shipped.json")
    store(entry(H=256))
    path = tables.user_path(GPU)
    spoil(path)
    problems = [replace(PROBLEM, H=256), replace(PROBLEM, H=64), PROBLEM]
    with pytest.warns(UserWarning, match=remedy) as warned:
        found = [tuning.config_for("step", problem, CUDA) for problem in problems]
    assert found[-1] == tried()[-1], "the shipped table is there"
    assert len(warned) == 1, [str(w.message) for w in warned]
    assert str(path) in str(warned[0].message)
    assert timer.calls == [], "it could not be kept"
    with pytest.raises((OSError, ValueError), match=re.escape(str(path))):
        tuning.tune("step", PROBLEM, CUDA)
    assert cli.main(["doctor"]) == 0
    assert any("yours" in line and str(path) in line for line in capsys.readouterr().out.splitlines())


REFUSED = {
    "unknown field": (lambda item: item["config"].update(CLUSTERS=2), "CLUSTERS"),
    "missing field": (lambda item: item["config"].pop("BLOCK_N"), "BLOCK_N"),
    "another type": (lambda item: item["config"].update(num_warps="4"), "num_warps"),
    "unknown kernel": (lambda item: item.update(kernel="quantum"), "'quantum'"),
    "another class": (lambda item: item["config"].update(PRECISION="tf32"), "class ieee"),
    "float32's alone": (lambda item: item["config"].update(PRECISION="tf32x3"), "class ieee"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_entry_of_another_version_is_refused_alone(change, words, timer, capsys):
    store(entry(), entry(H=512))
    path = tables.user_path(GPU)
    data = json.loads(path.read_text())
    change(next(item for item in data["entries"] if item["H"] == 1024))
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=words) as warned:
        tuning.config_for("step", PROBLEM, CUDA)
    assert str(path) in str(warned[0].message)
    assert len(timer.calls) == 1, "it is tuned anew"
    path.write_text(json.dumps(data))
    tuning.forget()
    with pytest.warns(UserWarning, match=words):
        assert tuning.lookup("step", replace(PROBLEM, H=512), CUDA), "the other entry is still there"
    assert cli.main(["doctor"]) == 0
    assert words in capsys.readouterr().out


# Looking up


def test_a_key_holds_a_bucket_of_the_batch():
    assert [tables.bucket(B) for B in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]
    key = tables.key_of("step", replace(PROBLEM, B=9, ragged=True))
    assert key == tables.key_of("step", PROBLEM)
    assert tables.key_of("step", replace(PROBLEM, precision="tf32")) == key, "bfloat16 has but one product"
    single = replace(PROBLEM, dtype=torch.float32)
    assert tables.key_of("step", replace(single, precision="tf32")) != tables.key_of("step", single)


# changes of an entry's key -> whether it stands in for PROBLEM's
NEAR = [
    ({}, True),
    ({"H": 896}, True),
    ({"H": 895}, False),
    ({"H": 1152}, True),
    ({"H": 1153}, False),
    ({"B": 8}, True),
    ({"B": 32}, True),
    ({"B": 64}, False),
    ({"H": 1152, "B": 8}, True),
    ({"D": 2}, False),
    ({"backward": True}, False),
    ({"dtype": "float16"}, False),
    ({"kernel": "cudnn"}, False),
]


@pytest.mark.parametrize(("changes", "found"), NEAR, ids=str)
@pytest.mark.parametrize("where", ["user", "shipped"])
def test_the_bounds_of_near(changes, found, where, tmp_path, timer):
    stored = entry(**changes)
    store(stored, path=None if where == "user" else tmp_path / "shipped.json")
    assert tuning.lookup("step", PROBLEM, CUDA) == (stored if found else None)
    tuning.config_for("step", PROBLEM, CUDA)
    assert len(timer.calls) == (not found)


def test_the_precision_class_is_part_of_the_key():
    problem = replace(PROBLEM, dtype=torch.float32)
    stored = entry(tried(problem=problem)[0], dtype="float32")
    store(stored)
    assert tuning.lookup("step", problem, CUDA) == stored
    assert tuning.lookup("step", replace(problem, precision="tf32"), CUDA) is None


def test_the_nearest_is_taken(tmp_path):
    shipped = tmp_path / "shipped.json"
    far, near, rows, exact = entry(H=960), entry(H=1000), entry(B=32), entry(us=7.0)
    store(far, near)
    assert tuning.lookup("step", PROBLEM, CUDA) == near
    store(far, near, rows)
    assert tuning.lookup("step", PROBLEM, CUDA) == rows, "H first, then B"
    store(exact, path=shipped)
    assert tuning.lookup("step", PROBLEM, CUDA) == exact, "an exact key wins, wherever it is"
    store(far, near, replace(exact, us=8.0))
    assert tuning.lookup("step", PROBLEM, CUDA).us == 8.0, "the user's table comes first"
    assert tuning.lookup("step", replace(PROBLEM, ragged=True), CUDA).us == 8.0


def test_a_config_that_does_not_fit_is_not_used(timer):
    too_much = replace(tried()[0], num_stages=1000)
    near = entry(H=1000)
    store(entry(too_much), near)
    assert tuning.lookup("step", PROBLEM, CUDA) == near
    store(entry(too_much), entry(too_much, H=1000))
    assert tuning.lookup("step", PROBLEM, CUDA) is None
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0], "its key is there, and not tuned again"
    assert timer.calls == []


def test_where_the_tables_are(monkeypatch, tmp_path):
    assert tables.user_path("NVIDIA H200") == tmp_path / "cache" / "tuned" / "nvidia-h200.json"
    monkeypatch.delenv("ELMAN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tables.user_path("AMD MI300X (VF)") == tmp_path / "xdg" / "elman" / "tuned" / "amd-mi300x-vf.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.user_path("a") == Path.home() / ".cache" / "elman" / "tuned" / "a.json"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path))
    assert tables.user_path("a") == tmp_path / "tuned" / "a.json"


# Choosing a config


def test_the_first_call_tunes_and_no_other(timer):
    config = tuning.config_for("step", PROBLEM, CUDA)
    assert config == tried()[-1], "the quickest, not the model's first choice"
    assert tuning.config_for("step", PROBLEM, CUDA) is config
    assert tuning.config_for("step", replace(PROBLEM, B=13), CUDA) == config, "the same bucket"
    tuning.forget()  # as another process begins
    assert tuning.config_for("step", PROBLEM, CUDA) == config
    assert timer.calls == [("step", PROBLEM)]
    (found,) = tables.read(tables.user_path(GPU), GPU).entries.values()
    n = len(tried())
    assert (found.us, found.default_us, found.candidates) == (11.0 - n, 10.0, n)
    assert found.p20 < found.us < found.p80
    made = json.loads(tables.user_path(GPU).read_text())["provenance"][0]
    assert made.keys() == MADE.keys()
    assert (made["torch"], made["elman"]) == (torch.__version__, elman.__version__)
    assert tuning.config_for("step", replace(PROBLEM, backward=True), CUDA)
    assert len(timer.calls) == 2, "the backward pass has a key of its own"


def test_the_whole_bucket_is_timed(timer):
    tuning.config_for("step", replace(PROBLEM, B=9, ragged=True), CUDA)
    assert timer.calls == [("step", PROBLEM)]


def test_off_pins_the_model_s_first_choice(monkeypatch, timer):
    store(entry())
    monkeypatch.setenv("ELMAN_AUTOTUNE", "off")
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    assert tuning.config_for("step", replace(PROBLEM, H=64), CUDA)
    assert timer.calls == []
    assert "ELMAN_AUTOTUNE is off" in choice.compare((PROBLEM,), CUDA).text
    tuning.forget()
    monkeypatch.setenv("ELMAN_AUTOTUNE", "on")
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[-1]
    tuning.forget()
    monkeypatch.setenv("ELMAN_AUTOTUNE", "false")
    with pytest.raises(ValueError, match="ELMAN_AUTOTUNE is 'false'; expected 'on' or 'off'"):
        tuning.config_for("step", PROBLEM, CUDA)


def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch, timer):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    store(entry(H=512))
    assert tuning.config_for("step", replace(PROBLEM, H=512), CUDA) == tried()[-1], "a table may be read"
    assert timer.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # As another process begins, without a table; it captures first and calls eagerly then.
    tuning.forget()
    tables.user_path(GPU).unlink()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = tuning.config_for("step", PROBLEM, CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.config_for("step", PROBLEM, CUDA) is captured, "a graph and the calls after it agree"
    assert timer.calls == []
    tuning.forget()
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[-1], "the next process tunes"
    assert len(timer.calls) == 1


def test_what_is_not_tuned(timer):
    assert tuning.config_for("step", PROBLEM, CPU) == configs.choose("step", PROBLEM)
    store(entry())
    cell = replace(PROBLEM, inputs=32)
    assert tuning.config_for("step", cell, CUDA) == configs.choose("step", cell, tuning.chip(CUDA))
    empty = replace(PROBLEM, B=0)
    assert choice.plan("triton", empty, CUDA, 64) == ("step", empty)
    assert choice.config("step", empty, CUDA) is None
    assert timer.calls == []


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path, timer):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tables, "read", lambda path, gpu: tables.Table(gpu))
    with pytest.warns(UserWarning, match="model's first choice") as warned:
        assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    assert "ELMAN_CACHE_DIR" in str(warned[0].message)
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0], "and it is said once"


def test_a_lock_that_another_holds_is_waited_for_and_then_a_warning(monkeypatch, timer):
    path = tables.user_path(GPU)
    monkeypatch.setattr(tuning, "tune", partial(tuning.tune, wait=0.1))
    with tables.locked(path, 1.0), pytest.warns(UserWarning, match="locked by another process") as warned:
        assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    assert str(path) in str(warned[0].message)
    assert timer.calls == []
    tuning.forget()
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[-1], "the lock is let go"


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    copies = []
    with tables.locked(tmp_path / "table.json", 1.0):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}").endswith("table.lock"):
                    copies.append(os.dup(int(descriptor)))
    assert copies
    with tables.locked(tmp_path / "table.json", 0.1):
        pass
    for copy in copies:
        os.close(copy)


def test_a_candidate_that_fails_is_noted_and_not_chosen():
    first, *others = tried()

    def timer(kernel, problem, configs, device):
        return ["OutOfResources: shared memory", *([5.0, 5.0] for _ in others)]

    found = tuning.tune_key("step", PROBLEM, CUDA, timer)
    assert found.config == others[0]
    assert found.default_us is None
    assert found.failed == {str(first): "OutOfResources: shared memory"}
    assert found.times == {str(other): {"median": 5.0, "p20": 5.0, "p80": 5.0} for other in others}


def test_the_times_of_all_candidates_are_kept(timer):
    tuning.config_for("step", PROBLEM, CUDA)
    (found,) = tables.read(tables.user_path(GPU), GPU).entries.values()
    expected = {str(config): 10.0 - i for i, config in enumerate(tried())}
    assert {config: each["median"] for config, each in found.times.items()} == expected
    assert found.times[str(found.config)] == {"median": found.us, "p20": found.p20, "p80": found.p80}
    assert tuning.tune("cudnn", PROBLEM, CUDA).times == {}, "it has no candidates"


def test_where_no_candidate_runs_the_model_s_first_choice_is_left(monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda k, p, tried, d: ["PTXASError: no"] * len(tried))
    with pytest.warns(UserWarning, match="PTXASError: no"):
        assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    assert not tables.user_path(GPU).exists()


# Timing, on the interpreter and by a clock of our own

SMALL = configs.Problem(8, 16, 1, torch.float32)
OUTPUT = torch.zeros(3, 2, 7)
TWO = [configs.StepConfig(16, 16, 16), configs.StepConfig(16, 16, 16, num_warps=8)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "STEPS", 20)
    monkeypatch.setattr(timing, "STEPS_LAUNCHED", 20)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_configs_are_timed_in_turns(backward):
    seen = []

    def clock(launch):
        (config,) = launch.args
        steps = (4, 20)[seen.count(config) % 2]
        seen.append(config)
        return 1000.0 + steps * (2.5 if config == TWO[0] else 5.0)

    state = torch.get_rng_state()
    results = timing.measure("step", replace(SMALL, backward=backward), TWO, CPU, clock)
    rounds = timing.ROUNDS_LAUNCHED
    assert results == [[2.5] * rounds, [5.0] * rounds], "a launch's fixed time is in none"
    assert seen == [TWO[0], TWO[0], TWO[1], TWO[1]] * (timing.WARM_UPS + rounds)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay"


def test_a_config_that_raises_or_computes_nonsense_fails_alone(monkeypatch):
    real, third = step.scan, configs.StepConfig(16, 16, 16, num_warps=2)

    def scan(z, h0, w_hh, lengths, nonlinearity, precision, config):
        if config == TWO[0]:
            raise RuntimeError("out of resources")
        result = real(z, h0, w_hh, lengths, nonlinearity, precision, config)
        return result * float("nan") if config == TWO[1] else result

    monkeypatch.setattr(step, "scan", scan)
    results = timing.measure("step", SMALL, [*TWO, third], CPU, rising())
    assert results[0] == "RuntimeError: out of resources"
    assert results[1] == "ArithmeticError: its result is not finite"
    assert len(results[2]) == timing.ROUNDS_LAUNCHED


@pytest.mark.parametrize("hanging", [1, 2, 4, 4 + 2 * timing.WARM_UPS])
def test_a_config_that_hangs_fails_alone(hanging, monkeypatch):
    """On a GPU a launch that hung is known once it has been waited for, and raises at the next one."""
    first, second = (configs.CooperativeConfig(8, n, 64, 1) for n in (16, 32))
    word, launched = torch.zeros(2, dtype=torch.int64), []
    monkeypatch.setitem(cooperative._words, CPU.index, word)
    monkeypatch.setitem(cooperative._launched, CPU.index, (2, 8, SMALL, first))

    def launch(config):
        cooperative.check(CPU)
        launched.append(config)
        hangs = config == first and launched.count(first) == hanging
        word[0] = int(hangs)
        return torch.full((1,), float("nan") if hangs else 1.0)

    monkeypatch.setattr(timing, "launch_of", lambda *_: launch)
    ticks = itertools.count(1.0)
    clock = lambda launch: (launch(), next(ticks))[1]  # noqa: E731
    hung, samples = timing.measure("cooperative", SMALL, [first, second], CPU, clock)
    assert hung.startswith("DeviceHangError: ")
    assert len(samples) == timing.ROUNDS


@pytest.mark.parametrize(("kernel", "steps", "rounds"), [("step", (8, 40), 8), ("resident", (64, 320), 25)])
def test_a_kernel_of_a_launch_a_step_is_timed_for_fewer(kernel, steps, rounds, monkeypatch):
    monkeypatch.undo()
    seen = []

    def work(kernel, problem, steps, device):
        seen.append(steps)
        return lambda config: torch.zeros(1)

    monkeypatch.setattr(timing, "launch_of", work)
    (samples,) = timing.measure(kernel, SMALL, TWO[:1], CPU, rising())
    assert (tuple(seen), len(samples)) == (steps, rounds)


def rising():
    """A clock that reads more each time."""
    readings = itertools.count(1.0)
    return lambda launch: next(readings)


def test_times_that_are_noise_are_none():
    still = timing.measure("step", SMALL, TWO[:1], CPU, lambda launch: 1.0)
    assert still == [
        "its longer run often took no longer than its shorter one: the GPU is busy with other work"
    ]


def test_cudnn_s_weights_lie_together_before_the_clock_starts(monkeypatch):
    gathered = []

    def flatten(weights, *arguments):
        gathered.append(len(weights))
        buffer, start = torch.cat([w.flatten() for w in weights]), 0
        for w in weights:
            w.set_(buffer[start : start + w.numel()].view_as(w))
            start += w.numel()

    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda w: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: 1)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    clock = rising()
    for backward in (False, True):
        gathered.clear()
        timed = lambda launch: (launch(), clock(launch))[1]  # noqa: E731
        timing.measure("cudnn", replace(SMALL, backward=backward), [None], CPU, timed)
        assert gathered == [2, 2], "once for each length"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("directions", [1, 2])
def test_cudnn_is_timed_by_nn_rnn_s_operator(backward, directions):
    problem = replace(SMALL, backward=backward, D=directions)
    shapes = []

    def clock(launch):
        shapes.append(launch().shape)
        return float(len(shapes))

    with torch.no_grad():
        ((*samples,),) = timing.measure("cudnn", problem, [None], CPU, clock)
    assert len(samples) == timing.ROUNDS
    last = timing.CUDNN_INPUT if backward else directions * 16
    assert set(shapes) == {(4, 8, last), (20, 8, last)}


@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("dtype", "precision", "during"),
    [
        (torch.float32, "ieee", "ieee"),
        (torch.float32, "tf32x3", "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.bfloat16, "ieee", None),
    ],
    ids=str,
)
def test_cudnn_is_timed_in_the_arithmetic_of_its_class(dtype, precision, during, before, monkeypatch):
    switch = torch.backends.cudnn.rnn
    monkeypatch.setattr(switch, "fp32_precision", before)
    seen = set()

    def clock(launch):
        seen.add(switch.fp32_precision)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure("cudnn", replace(SMALL, dtype=dtype, precision=precision), [None], CPU, clock)
    assert seen == {during or before}
    assert switch.fp32_precision == before, "whatever happens"


# Choosing a kernel


def test_the_kernel_follows_the_table_where_it_has_all(timer):
    problem = replace(PROBLEM, H=128)
    us, tuned = choice.times(problem, CUDA)
    assert not tuned
    able = sorted(us, key=us.get)
    assert len(able) > 1
    assert choice.quickest(problem, CUDA, 1024) == able[0]
    entries = {k: entry(tried(k, problem)[0], k, us=9.0 - n, H=128) for n, k in enumerate(able)}
    store(*list(entries.values())[1:])
    assert choice.quickest(problem, CUDA, 1024) == able[0], "measured and predicted times are not compared"
    store(*entries.values())
    assert choice.times(problem, CUDA) == ({k: e.us for k, e in entries.items()}, True)
    assert choice.quickest(problem, CUDA, 1024) == able[-1]
    assert choice.plan("triton", problem, CUDA, 1024) == (able[-1], problem)
    assert choice.config(able[-1], problem, CUDA) == entries[able[-1]].config
    assert choice.plan("step", problem, CUDA, 1024) == ("step", problem)
    assert timer.calls == []


def test_auto_s_numbers_come_from_the_table(monkeypatch):
    monkeypatch.setattr(choice, "cudnn_us", lambda problem: 1e6)
    problem = replace(PROBLEM, H=128)
    able = choice.times(problem, CUDA)[0]
    entries = [entry(tried(k, problem)[0], k, us=3.0, H=128) for k in able]
    call = {"batch": 16, "seq": 64, "input": 128, "hidden": 128, "dtype": torch.bfloat16, "device": "cuda"}
    with torch.no_grad():
        store(*entries)
        route = elman.explain(**call)
        assert route.backend == "triton"
        assert "(tuned table and published figures; the tuned table of Simulated GPU lacks" in route.reason
        assert dict(route.config) == vars(entries[list(able).index(route.kernel)].config)
        store(*entries, replace(entry(kernel="cudnn", us=2.0, H=128), config=None))
        route = elman.explain(**call)
        assert route.backend == "cudnn"
        assert route.reason.endswith("cudnn 2.00 us a step forward (tuned table)")
        assert routing.route(None, CUDA, torch.bfloat16, 128, 16, ragged=True).backend == "triton"


def test_a_choice_stays_while_the_process_lives(timer):
    problem = replace(PROBLEM, H=128)
    before = choice.times(problem, CUDA)
    for kernel in before[0]:
        tuning.config_for(kernel, problem, CUDA)
    assert choice.times(problem, CUDA) == before
    tuning.forget()
    assert choice.times(problem, CUDA)[1]


def test_each_pass_has_a_plan_of_its_own(monkeypatch):
    plans = []
    real = choice.plan

    def plan(kernel, problem, *sizes):
        plans.append((kernel, problem))
        return real("step", problem, *sizes)

    monkeypatch.setattr(choice, "plan", plan)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = elman.Elman(5, 7, backend="triton")
    layer(torch.ones(3, 2, 5))[0].sum().backward()
    forward = configs.Problem(2, 7)
    assert plans == [("triton", forward), ("triton", replace(forward, backward=True))]
    plans.clear()
    elman.elman(
        torch.ones(3, 2, 5), None, layer._flat_weights, lengths=torch.tensor([3, 1]), backend="triton"
    )
    assert plans == [("triton", replace(forward, ragged=True))]


@pytest.mark.parametrize("inputs", [1, 768])
def test_a_fused_scan_takes_the_config_that_was_chosen_for_it(inputs, monkeypatch):
    problem, asked, launched = configs.Problem(2, 7, inputs=inputs % 768), [], []
    config = configs.choose("resident", problem)

    def config_for(kernel, problem, device):
        asked.append((kernel, problem))
        return config

    monkeypatch.setattr(tuning, "config_for", config_for)
    for name in ("scan", "scan_fused"):
        note = partial(lambda name, *arguments: launched.append((name, arguments[-2])) or OUTPUT, name)
        monkeypatch.setattr(resident, name, note)
    w_ih, w_hh = torch.ones(1, 7, inputs), torch.ones(1, 7, 7)
    with torch.no_grad():
        ops.layer(
            torch.ones(3, 2, inputs),
            torch.zeros(1, 2, 7),
            w_ih,
            w_hh,
            None,
            None,
            None,
            "tanh",
            "resident",
            "ieee",
        )
    assert asked == [("resident", problem)], "and nothing is tuned for another"
    assert launched == [("scan_fused" if problem.inputs else "scan", config)]


def test_a_kernel_that_is_left_out_is_neither_tuned_nor_compared(monkeypatch, timer):
    problem = replace(PROBLEM, H=128)
    store(*(entry(tried(k, problem)[0], k, us=3.0, H=128) for k in ("resident", "step")))
    assert not choice.times(problem, CUDA)[1], "the table lacks cooperative"
    monkeypatch.setenv("ELMAN_KERNELS", "resident,step")
    tuning.forget()
    us, tuned = choice.times(problem, CUDA)
    assert tuned, "what is never launched need not be in the table"
    assert set(us) == {"resident", "step"}
    assert {kernel for kernel, _ in cli.jobs([(16, 128)], [torch.bfloat16], [1], CUDA)} == {*us, "cudnn"}
    with pytest.raises(elman.BackendUnavailableError, match="ELMAN_KERNELS is 'resident,step'"):
        tuning.tune_key("cooperative", problem, CUDA)
    assert timer.calls == []


def test_a_short_sequence_pays_for_no_cooperative_launch():
    assert choice.times(PROBLEM, CUDA)[0]["cooperative"] < choice.times(PROBLEM, CUDA)[0]["step"]
    assert choice.plan("triton", PROBLEM, CUDA, 4)[0] == "step"
    assert choice.plan("triton", PROBLEM, CUDA, 1024)[0] == "cooperative"


def test_the_error_of_a_hang_is_found_on_first_use():
    assert issubclass(elman.DeviceHangError, RuntimeError)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        elman.Nothing  # noqa: B018


# Several processes

PREAMBLE = """
import os, signal, sys, time
import pytest, torch
from tests.machines import simulate_gpu
simulate_gpu(pytest.MonkeyPatch())
from elman import cli, tuning
from elman.kernels import configs

log = sys.argv[1]

def note(kernel, problem):
    with open(log, "a") as file:
        file.write(f"{kernel} {problem.H} {problem.backward}\\n")
"""
TOGETHER = """
def timer(kernel, problem, tried, device):
    note(kernel, problem)
    time.sleep(0.4)
    return [[9.0 - i, 9.0 - i] for i in range(len(tried))]

tuning.measure = timer
print("ready", flush=True)
sys.stdin.readline()
for H in (1024, int(sys.argv[2])):
    print(tuning.config_for("step", configs.Problem(16, H, 1, torch.bfloat16), torch.device("cuda", 0)))
"""
KILLED = """
def timer(kernel, problem, tried, device):
    if os.path.exists(log) and len(open(log).readlines()) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    note(kernel, problem)
    return [[1.0, 1.0] for _ in tried]

tuning.measure = timer
cli.main(sys.argv[2:])
"""


def python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_tune_a_key_once_and_lose_none(tmp_path):
    log = tmp_path / "log"
    processes = [python(TOGETHER, log, H) for H in (64, 256)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [error for _, error in ended] == ["", ""], ended[0][1] + ended[1][1]
    assert sorted(log.read_text().splitlines()) == ["step 1024 False", "step 256 False", "step 64 False"]
    first, second = (out.splitlines()[0] for out, _ in ended)
    assert first == second == str(tried()[-1])
    assert {key.H for key in tables.read(tables.user_path(GPU), GPU).entries} == {64, 256, 1024}


# The command

TUNE = ["tune", "--shapes", "16,1024;1,64", "--dtype", "bfloat16"]


def jobs():
    """(kernel, H, backward) of TUNE's keys."""
    found = list(cli.jobs([(16, 1024), (1, 64)], [torch.bfloat16], [1], CUDA))
    return [(kernel, problem.H, problem.backward) for kernel, problem in found]


def test_tune_times_every_kernel_and_cudnn_and_goes_on_where_it_stopped(timer, capsys, tmp_path):
    output = tmp_path / "out" / "gpu.json"
    assert cli.main([*TUNE, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    n = len(jobs())
    assert lines[0] == f"{output}: 0 entries are there, {n} to do"
    key = r"\w+ (forward|backward) bfloat16 B=(16 H=1024|8 H=64)"
    pattern = rf"\[#* *\] \d+/\d+  {key}  \d+\.\d\d us  eta \d+ min"
    assert all(re.fullmatch(pattern, line) for line in lines[1:-1]), lines
    assert f"] 1/{n}  " in lines[1]
    assert lines[-2].startswith(f"[{20 * '#'}] {n}/{n}  ")
    assert lines[-1] == f"{n} keys tuned, 0 failed, 0 left"
    found = tables.read(output, GPU).entries
    assert {(k.kernel, k.H, k.backward) for k in found} == set(jobs())
    assert {"step", "resident", "cudnn"} <= {k.kernel for k in found}
    assert len(timer.calls) == n
    assert not tables.user_path(GPU).exists()
    assert cli.main([*TUNE, "--output", str(output)]) == 0
    assert len(timer.calls) == n
    assert f"{n} entries are there, 0 to do" in capsys.readouterr().err


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_tuned_in_both_classes_whatever_the_switch_says(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    found = list(cli.jobs([(16, 128)], [torch.float32], [1], CUDA))
    for kernel in ("resident", "cudnn", "step"):
        problems = [p for name, p in found if name == kernel]
        assert [(p.precision, p.backward) for p in problems] == [
            ("ieee", False),
            ("ieee", True),
            ("tf32", False),
            ("tf32", True),
        ]
    simulate_gpu(monkeypatch, hip="6.4")
    assert {p.precision for _, p in cli.jobs([(16, 128)], [torch.float32], [1], CUDA)} == {"ieee"}


def test_the_most_wanted_keys_come_first():
    dtypes = [torch.float32, torch.bfloat16]
    found = list(cli.jobs([(1, 64), (16, 64), (16, 128)], dtypes, [1], CUDA))
    kernels = [kernel for kernel, _ in found]
    assert "step" not in kernels[: kernels.index("step")]
    assert set(kernels[kernels.index("step") :]) == {"step"}, "it is last"
    for some in ({"resident", "cudnn"}, {"step"}):
        order = list(dict.fromkeys((p.B, p.dtype, p.precision, p.H) for k, p in found if k in some))
        assert order == [
            (B, dtype, precision, H)
            for B, sizes in ((16, (64, 128)), (1, (64,)))
            for dtype, precision in (
                (torch.bfloat16, "ieee"),
                (torch.float32, "ieee"),
                (torch.float32, "tf32"),
            )
            for H in sizes
        ]


def test_the_help_names_what_is_tuned(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    said = capsys.readouterr().out
    assert (
        f"each B of 16, 1, 64 with each H of {', '.join(map(str, cli.TUNED_H))}, forward and backward" in said
    )
    assert "B is rounded up to a power of two, at least 8" in said
    assert "float32 is tuned in IEEE's arithmetic and in TF32" in said


def test_both_directions_are_tuned_where_they_are_asked_for(timer, capsys):
    command = ["tune", "--shapes", "1,64", "--dtype", "bfloat16"]
    for more, expected in (([], {1}), (["--directions", "1", "2"], {1, 2})):
        assert cli.main([*command, *more]) == 0
        assert {key.D for key in tables.read(tables.user_path(GPU), GPU).entries} == expected
    with pytest.raises(SystemExit):
        cli.main([*command, "--directions", "3"])
    assert "directions" in capsys.readouterr().err


def test_an_interrupted_tune_keeps_what_is_done(monkeypatch, timer, capsys):
    def interrupted(*arguments):
        if len(timer.calls) == 3:
            raise KeyboardInterrupt
        return timer(*arguments)

    monkeypatch.setattr(tuning, "measure", interrupted)
    cli.main(TUNE)
    assert f"interrupted: 3 keys tuned, 0 failed, {len(jobs()) - 3} left; the same" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "measure", timer)
    assert cli.main(TUNE) == 0
    assert sorted((k, p.H, p.backward) for k, p in timer.calls) == sorted(jobs()), "each once"


def test_a_killed_tune_goes_on(timer, tmp_path):
    log = tmp_path / "log"
    killed = python(KILLED, log, *TUNE)
    assert killed.communicate(timeout=60)[0] == ""
    assert killed.returncode == -signal.SIGKILL
    assert len(tables.read(tables.user_path(GPU), GPU).entries) == 2
    assert cli.main(TUNE) == 0, "the dead process holds no lock"
    assert len(timer.calls) == len(jobs()) - 2
    assert len(tables.read(tables.user_path(GPU), GPU).entries) == len(jobs())


def test_the_budget_stops_it(monkeypatch, timer, capsys):
    now = [0.0]

    def slow(*arguments):
        now[0] += 40
        return timer(*arguments)

    monkeypatch.setattr(tuning, "measure", slow)
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert cli.main([*TUNE, "--budget", "1.5"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    left = len(jobs()) - 3
    assert last.startswith(
        f"the budget of 1.5 minutes is spent: 3 keys tuned, 0 failed, {left} left; the same"
    )
    assert len(timer.calls) == 3
    assert cli.main(TUNE) == 0
    assert len(timer.calls) == len(jobs())


def test_a_key_that_cannot_be_tuned_stops_no_other(monkeypatch, timer, capsys):
    def fails(kernel, problem, tried, device):
        if (kernel, problem.H, problem.backward) == ("step", 1024, False):
            return ["PTXASError: no"] * len(tried)
        return timer(kernel, problem, tried, device)

    monkeypatch.setattr(tuning, "measure", fails)
    assert cli.main(TUNE) == 1
    printed = capsys.readouterr().err
    assert "failed: no candidate of step forward bfloat16 B=16 H=1024 runs: PTXASError: no" in printed
    assert f"{len(jobs()) - 1} keys tuned, 1 failed, 0 left" in printed
    assert len(tables.read(tables.user_path(GPU), GPU).entries) == len(jobs()) - 1


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys, timer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(TUNE) == 1
    printed = capsys.readouterr().out
    assert "nothing to tune" in printed
    assert "explain" in printed
    simulate_gpu(monkeypatch, capability=(7, 5))
    assert cli.main(TUNE) == 1
    assert "7.5" in capsys.readouterr().out
    assert timer.calls == []


@pytest.mark.parametrize("shapes", ["", "16", "16,1024;x", "0,64", "1,2,3"])
def test_shapes_that_are_none(shapes, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune", "--shapes", shapes])
    assert raised.value.code == 2
    assert "expected B,H pairs" in capsys.readouterr().err


def test_a_broken_table_is_a_sentence_of_the_command(capsys, timer):
    store()
    tables.user_path(GPU).write_text("{")
    assert cli.main(TUNE) == 1
    assert "Delete it" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    assert "Delete it" in capsys.readouterr().out


def test_the_standard_sweep():
    assert set(cli.TUNED_B) == {1, 16, 64}
    wanted = {64, 128, 224, 256, 264, 320, 336, 384, 512, 768, 1024, 1760, 2048, 2560}
    assert set(cli.TUNED_H) == wanted
    assert len(cli.TUNED_H) == len(wanted)


def test_doctor_counts_entries(capsys, monkeypatch):
    store(entry(), entry(H=64))
    monkeypatch.setenv("ELMAN_AUTOTUNE", "off")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"tuned table, yours: {tables.user_path(GPU)}: 2 entries" in printed
    assert "tuned table, shipped:" in printed
    assert "there is none" in printed
    assert "ELMAN_AUTOTUNE is off" in printed
    with contextlib.suppress(FileNotFoundError):
        (tables.user_path(GPU)).unlink()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["doctor"]) == 0
    assert str(tables.user_path(GPU).parent) in capsys.readouterr().out
