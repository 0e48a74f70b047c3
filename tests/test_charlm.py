"""The character language model: its text, its training beside nn.RNN's, stops, samples, comparisons."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import charlm, charlm_compare, charlm_page, language, machine, report
from bench import corpus as corpora
from bench import training as runs
from bench.corpus import Corpus, Windows
from bench.language import Settings, Training
from bench.training import Limits, Progress, Run, baselines_of
from elman import reference
from tests.helpers import DEVICE, error
from tests.helpers import RHYME as TEXT
from tests.tolerances import LOSS_CURVE, tolerance

ROOT = Path(__file__).parents[1]
#: Small enough for Triton's interpreter.
TINY = Settings(
    hidden=8,
    nonlinearity="tanh",
    embedding=4,
    recurrent="orthogonal",
    batch=2,
    window=5,
    warmup=2,
    rate=0.02,
    decay=2000,
    dropout=0.2,
    blanks=0.1,
    clip=0.5,
)
OPTIONS = [f"--{name}={value}" for name, value in vars(TINY).items() if value is not None]


@pytest.fixture
def corpus() -> Corpus:
    return Corpus.of("rhyme", TEXT)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "rhyme.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def training(corpus, backend="eager", **options) -> Training:
    return Training(corpus, dataclasses.replace(TINY, **options), backend, torch.device(DEVICE))


# --- Text ----------------------------------------------------------------------------------------------


def test_a_text_is_cut_in_two(corpus):
    assert corpus.alphabet == "".join(sorted(set(TEXT)))
    ids = [*corpus.training.tolist(), *corpus.held_out.tolist()]
    assert "".join(corpus.alphabet[i] for i in ids) == TEXT
    assert len(corpus.held_out) == round(len(TEXT) / 10)


def test_the_text_that_every_python_has():
    corpus = corpora.read(None)
    assert corpus.size > 300_000
    assert 50 < len(corpus.alphabet) < 300
    assert corpora.read(None).digest == corpus.digest


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 characters"),
        (b"a" * 1000, "1 of them distinct"),
        (b"abcd", "has 4 characters"),
        (b"caf\xe9 " * 100, "is not UTF-8"),
    ],
)
def test_what_is_no_text(content, said, tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        corpora.read(path)


def test_windows_go_on_where_the_last_ended():
    ids, generator = torch.arange(103), torch.Generator().manual_seed(0)
    windows = Windows(ids, T=4, B=3)  # columns of 34: 8 windows, with a step to spare
    found = [windows.next(generator) for _ in range(20)]
    assert [begins for _, begins in found] == [k % 8 == 0 for k in range(20)]
    assert torch.equal(torch.cat([w[:-1] for w, _ in found[:8]])[:, 0], torch.arange(32))
    for start in (0, 8, 16):
        for (one, _), (other, _) in itertools.pairwise(found[start : start + 8]):
            assert torch.equal(one[-1], other[0])
        for window, _ in found[start : start + 8]:
            assert torch.equal((window + 1) % 103, torch.cat([window[1:], (window[-1:] + 1) % 103]))
    assert not torch.equal(found[0][0], found[8][0])  # cut at another place


def test_a_long_text_holds_out_no_more_than_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MOST_HELD_OUT", 50)
    monkeypatch.setattr(runs, "COUNTED", 500)
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("ran; ", "ran;\r\n").encode())
    corpus = corpora.read(path)
    assert len(corpus.held_out) == 50
    assert not {"\ufeff", "\r"} & set(corpus.alphabet)
    assert baselines_of(corpus) == {}
    assert run_main(path, tmp_path / "run", "--steps", 10) == 0


def test_a_text_too_short_for_its_columns():
    with pytest.raises(ValueError, match=r"has 19 characters; expected 20 at least, for 4 columns of 4"):
        Windows(torch.arange(19), T=4, B=4)
    Windows(torch.arange(20), T=4, B=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 0}, "hidden is 0; expected 1 or more"),
        ({"embedding": -1}, "embedding is -1; expected 0 or more"),
        ({"rate": 0.0}, "rate is 0.0; expected a number above 0"),
        ({"clip": math.nan}, "clip is nan; expected a number above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 or more and less than 1"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, tf32, bfloat16"),
    ],
)
def test_settings_that_can_not_be(options, said):
    with pytest.raises(ValueError, match=said):
        Settings(**options)


def test_the_rate_rises_and_falls():
    s = Settings(rate=1.0, warmup=3, decay=100)
    assert [s.rate_at(step) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75], rel=0.02)
    assert s.rate_at(300) == pytest.approx(0.5)


# --- Training ------------------------------------------------------------------------------------------


def by_hand(corpus: Corpus, s: Settings, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the last weights of the same training, written out on the reference."""
    start = Training(corpus, s, "nn.RNN", torch.device("cpu")).model.state_dict()
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    rnn = [value for name, value in weights.items() if name.startswith("rnn.")]
    optimizer = torch.optim.Adam(list(weights.values()), lr=s.rate)
    generator = torch.Generator().manual_seed(s.seed)
    B, T, V = s.batch, s.window, len(corpus.alphabet)
    length = len(corpus.training) // B
    columns = corpus.training[: length * B].view(B, length).t()
    h, losses = torch.zeros(s.layers, B, s.hidden), []
    for k in range(steps):
        window = columns[k * T : k * T + T + 1]
        assert len(window) == T + 1, "the text is too short for this test"
        blank = torch.rand(1, B, s.embedding or V, generator=generator) < s.blanks
        kept = torch.rand(1, B, s.hidden, generator=generator) >= s.dropout
        x = F.one_hot(window[:-1], V).float()
        if s.embedding:
            x = x @ weights["embedding.weight"]
        x = x.masked_fill(blank, 0) / (1 - s.blanks)
        out, h = reference.elman(x, h.detach(), rnn, num_layers=s.layers, nonlinearity=s.nonlinearity)
        scores = (out * kept / (1 - s.dropout)) @ weights["head.weight"].t() + weights["head.bias"]
        loss = -scores.log_softmax(-1).gather(-1, window[1:, :, None]).mean()
        for group in optimizer.param_groups:
            group["lr"] = s.rate * min(1, (k + 1) / (s.warmup + 1)) / math.sqrt(1 + k / s.decay)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient * min(1.0, s.clip / norm.item())
        optimizer.step()
        losses.append(loss.item())
    return losses, weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"embedding": 0, "nonlinearity": "relu", "recurrent": "identity", "dropout": 0.0, "blanks": 0.3},
        {"layers": 2, "recurrent": "normal", "sigma": 0.3, "radius": 1.2, "clip": 0.1},
    ],
    ids=["tanh", "one-hot relu", "two layers"],
)
def test_every_backend_trains_as_the_reference(any_backend, options, corpus):
    backend = "nn.RNN" if any_backend == "cudnn wrapper" else any_backend
    s = dataclasses.replace(TINY, **options)
    steps = 3 if backend.startswith("triton") and DEVICE == "cpu" else 12
    run = training(corpus, backend, **options)
    losses = [run.step().item() for _ in range(steps)]
    expected, weights = by_hand(corpus, s, steps)
    assert losses == pytest.approx(expected, abs=LOSS_CURVE)
    for name, value in run.model.state_dict().items():
        assert error(value.cpu(), weights[name].detach()) < 1e-4, name


