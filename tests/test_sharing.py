"""A config that one rank of a job decides on for all: processes with a simulated GPU and a timer of ours."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from dataclasses import asdict, replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode

import elman
from elman import sharing, tables, tuning
from elman.kernels import configs
from tests.machines import simulate_gpu

# Forked from a server that has imported torch and started nothing: two seconds less for each process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "triton"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROBLEM = configs.Problem(16, 1024, 1, torch.bfloat16)


def tried():
    with pytest.MonkeyPatch.context() as patch:
        simulate_gpu(patch, "GPU")
        return [config for config, _ in configs.candidates("step", PROBLEM, tuning.chip(CUDA))]


def rank_process(pipe, rank, ranks, port, folder, gpu="GPU", wait=60.0, what="times"):
    """A rank of a job, with tables of its own: gets (B, H, backward) and sends what its timer times, the
    config that it took, and every warning.

    what: "times", or what the timer does instead.
    """
    os.environ |= {"ELMAN_AUTOTUNE": "on", "ELMAN_CACHE_DIR": str(folder / str(rank))}
    simulate_gpu(pytest.MonkeyPatch(), gpu)
    tuning.WAIT_FOR_RANK = wait
    warnings.showwarning = lambda message, *_: pipe.send(str(message))

    def timer(kernel, problem, tried, device):
        pipe.send(f"timed {kernel} {problem.H} {problem.backward}")
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "is interrupted":
            raise KeyboardInterrupt
        if what == "fails":
            return ["PTXASError: no"] * len(tried)
        time.sleep(0.3)
        quickest = rank % len(tried)  # so that ranks which decide apart differ
        return [[1.0 if i == quickest else 9.0] * 2 for i in range(len(tried))]

    tuning.measure = timer
    store = distributed.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    while True:
        B, H, backward = pipe.recv()
        problem = configs.Problem(B, H, 1, torch.bfloat16, backward=backward)
        try:
            pipe.send(str(tuning.config_for("step", problem, CUDA)))
        except KeyboardInterrupt:
            pipe.send("interrupted")


class Rank:
    """A running rank_process."""

    def __init__(self, *arguments, **options):
        self.pipe, there = PROCESSES.Pipe()
        self.process = PROCESSES.Process(
            target=rank_process, args=(there, *arguments), kwargs=options, daemon=True
        )
        self.process.start()
        there.close()

    def ask(self, B=16, H=1024, backward=False):
        self.pipe.send((B, H, backward))

    def read(self):
        assert self.pipe.poll(60.0), "it hangs"
        return self.pipe.recv()


@pytest.fixture
def job(tmp_path):
    """Starts a job, by the options of each rank; its processes end with the test."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []

    def start(*options):
        for rank, given in enumerate(options):
            started.append(Rank(rank, len(options), server.port, tmp_path, **given))
        return started

    yield start
    for rank in started:
        rank.process.kill()
        rank.process.join()
        with pytest.raises(EOFError):
            raise AssertionError(f"nobody has read: {rank.pipe.recv()}")


TIMED, TIMED_BACKWARD = "timed step 1024 False", "timed step 1024 True"
ALONE = "this rank decides on step forward bfloat16 B=16 H=1024 on GPU alone, and its choice may differ from "


def test_one_rank_times_and_the_others_take_its_config(job):
    first, second, unlike = job({}, {}, {"gpu": "Another GPU"})
    second.ask()
    assert second.read() == TIMED
    for rank in (first, unlike):
        rank.ask()
    config = str(tried()[1])
    assert [second.read(), first.read()] == [config, config], "though their tables are apart"
    assert [unlike.read(), unlike.read()] == [TIMED, str(tried()[2])]
    # A key that others come to later, or never; a batch of the same bucket.
    first.ask(backward=True)
    assert first.read() == TIMED_BACKWARD
    backward = first.read()
    second.ask(backward=True)
    assert second.read() == backward
    for rank, expected in ((first, config), (unlike, str(tried()[2]))):
        rank.ask(B=13)
        assert rank.read() == expected


def test_a_rank_that_dies_is_waited_for_and_no_longer(job):
    first, second = job({"what": "dies"}, {"wait": 1.0})
    first.ask()
    assert first.read() == TIMED
    start = time.monotonic()
    second.ask()
    assert second.read() == f"{ALONE}other ranks': the rank that was to decide has not in 1 seconds"
    assert time.monotonic() - start >= 1.0
    assert [second.read(), second.read()] == [TIMED, str(tried()[1])]


def test_where_no_candidate_runs_all_take_the_model_s_first_choice(job):
    first, second = job({"what": "fails"}, {})
    first.ask()
    assert first.read() == TIMED
    assert "PTXASError: no" in first.read()
    assert first.read() == str(tried()[0])
    second.ask()
    assert second.read() == str(tried()[0])


def test_a_rank_that_is_interrupted_leaves_nobody_waiting(job):
    first, second = job({"what": "is interrupted"}, {})
    first.ask()
    assert [first.read(), first.read()] == [TIMED, "interrupted"]
    second.ask()
    assert second.read() == f"{ALONE}other ranks': the rank that was to decide failed: KeyboardInterrupt: "
    assert [second.read(), second.read()] == [TIMED, str(tried()[1])]