def test_the_output_begins_as_the_unigram(corpus):
    run = training(corpus)
    counts = torch.bincount(corpus.training) + 1
    for model in (run.model, run.average):
        assert error(model.head.bias.detach().cpu().exp(), counts / counts.sum()) <= tolerance(torch.float32)


def test_it_learns(corpus):
    """A rhyme of two lines: nearly all that comes next can be known."""
    run = training(corpus, hidden=32, dropout=0.1)
    counts = torch.bincount(corpus.training) / len(corpus.training)
    unigram = -(counts * counts.clamp(min=1e-9).log2()).sum().item()
    assert run.evaluate() > 0.9 * unigram  # which is all that is known yet
    for _ in range(400):
        run.step()
    assert run.evaluate() < unigram / 4


def test_the_state_is_carried_over_and_dropped_at_the_columns_end(corpus):
    run = training(corpus)
    run.step()
    state = run.model.rnn.state.clone()
    assert state.abs().max() > 0
    assert not state.requires_grad
    seen = []
    run.model.rnn.register_forward_pre_hook(lambda module, args: seen.append(module.state))
    run.step()
    assert torch.equal(seen[0], state)
    whole = len(run.windows.columns) // TINY.window
    for _ in range(whole - 1):
        run.step()
    assert seen[whole - 1] is None  # the columns began anew


def test_bits_of_the_held_out_text(corpus):
    """Of one call on the whole text, by nn.RNN with the average of the weights."""
    run = training(corpus)
    for _ in range(5):
        run.step()
    found = run.evaluate()
    layer = nn.RNN(TINY.embedding, TINY.hidden).to(DEVICE)
    layer.load_state_dict(run.average.rnn.layer.state_dict())
    context = corpus.training[-TINY.window :]
    ids = torch.cat([context, corpus.held_out]).to(DEVICE)
    scores = run.average.head(layer(run.average.embedding(ids[:-1, None]))[0][:, 0])
    bits = -scores.log_softmax(-1).gather(-1, ids[1:, None])[len(context) - 1 :].mean() / math.log(2)
    assert found == pytest.approx(bits.item(), rel=1e-5)
    before = run.model.rnn.state.clone()
    steps = run.step().item()
    other = training(corpus)
    for _ in range(5):
        other.step()
    assert torch.equal(before, other.model.rnn.state)  # reading changes nothing of the training
    assert other.step().item() == steps


def test_the_average_follows_the_weights(corpus):
    run = training(corpus, average=0.5)
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    for step in range(1, 15):
        run.step()
        decay = min(0.5, step / (step + 10))
        for name, value in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in run.average.state_dict().items():
        assert error(value, expected[name]) < tolerance(torch.float32), name
    last = training(corpus, average=0.0)
    last.step()
    assert torch.equal(last.average.head.weight, last.model.head.weight)


def test_a_step_is_clipped(corpus):
    run = training(corpus, clip=1e-3)
    run.step()
    norm = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_learns_the_same(corpus):
    full, half = training(corpus), training(corpus, dtype="bfloat16")
    losses = [(full.step().item(), half.step().item()) for _ in range(20)]
    assert all(other == pytest.approx(one, rel=0.02) for one, other in losses)
    assert any(other != one for one, other in losses)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.evaluate() == pytest.approx(full.evaluate(), rel=0.02)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        pytest.param(
            "tf32", marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
        ),
    ],
)
def test_the_backward_pass_has_the_forward_passs_arithmetic(dtype, corpus):
    """PyTorch's switches for TF32 are on where it was asked for, and nowhere else."""
    run = training(corpus, dtype=dtype)
    seen = []

    def look(*_):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    def forward(module, args, output):
        look()
        output.register_hook(look)

    run.model.head.register_forward_hook(forward)
    run.step()
    run.warm()
    assert seen == [(dtype == "tf32",) * 2] * 4


def test_a_characters_worth_of_generation_is_one_step(any_backend, corpus):
    """The likeliest characters, one call each, are those of the whole text so far by nn.RNN."""
    backend = "nn.RNN" if any_backend == "cudnn wrapper" else any_backend
    length = 5 if backend.startswith("triton") and DEVICE == "cpu" else 40
    run = training(corpus, backend, layers=2, average=0.0)
    with torch.no_grad():
        run.average.head.weight.mul_(30)  # so that no two are as likely by a rounding
    prompt = corpus.held_out[:7]
    calls = []
    run.average.rnn.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    each: list[int] = []
    found = run.sample(prompt, length, each.append, temperature=0.0)
    assert found == each
    assert calls == [7] + [1] * (length - 1)
    layer = nn.RNN(TINY.embedding, TINY.hidden, 2).to(DEVICE)
    layer.load_state_dict(run.average.rnn.layer.state_dict())
    ids = prompt.tolist()
    for _ in range(length):
        x = run.average.embedding(torch.tensor(ids, device=DEVICE)[:, None])
        ids.append(int(run.average.head(layer(x)[0])[-1, 0].argmax()))
    assert found == ids[len(prompt) :]