# One process


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU without any table."""
    simulate_gpu(monkeypatch, "GPU")
    monkeypatch.setenv("ELMAN_AUTOTUNE", "on")
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


def in_a_job(monkeypatch, store, ranks=2):
    """This process as a rank of a job that has this store."""
    world = SimpleNamespace(get_group_store=lambda: store)
    answers = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: ranks,
        group=SimpleNamespace(WORLD=world),
    )
    monkeypatch.setattr(sharing, "distributed", answers)


class NoStore:
    """Fails whoever asks it anything."""

    def __getattr__(self, name):
        raise AssertionError(f"the store was asked to {name}")


def never(*arguments):
    raise AssertionError("it was called")


def test_where_nothing_is_shared(gpu, monkeypatch):
    in_a_job(monkeypatch, NoStore())
    with pytest.raises(AssertionError, match="asked to add"):
        tuning.config_for("step", PROBLEM, CUDA)
    assert tuning.config_for("step", PROBLEM, CPU) == configs.choose("step", PROBLEM)
    cell = replace(PROBLEM, inputs=32)
    assert tuning.config_for("step", cell, CUDA) == configs.choose("step", cell, tuning.chip(CUDA))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    tuning.forget()
    with monkeypatch.context() as patch:
        patch.setenv("ELMAN_AUTOTUNE", "off")
        assert tuning.config_for("step", PROBLEM, CUDA) == tried()[0]
    tuning.forget()
    monkeypatch.setattr(tuning, "measure", lambda k, p, tried, d: [[9.0 - i] * 2 for i in range(len(tried))])
    in_a_job(monkeypatch, NoStore(), ranks=1)
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[-1]


def test_tracing_asks_for_no_config(monkeypatch):
    """So a graph that is traced on one rank waits for no other; the config is found when it runs."""
    monkeypatch.setattr(tuning, "config_for", never)
    with FakeTensorMode():
        layer = elman.Elman(3, 4, backend="triton:step")
        output, _ = layer(torch.ones(5, 2, 3))
        output.sum().backward()
    assert layer.weight_hh_l0.grad.shape == (4, 4)


@pytest.mark.parametrize(
    "answer",
    [{"BLOCK_Q": 16}, {**asdict(tried()[1]), "num_stages": 1000}],
    ids=["of another version", "too large"],
)
def test_an_answer_that_cannot_be_used_here_is_not(answer, gpu, monkeypatch):
    store = distributed.HashStore()
    in_a_job(monkeypatch, store)
    assert sharing.first_decides(f"{tables.key_of('step', PROBLEM)} on GPU", lambda: answer, 1.0) == answer
    monkeypatch.setattr(tuning, "measure", lambda k, p, tried, d: [[9.0 - i] * 2 for i in range(len(tried))])
    assert tuning.config_for("step", PROBLEM, CUDA) == tried()[-1]


def test_a_store_that_has_gone_is_a_warning(monkeypatch):
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    in_a_job(monkeypatch, distributed.TCPStore("127.0.0.1", server.port))
    assert sharing.first_decides("a", lambda: 1, 1.0) == 1
    del server
    with pytest.warns(UserWarning, match="decides on a alone.*store can't be asked"):
        assert sharing.first_decides("a", lambda: 2, 1.0) == 2


def test_a_decision_that_nobody_can_be_told_of_stands(monkeypatch):
    def gone(*arguments):
        raise distributed.DistNetworkError("broken pipe")

    in_a_job(monkeypatch, SimpleNamespace(add=lambda name, n: n, set=gone))
    assert sharing.first_decides("a", lambda: 1, 1.0) == 1


def test_who_waits_leaves_the_store_to_other_threads(monkeypatch):
    five = timedelta(seconds=5)
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=five)
    in_a_job(monkeypatch, server)
    found, waits = [], threading.Event()

    def decide():
        other = threading.Thread(target=lambda: found.append(sharing.first_decides("a", lambda: 2, 30.0)))
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda seconds: waits.set())
            other.start()
            assert waits.wait(30.0)
        found.append(other)
        return 1

    assert sharing.first_decides("a", decide, 1.0) == 1
    found[0].join(timeout=5.0)
    assert found[1:] == [1]


def test_an_error_is_raised_and_told(monkeypatch):
    in_a_job(monkeypatch, distributed.HashStore())

    def fails():
        raise ValueError("no config fits")

    with pytest.raises(ValueError, match="no config fits"):
        sharing.first_decides("a", fails, 1.0)
    with pytest.warns(UserWarning, match="failed: ValueError: no config fits"):
        assert sharing.first_decides("a", lambda: 2, 1.0) == 2


def test_a_decision_is_made_while_the_others_wait_patiently(monkeypatch):
    """The pauses grow, so that hundreds of ranks do not keep the store busy."""
    store, pauses = distributed.HashStore(), []
    in_a_job(monkeypatch, store)
    store.add("elman/a/asked", 1)

    def sleep(seconds):
        pauses.append(seconds)
        if sum(pauses) > 3:
            store.set("elman/a", json.dumps({"decided": {"x": 1}}))

    monkeypatch.setattr(sharing, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=sleep))
    assert sharing.first_decides("a", never, 10.0) == {"x": 1}
    assert pauses == sorted(pauses)
    assert len(pauses) < 20
    assert max(pauses) == sharing.LONGEST_PAUSE