def test_samples_are_drawn_as_the_model_believes(corpus):
    run = training(corpus)
    prompt = corpus.held_out[:1]
    drawn = [run.sample(prompt, 1, seed=seed)[0] for seed in range(2000)]
    run.average.rnn.reset()
    with torch.no_grad():
        p = run.average(prompt.to(DEVICE)[:, None])[-1, 0].softmax(0)
    run.average.rnn.reset()
    counts = torch.bincount(torch.tensor(drawn), minlength=len(p))
    # Three standard deviations, and one of 20 characters may be beyond.
    outside = (counts - 2000 * p.cpu()).abs() > 3 * (2000 * p.cpu() * (1 - p.cpu())).sqrt()
    assert outside.sum() <= 1
    likeliest = run.sample(prompt, 20, temperature=0.0)
    assert run.sample(prompt, 20, temperature=1e-300) == likeliest
    assert run.sample(prompt, 20, seed=3) == run.sample(prompt, 20, seed=3)
    assert run.sample(prompt, 20, seed=3) != run.sample(prompt, 20, seed=4)


# --- Runs ----------------------------------------------------------------------------------------------


def run_main(text: Path, folder: Path, *options: object) -> int:
    return charlm.main(
        ["--text", str(text), "--folder", str(folder), "--length", "30", *OPTIONS, *map(str, options)]
    )


def program(text: Path, folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    """The program by itself, its errors among its output."""
    command = [sys.executable, "-m", "bench.charlm", "--text", str(text), "--folder", str(folder), *OPTIONS]
    return subprocess.Popen(
        [*command, "--length=10", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_what_it_says(text, tmp_path, capsys):
    assert run_main(text, tmp_path / "run", "--steps", 25) == 0
    said = capsys.readouterr().out
    pictures = ["loss.png"] if report_pictures() else []
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["checkpoint.pt", "sample.txt", *pictures]
    )
    assert "Text: rhyme.txt, 608 characters, 19 of them distinct." in said
    assert "25 steps, 250 characters, 0.5 times the text" in said
    assert "bits a character" in said
    sample = (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")
    assert len(sample) == charlm.PROMPT + 30
    assert sample.startswith(TEXT[round(0.9 * len(TEXT)) :][: charlm.PROMPT])
    assert sample in said
    saved = checkpoint(tmp_path / "run")
    assert len(saved["losses"]) == 25
    assert [steps for _, steps, _ in saved["held_out"]][-1] == 25


def report_pictures() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def test_a_run_goes_on_as_if_it_had_never_stopped(text, tmp_path, capsys):
    """Bit by bit, past the columns' end, where they are cut anew."""
    run_main(text, tmp_path / "once", "--steps", 90)
    run_main(text, tmp_path / "twice", "--steps", 33)
    run_main(text, tmp_path / "twice", "--steps", 90, "--resume")
    assert "Going on from step 33." in capsys.readouterr().out
    once, twice = checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice")
    assert once["training"]["offset"] != 0, "the columns were not cut anew"
    assert len(once["losses"]) == 90
    assert once["losses"] == twice["losses"]
    for kind in ("model", "average"):
        for name, value in once["training"][kind].items():
            assert torch.equal(value, twice["training"][kind][name]), name
    assert (tmp_path / "once" / "sample.txt").read_text() == (tmp_path / "twice" / "sample.txt").read_text()


def test_a_run_may_go_on_with_another_backend(text, tmp_path):
    run_main(text, tmp_path / "one", "--steps", 20, "--backend", "nn.RNN")
    run_main(text, tmp_path / "one", "--steps", 40, "--backend", "eager", "--resume")
    run_main(text, tmp_path / "other", "--steps", 40, "--backend", "eager")
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other")
    assert (one["backend"], other["backend"]) == ("eager", "eager")
    assert one["losses"] == pytest.approx(other["losses"], abs=LOSS_CURVE)


def test_a_finished_run_only_writes_again(text, tmp_path, capsys):
    run_main(text, tmp_path, "--steps", 20)
    assert run_main(text, tmp_path, "--steps", 20, "--resume") == 0
    assert len(checkpoint(tmp_path)["losses"]) == 20


def test_ctrl_c_ends_a_run_where_its_time_would(text, tmp_path, monkeypatch, capsys):
    step = Training.step

    def interrupted(self):
        if self.steps == 14:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Training, "step", interrupted)
    assert run_main(text, tmp_path / "stopped", "--steps", 40) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr().out
    assert "Stopped at step 20. --resume goes on from there." in said
    assert (tmp_path / "stopped" / "sample.txt").exists()
    monkeypatch.setattr(Training, "step", step)
    assert run_main(text, tmp_path / "stopped", "--steps", 40, "--resume") == 0
    run_main(text, tmp_path / "whole", "--steps", 40)
    assert checkpoint(tmp_path / "stopped")["losses"] == checkpoint(tmp_path / "whole")["losses"]


def test_ctrl_c_ends_the_sample_with_what_there_is(text, tmp_path, monkeypatch, capsys):
    generate = language.generate

    def interrupted(*args, **options):
        for place, character in enumerate(generate(*args, **options)):
            if place == 5:
                signal.raise_signal(signal.SIGINT)
            yield character

    monkeypatch.setattr(language, "generate", interrupted)
    assert run_main(text, tmp_path, "--steps", 10) == 130
    assert len((tmp_path / "sample.txt").read_text(encoding="utf-8")) == charlm.PROMPT + 6
    assert "Stopped" not in capsys.readouterr().out


def test_a_name_that_looks_like_mathematics(text, tmp_path):
    assert run_main(text.rename(tmp_path / "co$ts_{$.txt"), tmp_path / "run", "--steps", 10) == 0


def test_a_second_ctrl_c_is_one(monkeypatch):
    with charlm.interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv("RANK", "0")
    with charlm.interrupts() as interrupted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's, of the same keys
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="signals to another process are of POSIX")
def test_ctrl_c_from_outside(text, tmp_path):
    with program(text, tmp_path / "run", "--minutes=3") as process:
        seen = list(itertools.takewhile(lambda line: not line.startswith("Held out: "), process.stdout))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, [*seen, said]
    assert "Stopped at step" in said
    assert len(checkpoint(tmp_path / "run")["losses"]) > 0


def test_a_loss_that_is_no_number_ends_the_run(text, tmp_path, monkeypatch, capsys):
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self: step(self) * (math.nan if self.steps == 37 else 1.0))
    assert run_main(text, tmp_path, "--steps", 60) == 1
    assert "the loss of step 36 is nan; expected a number: take a lower --rate" in capsys.readouterr().err
    assert len(checkpoint(tmp_path)["losses"]) <= 30


def test_a_weight_that_is_no_number_reaches_no_checkpoint(text, tmp_path, monkeypatch, capsys):
    step = Training.step

    def last(self):
        loss = step(self)
        if self.steps == 20:
            self.model.head.weight.detach()[0, 0] = math.inf
        return loss

    monkeypatch.setattr(Training, "step", last)
    assert run_main(text, tmp_path, "--steps", 20) == 1
    assert "after step 20 a weight is no number; expected one: take a lower --rate" in capsys.readouterr().err
    assert len(checkpoint(tmp_path)["losses"]) == 10


def test_a_state_that_grows_beyond_numbers(text, tmp_path, capsys):
    """On the held-out text, which is one long row, while losses and weights are still numbers."""
    changed = {
        "nonlinearity": "relu",
        "recurrent": "normal",
        "radius": 9,
        "hidden": 32,
        "window": 2,
        "rate": 1e-9,
    }
    options = [f"--{name}={value}" for name, value in changed.items()]
    assert run_main(text, tmp_path / "run", *options, "--steps", 10) == 1
    assert "at step 10 the held-out text has no finite bits" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert (
        run_main(text, tmp_path, *options, "--steps", 10, "--compare", "--results", tmp_path / "results") == 1
    )
    assert list((tmp_path / "results").iterdir()) == []


def test_a_sample_of_a_state_that_grows_beyond_numbers(corpus):
    run = training(corpus, nonlinearity="relu", recurrent="normal", radius=3.0, hidden=32)
    with pytest.raises(language.Diverged, match="characters of a sample the scores are no numbers"):
        run.sample(corpus.held_out[:5], 200)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes that break are of POSIX")
def test_a_reader_who_leaves_takes_nothing_away(text, tmp_path):
    with program(text, tmp_path / "run", "--steps=20") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    assert len((tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")) == charlm.PROMPT + 10


def test_a_signal_in_the_last_steps_leaves_the_last_reading(text, tmp_path, monkeypatch):
    step = Training.step

    def interrupted(self):
        if self.steps == 25:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Training, "step", interrupted)
    assert run_main(text, tmp_path, "--steps", 30) == 130
    assert checkpoint(tmp_path)["held_out"][-1][1] == 30
    assert len((tmp_path / "sample.txt").read_text(encoding="utf-8")) == charlm.PROMPT + 30


def test_reading_stops_where_it_is_enough(corpus, monkeypatch):
    monkeypatch.setattr(language, "EVALUATED", 10)
    run = Run(training(corpus))
    asked = []
    assert run.evaluate(lambda: asked.append(0) or len(asked) == 3)
    assert run.held_out == []
    assert len(asked) == 3
    assert run.evaluate()
    assert len(run.held_out) == 1


def test_how_far_apart_losses_are():
    found = charlm_compare.apart([2.0] * 5 + [3.0] + [2.0] * 100, [2.0] * 106)
    assert found == {"10": 0.5, "100": 0.5}


WRONG = {
    "no file": (["--text", "nowhere.txt"], "nowhere.txt"),
    "minutes": (["--minutes", "0"], "--minutes is 0.0; expected a number above 0"),
    "endless": (["--minutes", "inf"], "--minutes is inf; expected a number above 0"),
    "temperature": (["--temperature", "-1"], "--temperature is -1.0; expected a number from 0 up"),
    "prompt": (["--prompt", ""], "--prompt is empty; expected one character at least"),
    "strange prompt": (
        ["--prompt", "ø"],
        "--prompt can't be read: the text has 'ø'; expected characters that",
    ),
    "device": (["--device", "gpu"], "--device is 'gpu'; expected cpu or cuda"),
    "backend": (["--backend", "fast"], "fast"),
    "settings": (["--dropout", "1"], "dropout is 1.0; expected 0 or more and less than 1"),
    "recurrent": (["--recurrent", "diagonal"], "diagonal"),
    "long window": (["--window", "1000"], "take a longer text, or a smaller --batch or --window"),
    "nothing to resume": (["--resume"], "to go on with; expected a checkpoint there, or no --resume"),
    "compare and resume": (
        ["--compare", "--resume"],
        "--compare is for one process, and leaves no checkpoint",
    ),
    "compare with itself": (["--compare", "--backend", "nn.RNN"], "is what --compare compares with"),
    "both ways": (["--resume", "--overwrite"], "--resume and --overwrite came both; expected one"),
    "seed": (["--seed", str(2**64)], "--seed is 18446744073709551616; expected a number of 64 bits"),
    "rate": (["--rate", "inf"], "rate is inf; expected a number"),
}
if DEVICE == "cpu":
    WRONG["absent backend"] = (["--backend", "cudnn"], "needs a CUDA GPU")
    WRONG["tf32"] = (["--dtype", "tf32"], "dtype is tf32 and the device cpu; expected float32, or an NVIDIA")
    WRONG["absent device"] = (["--device", "cuda"], "--device is cuda, which this machine has not")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name, text, tmp_path, capsys):
    options, said = WRONG[name]
    with pytest.raises(SystemExit) as stopped:
        run_main(text, tmp_path / "run", *options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_neither_lost_nor_mistaken(text, tmp_path, capsys):
    run_main(text, tmp_path, "--steps", 10)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    for options, said in (
        ([text, tmp_path], "is the checkpoint of an earlier run; expected --resume to go on with it"),
        ([text, tmp_path, "--resume", "--hidden", 9], "was trained with --hidden 8, not 9"),
        ([other, tmp_path, "--resume"], "was trained on rhyme.txt, of another content than other.txt"),
    ):
        with pytest.raises(SystemExit):
            run_main(*options)
        assert said in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert run_main(text, tmp_path, "--steps", 20, "--overwrite") == 0
    saved = checkpoint(tmp_path)
    for settings in ({"hidden": 8}, {**saved["settings"], "colour": "red"}):
        torch.save({**saved, "settings": settings}, tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit):
            run_main(text, tmp_path, "--resume")
        assert f"{tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err
    for content in (b"", b"no zip", before[:-100]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit):
            run_main(text, tmp_path, "--resume")
        assert "is no checkpoint of this program" in capsys.readouterr().err


def test_the_progress_line(corpus, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    run = Run(training(corpus), held_out=[(0.0, 0, 4.5)])
    progress = Progress(Limits(math.inf, 40))
    run.advance(10)
    run.seconds = 20.0
    progress.show(run)
    loss = sum(run.losses) / 10
    said = capsys.readouterr().err
    told = f"  25%  loss {loss:.3f}  {loss / math.log(2):.3f} bits/char  5 chars/s  1:00 left"
    assert said == f"\r[#####...............]{told}  held out 4.500\x1b[K"
    progress.show(run, [run])
    assert "\reager  [#####" in (said := capsys.readouterr().err)
    assert "  2:00 left" in said
    assert progress.line(run, [], len(told) + 12) == f"[##........]{told}"
    assert progress.line(run, [], len(told) + 1) == told[1:]
    assert progress.line(run, [], 30) == told[1:31]


# --- Comparisons ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, str]:
    """The machine's folder of a small comparison, and its page."""
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "rhyme.txt"
    path.write_text(TEXT, encoding="utf-8")
    options = ["--text", str(path), "--results", str(folder / "results"), "--length", "30", *OPTIONS]
    assert charlm.main([*options, "--compare", "--steps", "300"]) == 0
    (machines,) = (path for path in (folder / "results").iterdir() if path.is_dir())
    return machines, (machines / "charlm.md").read_text(encoding="utf-8")


def test_a_comparison_is_published(compared):
    folder, page = compared
    record = json.loads((folder / "charlm.jsonl").read_text(encoding="utf-8"))
    ours, theirs = record["runs"][-1], record["runs"][0]
    assert theirs["name"] == "nn.RNN"
    assert {run["steps"] for run in record["runs"]} == {300}
    assert ours["apart"]["10"] < 1e-5
    assert all(len(run["training"]) == charlm_compare.ROUNDS for run in record["runs"])
    assert all(len(run["generation"]) == charlm_compare.GENERATIONS for run in record["runs"])
    assert f"| unigram |  |  |  |  | {record['baselines']['unigram']:.3f} |  |" in page
    for run in record["runs"]:
        assert f"- {run['name']}: " in page
        assert f"| {run['name']} | {run['held_out'][0][2]:.3f} |" in page
    assert set(record["absent"]) | {run["name"] for run in record["runs"]} >= {"eager", "triton", "cudnn"}
    assert "[charlm](" in (folder.parent / "README.md").read_text(encoding="utf-8")
    assert (folder / "machine.json").exists()


def test_pages_are_made_again_from_what_is_stored(compared, monkeypatch):
    folder, _ = compared
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "charlm.md").unlink()
    (folder / "charlm-old.png").touch()
    monkeypatch.setattr(sys, "argv", ["report", str(folder.parent)])
    report.main()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


def test_a_comparison_takes_the_place_of_the_one_before(compared, tmp_path, monkeypatch):
    folder, _ = compared
    record = json.loads((folder / "charlm.jsonl").read_text(encoding="utf-8"))
    monkeypatch.setattr(machine, "slug", lambda described: "here")
    for change in ({}, {"date": "later"}, {"settings": {**record["settings"], "hidden": 16}}):
        charlm_page.publish(tmp_path, {**record, **change})
    stored = charlm_page.read(tmp_path / "here" / "charlm.jsonl")
    assert [(one["settings"]["hidden"], one["date"]) for one in stored] == [
        (16, record["date"]),
        (8, "later"),
    ]
    (tmp_path / "here" / "charlm.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="has a line that is no comparison"):
        charlm_page.publish(tmp_path, record)


def test_few_turns_have_no_interval(compared):
    folder, page = compared
    (record,) = charlm_page.read(folder / "charlm.jsonl")
    assert "| after 10 steps |" in page
    few = [{**run, "training": run["training"][:3]} for run in record["runs"]]
    training = charlm_page._speeds(few, few[0]).splitlines()[-1].split(" | ")[1:3]
    assert not any("[" in cell for cell in training)
    whole = charlm_page._speeds(record["runs"], record["runs"][0]).splitlines()[-1].split(" | ")[1:3]
    assert all("[" in cell for cell in whole)


def test_without_matplotlib_the_pictures_stay(compared, tmp_path, monkeypatch):
    folder, page = compared
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    charlm_page.write(tmp_path / "here", charlm_page.read(tmp_path / "here" / "charlm.jsonl"))
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert (tmp_path / "here" / "charlm.md").read_text(encoding="utf-8") == page


def test_verdicts():
    held_out = [[1.0, 10, 5.0], [2.0, 20, 4.0], [3.0, 30, 2.5]]
    run = {"name": "eager", "seconds": 3.0, "held_out": held_out}
    record = {"runs": [run], "baselines": {"unigram": 4.5, "5-gram": 2.0}}
    assert charlm_page.verdicts(record) == [
        "- eager: below the unigram's after 2.00 s, not below the 5-gram's in 3.00 s."
    ]


def test_a_turns_numbers_belong_together(corpus, monkeypatch):
    """Also where a turn is shorter than what a contender does between two looks at the clock."""
    monkeypatch.setattr(charlm_compare, "ROUNDS", 6)
    both = {name: Run(training(corpus, name)) for name in ("nn.RNN", "eager")}
    advance = Run.advance

    def slow(self, count):
        advance(self, count)
        self.seconds = self.training.steps * (1.0 if self.training.backend == "eager" else 0.3)

    monkeypatch.setattr(Run, "advance", slow)
    taken = charlm_compare.race(both, Limits(60.0, math.inf), lambda: 0)
    assert taken == {"nn.RNN": [pytest.approx(0.03)] * 6, "eager": [pytest.approx(0.1)] * 6}
    both = {name: Run(training(corpus, name)) for name in ("nn.RNN", "eager")}
    taken = charlm_compare.race(both, Limits(30.0, math.inf), lambda: 0)
    assert len(taken["nn.RNN"]) == len(taken["eager"]) == 3  # eager's 10 s are two turns


@pytest.mark.parametrize("when", ["step", "sample"])
def test_an_interrupted_comparison_publishes_nothing(when, text, tmp_path, monkeypatch, capsys):
    function, calls = getattr(Training, when), []

    def interrupted(self, *args, **options):
        calls.append(when)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return function(self, *args, **options)

    monkeypatch.setattr(Training, when, interrupted)
    assert (
        run_main(text, tmp_path / "run", "--compare", "--results", tmp_path / "results", "--steps", 60) == 130
    )
    assert "Stopped: nothing is published." in capsys.readouterr().err
    assert list((tmp_path / "results").iterdir()) == []


def test_a_line_is_one_whatever_a_sample_has_in_it(compared, tmp_path, monkeypatch):
    folder, _ = compared
    record = json.loads((folder / "charlm.jsonl").read_text(encoding="utf-8"))
    monkeypatch.setattr(machine, "slug", lambda described: "here")
    for prompt in ("a\u2028b\x85c\x1dd\r\n", "e"):
        charlm_page.publish(
            tmp_path, {**record, "prompt": prompt, "settings": {**record["settings"], "layers": len(prompt)}}
        )
    assert {one["prompt"] for one in charlm_page.read(tmp_path / "here" / "charlm.jsonl")} == {
        "e",
        "a\u2028b\x85c\x1dd\r\n",
    }


def test_a_terminal_without_a_character(text, tmp_path):
    text.write_text(TEXT.replace("o", "\N{SNOWMAN}"), encoding="utf-8")
    with program(text, tmp_path / "run", "--steps=10", PYTHONIOENCODING="ascii") as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "?" in said
    assert "\N{SNOWMAN}" in (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")


def test_a_sample_with_backticks_stays_in_its_block():
    assert charlm_page._fenced("a ``` b") == "````text\na ``` b\n````"


def test_without_matplotlib_there_is_a_word(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_main(text, tmp_path / "run", "--steps", 10) == 0
    assert "Pictures need matplotlib" in capsys.readouterr().out
