"""train.py's promises: exact resume, ranks that add up, the true score, and one clear line for bad
input."""
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import (ROOT, TINY, assert_one_clear_line, prose, random_model, read_bin, read_log,
                      run_script, symbols)
from torch.optim._muon import _zeropower_via_newtonschulz

import prepare as P
import train as T
from model import GPT, STLM, STLMConfig


def checkpoint(path):
    return T.load_checkpoint(path)[1]


def weights(out_dir):
    return checkpoint(f"{out_dir}/ckpt.pt")["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(*arguments):
    T.train(*T.parse(arguments))


SMALL = [*TINY, "--dataset=tiny", "--max_iters=12", "--eval_interval=6"]


def small_run(*more):
    train(*SMALL, *more)


def log_without_time(out_dir):
    return [{key: value for key, value in entry.items() if key not in ("minutes", "bytes_per_s")}
            for entry in read_log(out_dir)]


def refused(arguments, *expected):
    """One line, that is printed before anything is trained."""
    with pytest.raises(P.BadInput) as error:
        train(*arguments)
    assert "\n" not in str(error.value)
    for text in expected:
        assert text in str(error.value)


class Crash(Exception):
    pass


def crash(*arguments, **options):
    raise Crash


# --- stopped and resumed --------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [[], ["--grad_accum=2"]])
def test_resumed_equals_uninterrupted(workdir, extra, monkeypatch):
    """Crashed in an evaluation, resumed as README does: the same command and --resume."""
    extra = [*extra, "--log_interval=3"]
    small_run("--out_dir=whole", *extra)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(T, "evaluate", crash)
        small_run("--out_dir=parts", *extra)
    assert checkpoint("parts/ckpt.pt")["state"]["iter"] == 6
    small_run("--out_dir=parts", *extra, "--resume")
    for _ in range(2):  # and once more, when it is finished
        assert_same_weights(weights("whole"), weights("parts"))
        assert log_without_time("whole") == log_without_time("parts")
        train("--out_dir=parts", "--resume")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_goes_on(workdir, stop):
    arguments = [str(ROOT / "config" / "quick.py"), *TINY, "--dataset=tiny", "--out_dir=run",
                 "--max_minutes=0"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--max_iters=4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("iter    20"):
            process.send_signal(stop)
    assert process.wait() == 0
    stopped = checkpoint("run/ckpt.pt")["state"]["iter"]
    assert 20 <= stopped < 4000 and f"at iteration {stopped}; continue with --resume" in line
    train(*arguments, "--resume", f"--max_iters={stopped + 3}")
    assert checkpoint("run/ckpt.pt")["state"]["iter"] == stopped + 3


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "config").glob("*.py")
                                        if "def " not in path.read_text()))  # but experiments
def test_resume_with_a_config_file(workdir, name, request):
    """The same command and --resume, for every shipped config: what the run settled itself, such as
    max_patches, does not clash."""
    def run(name, *more):
        config = str(ROOT / "config" / f"{name}.py")
        train(config, "--dataset=tiny", "--max_minutes=0", "--eval_bytes=2000", "--compile=false",
              "--sample_bytes=0", *more)

    sizes = [argument for argument in TINY if re.match("--(n_|d_|block|batch)", argument)]
    config, _ = T.parse([str(ROOT / "config" / f"{name}.py")])
    if "tokenizer" in config:
        if config["tokenizer"] == "gpt2":
            request.getfixturevalue("gpt2")
        P.prepare(["texts"], name="tiny", tokenizer=config["tokenizer"])
    if "init_from" in config:
        run("quick", *sizes, "--max_iters=2")
        sizes = []
    run(name, *sizes, "--max_iters=2")
    run(name, *sizes, "--max_iters=4", "--resume")
    resumed = checkpoint(f"{config['out_dir']}/ckpt.pt")
    assert resumed["state"]["iter"] == 4
    assert [e["iter"] for e in read_log(config["out_dir"]) if "val_bpb" in e] == [2, 4]
    if config.get("max_patches") == 0:
        assert resumed["sizes"]["max_patches"] > resumed["config"]["max_patches"] == 0


def test_killed_after_an_evaluation_the_best_stays_the_best(workdir, monkeypatch):
    """Killed in the step after the first evaluation, which is the best: later ones, which are
    worse, do not replace best.pt."""
    def crash_halfway(progress, cfg):
        return crash() if progress >= 0.5 else 1.0

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(T, "learning_rate_scale", crash_halfway)
        small_run("--out_dir=run")
    first, evaluate, n_evaluations = Path("run/best.pt").read_bytes(), T.evaluate, []

    def worse_each_time(*arguments):
        n_evaluations.append(1)
        return evaluate(*arguments) + len(n_evaluations) - 1

    monkeypatch.setattr(T, "evaluate", worse_each_time)
    small_run("--out_dir=run", "--resume")
    assert [e["iter"] for e in read_log("run") if "val_bpb" in e] == [6, 12]
    best = checkpoint("run/best.pt")
    assert best["state"]["iter"] == 6
    assert_same_weights(best["model"], torch.load(io.BytesIO(first))["model"])


def test_the_best_is_chosen_by_one_measure(workdir):
    """The last evaluation scores all of the text, which may be harder than the part that was scored
    before: that alone does not keep an older, worse model in best.pt."""
    noise = bytes(random.Random(0).choices(range(97, 123), k=5000))
    Path("val.txt").write_bytes(prose(200) + noise)
    P.prepare(["texts"], name="tiny", val="val.txt")
    small_run("--out_dir=run", "--max_iters=45", "--eval_interval=15", "--eval_bytes=1",
              "--learning_rate=0.02")
    data = load("val", 64)
    best, last = (T.evaluate(T.load_checkpoint(f"run/{name}")[0], data, 4, nullcontext(), 1)
                  for name in ("best.pt", "ckpt.pt"))
    assert best <= last


def test_a_torn_log_is_written_anew(workdir):
    """Of a full disk or a power cut: the lines up to the checkpoint come from the checkpoint."""
    small_run("--out_dir=run")
    whole = log_without_time("run")
    text = Path("run/log.jsonl").read_text()
    for torn in text[:-30], text + '{"iter": 1', text[:40], "", "\0" * 100:
        Path("run/log.jsonl").write_text(torn)
        train("--out_dir=run", "--resume")
        assert log_without_time("run") == whole
    Path("run/log.jsonl").unlink()
    train("--out_dir=run", "--resume", "--max_iters=15")
    assert log_without_time("run")[: len(whole) - 1] == whole[:-1]  # the last evaluation is redone


def test_no_run_is_ever_deleted(workdir):
    runs = []
    for seed in range(4):
        small_run("--out_dir=run", "--max_iters=1", f"--seed={seed}")
        runs.append(weights("run"))
        if seed == 1:
            Path("run.2").write_text("something else")
    for name, expected in zip(["run.1", "run.3", "run.4", "run"], runs):
        assert_same_weights(weights(name), expected)
    Path("run/ckpt.pt").unlink()  # what is left is still a run
    small_run("--out_dir=run", "--max_iters=1")
    assert Path("run.5/best.pt").exists()
    assert Path("run.2").read_text() == "something else"


def test_only_runs_are_moved_out_of_the_way(workdir):
    """A folder that holds a run and something else is refused, not renamed."""
    small_run("--out_dir=run", "--max_iters=1")
    Path("run/thesis.txt").write_text("mine")
    refused([*SMALL, "--out_dir=run"], "out_dir=run holds more than a run")
    assert Path("run/thesis.txt").exists()


def test_a_finished_run_goes_on(workdir):
    """A run that ended between two evaluations keeps what its last one said, on --resume, too."""
    small_run("--out_dir=run", "--max_iters=7", "--eval_interval=5")
    best, log = checkpoint("run/best.pt")["state"]["best"], read_log("run")
    assert log[-1]["all_of_val"] and checkpoint("run/ckpt.pt")["state"]["best"] == best
    small_run("--out_dir=run", "--max_iters=9", "--eval_interval=5", "--resume")
    assert read_log("run")[: len(log)] == log
    done = run_script("train.py", "--resume", "--out_dir=run", cwd=workdir)
    assert done.returncode == 0 and "this run is finished" in done.stdout


def test_a_run_outlives_its_reader(workdir):
    """`train.py ... | head -1`: what it prints is lost, what it writes is not."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--out_dir=run", "--log_interval=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith(b"iter"):
            pass
        process.stdout.close()
        process.wait(120)
    assert checkpoint("run/ckpt.pt")["state"]["iter"] == read_log("run")[-1]["iter"] == 12


def test_a_renamed_run_goes_on_where_it_is(workdir):
    small_run("--out_dir=run")
    Path("run").rename("out")
    train("--out_dir=out", "--resume", "--max_iters=14")
    Path("out").rename("elsewhere")
    Path("out").mkdir()
    Path("elsewhere").rename("out/stlm")  # out_dir's default
    train("--resume", "--max_iters=16")
    assert checkpoint("out/stlm/ckpt.pt")["state"]["iter"] == 16
    assert os.listdir("out") == ["stlm"] and not Path("run").exists()


def test_resume_checks_the_data(workdir):
    """Another split is refused, a folder that was renamed or prepared again alike is not."""
    P.prepare(["texts"], name="split")
    base = [*TINY, "--max_iters=2", "--out_dir=run"]
    train(*base, "--dataset=split")
    resume = ["--out_dir=run", "--resume", "--max_iters=4"]
    P.prepare(["texts"], name="split", val_fraction=0.2)
    refused(resume, "data/split", "the data of the checkpoint", "sha256")
    P.prepare(["texts"], name="split", patcher="fixed:4")
    shutil.copytree("data/split-fixed4", "data/split", dirs_exist_ok=True)
    refused(resume, "data/split", "the data of the checkpoint", "patcher")
    P.prepare(["texts"], name="split")
    train(*resume)
    Path("data/split").rename("data/renamed")
    refused([*resume, "--max_iters=6"], "no dataset in data/split")
    train(*resume, "--dataset=renamed", "--max_iters=6")
    assert checkpoint("run/ckpt.pt")["state"]["iter"] == 6
    # another split may be trained on from a checkpoint's weights, but not another way to cut text
    P.prepare(["texts"], name="split", val_fraction=0.2)
    tune = ["--init_from=run/ckpt.pt", "--out_dir=tuned", "--max_iters=1", "--compile=false"]
    train(*tune, "--dataset=split")
    shutil.copytree("data/split-fixed4", "data/split", dirs_exist_ok=True)
    refused([*tune, "--dataset=split"], "data/split differs from the data of the checkpoint")


def test_handlers_are_restored(workdir):
    handler = lambda number, frame: None
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)
    small_run("--out_dir=run")
    too_fast = ["--learning_rate=1e12", "--adam_learning_rate=1e12"]
    refused([*SMALL, "--out_dir=bad", *too_fast], "training diverged")
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is handler


def test_the_second_ctrl_c_stops_at_once(workdir):
    """Also in the last evaluation, which would take long and which the first one does not end."""
    Path("long.txt").write_bytes(prose(50_000) * 200)
    P.prepare(["texts"], name="long", val="long.txt")
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--dataset=long", "--out_dir=run",
               "--max_iters=5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not Path("run/ckpt.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert checkpoint("run/ckpt.pt")["state"]["iter"] == 5 and not Path("run/loss.png").exists()


# --- several ranks --------------------------------------------------------------------------------
IN_FP32 = """
import sys
sys.path.insert(0, {root!r})
import torch, train
train.choose_dtype = lambda device: torch.float32
train.main()
"""


@pytest.mark.slow
def test_two_ranks_equal_one_with_twice_the_batch(workdir):
    Path("fp32.py").write_text(IN_FP32.format(root=str(ROOT)))  # so that sums differ less
    common = ["fp32.py", *TINY, "--dataset=tiny", "--max_iters=6", "--log_interval=1",
              "--grad_accum=2", "--device=cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher, own in [(torchrun, ["--out_dir=two", "--batch_size=4"]),
                          ([], ["--out_dir=one", "--batch_size=8"])]:
        command = [sys.executable, *launcher, *common, *own]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "float32" in done.stdout, done.stderr
    for a, b in zip(read_log("one"), read_log("two"), strict=True):
        assert a["iter"] == b["iter"] and a["bytes"] == b["bytes"]
        for key in {"train_bpb", "val_bpb"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    one, two = weights("one"), weights("two")
    for name in one:
        assert (one[name] - two[name]).norm() < 0.01 * one[name].norm() + 1e-4, name


@pytest.mark.slow
def test_a_stray_world_size_is_no_launch(workdir):
    """As some clusters leave it in the environment: only torchrun sets all the three."""
    for stray in {"WORLD_SIZE": "8"}, {"RANK": "1", "WORLD_SIZE": "2"}:
        done = run_script("train.py", *SMALL, "--out_dir=run", cwd=workdir, env=os.environ | stray)
        assert done.returncode == 0 and "on all" in done.stdout, done.stderr


# --- data and scores ------------------------------------------------------------------------------
def load(split, block_size, folder="data/tiny"):
    return T.Data(Path(folder), split, T.load_meta(Path(folder)), block_size)


def test_windows_cover_the_text_evenly_and_apart_between_ranks(workdir):
    """At any time, from any point on: no part is read twice before every other was read once."""
    data = load("train", 64)
    data.ids = np.arange(len(data.ids))  # a symbol tells where it stands
    room = len(data.ids) - 64
    for n in 10, 100, 1000:
        x, y = data.sequences(3 * n, n, seed=7)
        assert torch.equal(x, x[:, :1] + torch.arange(64)) and torch.equal(y, x + 1)
        begins = np.sort(x[:, 0].numpy())
        gaps = np.diff(begins, append=begins[0] + room) * n / room  # 1 on average
        assert 0.4 < gaps.min() and gaps.max() < 1.9 and 0 <= begins[0] and y.max() < len(data.ids)
    assert not torch.equal(x, data.sequences(3 * n, n, seed=8)[0])
    # train() asks for sequences (2 * iteration + rank) * B and on: both ranks together read all
    parts = [data.sequences((2 * i + r) * 4, 4, 7)[0] for i in range(3) for r in range(2)]
    assert torch.equal(torch.cat(parts), data.sequences(0, 24, 7)[0])


@pytest.mark.parametrize("block_size", [32, 50, 64])
def test_bits_per_byte_by_hand(workdir, block_size, monkeypatch):
    """A model that gives every symbol 1/512 needs 9 bits a symbol, the separators' included; only
    text counts below."""
    data = load("val", block_size)
    model = STLM(STLMConfig(block_size=block_size, n_layer=1, n_head=2, n_embd=32, d_byte=16))
    torch.nn.init.zeros_(model.embed.byte.weight)
    n_bytes = len(Path("val.txt").read_bytes())
    by_hand = 9 * (n_bytes + 1) / n_bytes
    for batch_size in 1, 7:
        bpb = T.evaluate(model, data, batch_size, nullcontext())
        assert bpb == pytest.approx(by_hand, rel=1e-6)
    assert T.evaluate(model, data, 2, nullcontext(), 500) == pytest.approx(9, rel=0.01)
    monkeypatch.setattr(T, "WORLD_SIZE", 3)
    targets = []
    for rank in range(3):  # ranks share the windows out
        monkeypatch.setattr(T, "RANK", rank)
        targets += [y[y >= 0] for _, y in data.scoring_batches(3)]
    targets = torch.cat(targets).tolist()
    assert sorted(targets) == sorted(read_bin("data/tiny/val.bin").tolist())
    assert len(targets) == n_bytes + 1


def test_bits_per_byte_of_tokens_by_hand(workdir, gpt2):
    folder = P.prepare(["texts"], tokenizer="gpt2", val="val.txt")
    model = GPT(STLMConfig(block_size=32, vocab_size=50257, n_layer=1, n_head=2, n_embd=8))
    torch.nn.init.zeros_(model.wte.weight)
    text = Path("val.txt").read_bytes()
    n_tokens = len(tiktoken.get_encoding("gpt2").encode_ordinary(text.decode())) + 1
    by_hand = n_tokens * math.log2(50257) / len(text)
    data = load("val", 32, folder)
    assert T.evaluate(model, data, 4, nullcontext()) == pytest.approx(by_hand, rel=1e-5)


def test_evaluation_scores_every_symbol_in_its_context(workdir):
    """evaluate() gives each symbol the loss that the model gives it after its window so far."""
    data, model = load("val", 64), random_model(max_patches=64)
    ids = np.concatenate([[P.SEPARATOR], read_bin("data/tiny/val.bin")]).astype(np.int64)
    ids, nats = torch.from_numpy(ids), 0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 64):
            y = ids[i + 1 : i + 65]
            logits = model(ids[None, i : i + len(y)])[0]
            nats += F.cross_entropy(logits, y, reduction="sum").item()
    expected = nats / math.log(2) / len(Path("val.txt").read_bytes())
    assert T.evaluate(model, data, 5, nullcontext()) == pytest.approx(expected, rel=1e-5)


# --- optimizers -----------------------------------------------------------------------------------
def test_every_parameter_in_exactly_one_optimizer():
    for model in STLM(STLMConfig()), GPT(STLMConfig(vocab_size=100)):
        optimizers = T.make_optimizers(model, T.Config(), torch.float32)
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (40, 40), (64, 192), (3, 1)])
def test_orthogonalize(shape):
    """The singular vectors stay, the singular values come near 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    values = u.T @ T.orthogonalize(x) @ v.T
    large = s > 0.05 * s[0]
    assert (values.diagonal()[large] - 1).abs().max() < 0.35
    assert torch.allclose(values, values.diagonal().diag(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_never_makes_a_large_step(dtype):
    """Whatever the gradient: of one direction, nearly so, of all alike, tiny, huge or zero."""
    torch.manual_seed(0)
    for shape in (3, 1), (64, 192), (192, 192):
        one_direction = torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
        noise = torch.randn(shape)
        for x in (one_direction, one_direction + 0.001 * noise, one_direction + 0.01 * noise,
                  noise, 1e-12 * noise, 1e12 * noise, 0 * noise):
            step = T.orthogonalize(x.to(dtype)).float()
            assert torch.linalg.svdvals(step).max() < 1.4


def test_muon_takes_the_steps_of_torch(monkeypatch):
    """Three steps on matrices of several shapes, with its iterations: those of torch.optim.Muon."""
    theirs = lambda x: _zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    monkeypatch.setattr(T, "orthogonalize", theirs)
    matrices = [torch.randn(s, generator=torch.Generator().manual_seed(0))
                for s in ((12, 8), (8, 12), (8, 12), (6, 6))]
    a, b = ([torch.nn.Parameter(x.clone()) for x in matrices] for _ in range(2))
    optimizers = [T.Muon(a, 0.1, dtype=torch.bfloat16),
                  torch.optim.Muon(b, lr=0.1, weight_decay=0, momentum=0.95)]
    for _ in range(3):
        for p, q in zip(a, b):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, x in zip(a, b, matrices):
        assert torch.allclose(p, q, atol=4e-3) and (p - x).abs().max() > 0.05


def test_schedule():
    cfg = T.Config(warmup=0.1, cooldown=0.5)
    scales = [T.learning_rate_scale(p, cfg) for p in (0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.2)]
    assert scales == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])
    assert T.learning_rate_scale(0, T.Config(warmup=0, cooldown=0)) == 1


# --- what is trained ------------------------------------------------------------------------------
@pytest.mark.parametrize("keys, expected", [
    ({}, 434),                                  # 393.8 patches on average and a tenth more
    ({"window": 64}, 7 * 64),                   # in whole chunks of attention
    ({"window": 300}, 2 * 300),
    ({"window": 64, "max_patches": 50}, 50),    # what the user says stays
    ({"model": "gpt", "block_size": 8}, 2),
])
def test_room_for_patches(keys, expected):
    meta = {"train": {"bytes_per_patch": 5.2}, "vocab": None}
    small = {"block_size": 2048, "max_patches": 0, "n_ngram": 10}
    model = T.new_model(T.Config(**small | keys), meta)
    assert model.config.max_patches == expected


def test_learning_works(workdir):
    """120 steps on repetitive text: far better than the bytes' frequencies alone allow."""
    train(*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=120", "--eval_interval=60",
          "--sample_bytes=0", "--learning_rate=0.02")
    counts = np.bincount(np.frombuffer(Path("val.txt").read_bytes(), np.uint8))
    p = counts[counts > 0] / counts.sum()
    final = [entry["val_bpb"] for entry in read_log("run") if "val_bpb" in entry][-1]
    assert final < 0.75 * -(p * np.log2(p)).sum()
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_limit_of_time(workdir):
    """max_minutes ends a run by itself; the time counts on after --resume."""
    arguments = [*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=0", "--sample_bytes=0"]
    train(*arguments, "--max_minutes=0.02")
    first = checkpoint("run/ckpt.pt")["state"]
    assert 1.2 <= first["seconds"] < 5 and first["iter"] > 0
    train(*arguments, "--max_minutes=0.03", "--resume")
    second = checkpoint("run/ckpt.pt")["state"]
    assert 1.8 <= second["seconds"] < 5 and second["iter"] > first["iter"]


def test_the_baseline_trains_and_finetuning_starts_from_a_checkpoint(workdir, gpt2):
    P.prepare(["texts"], name="tiny", tokenizer="gpt2", val="val.txt")
    small_run("--out_dir=baseline", "--model=gpt", "--tokenizer=gpt2", "--n_embd=16")
    assert weights("baseline")["wte.weight"].shape == (50257, 16)
    small_run("--out_dir=base")
    older = torch.load("base/ckpt.pt")
    del older["config"]["window"], older["sizes"]["window"]  # a key younger than the checkpoint
    torch.save(older, "base/ckpt.pt")
    tune = ["--init_from=base/ckpt.pt", "--dataset=tiny", "--max_iters=1", "--warmup=0.5",
            "--compile=false"]
    train(*tune, "--out_dir=tuned")
    assert_same_weights(weights("base"), weights("tuned"))  # the first step of warmup moves nothing
    refused([*tune, "--out_dir=bad", "--n_layer=3", "--d_byte=99"], "d_byte, n_layer differ from")
    refused([*tune, "--out_dir=bad", "--tokenizer=gpt2"], "tokenizer differ from base/ckpt.pt")


def test_a_loss_that_is_not_finite_stops_the_run(workdir):
    done = run_script("train.py", *SMALL, "--out_dir=run", "--learning_rate=1e12",
                      "--adam_learning_rate=1e12", "--warmup=0.5", "--eval_interval=2", cwd=".")
    assert_one_clear_line(done, "training diverged at iteration", "try lower learning rates")
    if Path("run/ckpt.pt").exists():
        assert all(t.isfinite().all() for t in weights("run").values())


# --- keys and files -------------------------------------------------------------------------------
def test_config_files_and_keys(tmp_path):
    config = tmp_path / "with space.py"
    config.write_bytes(b'import math\r\n_hidden = 1\r\nlearning_rate = 1\r\nout_dir = "a=b"\r\n'
                       b"max_iters = 5_000\r\n")
    given, _ = T.parse([str(config), "--max_iters=7_0", "--compile=False", "--out_dir=c=d",
                        "--resume"])
    assert given == {"learning_rate": 1.0, "out_dir": "c=d", "max_iters": 70, "compile": False,
                     "resume": True}
    assert type(given["learning_rate"]) is float


def test_help_lists_every_key():
    done = run_script("train.py", "--help", cwd=".")
    for key in T.KEYS:
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"    {key}: ")]
        assert len(lines) == 1 and len(lines[0].split("#")[1]) > 5  # with its explanation


def test_bad_keys_get_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.py").write_text("learning_rte = 0.1\n")
    Path("type.py").write_text('n_layer = "four"\n')
    Path("broken.py").write_text("n_layer = = 4\n")
    for arguments, expected in [
        (["typo.py"], "unknown key learning_rte; did you mean learning_rate?"),
        (["--n_layers=3"], "did you mean n_layer?"),
        (["--N_LAYER=3"], "unknown key N_LAYER"),
        (["--_n_layer=3"], "unknown key _n_layer"),
        (["--"], "unknown key ;"),
        (["--device=meta"], "--device=meta does not work here"),
        (["type.py"], "n_layer=four: expected a value of type int"),
        (["broken.py"], "config file broken.py: SyntaxError"),
        (["missing.py"], "config file missing.py: FileNotFoundError"),
        (["quick.json"], "quick.json: expected a config file (.py) or --key=value"),
        (["n_layer=4"], "n_layer=4: expected a config file (.py) or --key=value"),
        (["--n_layer=2.5"], "n_layer=2.5: expected a value of type int"),
        (["--compile=maybe"], "compile=maybe: expected a value of type bool"),
        (["--learning_rate"], "learning_rate=true: expected a value of type float"),
        (["--n_embd=100", "--n_head=3"], "expected a multiple of 2 * n_head"),
        (["--max_iters=0"], "a run needs an end"),
        (["--model=bert"], "expected stlm or gpt"),
        (["--tokenizer=gpt2"], "tokenizer=gpt2: expected bytes"),
        (["--dataset=nothing"], "no dataset in data/nothing"),
        (["--dataset=nothing", "--patcher=gpt2"], "--patcher=gpt2"),
        (["--device=quantum"], "--device=quantum does not work here"),
        (["--resume", "--out_dir=none"], "none/ckpt.pt is missing"),
        (["--init_from=none.pt"], "none.pt is missing"),
    ]:
        refused(arguments, expected)
    assert_one_clear_line(run_script("train.py", "typo.py", cwd=tmp_path), "did you mean")
    assert sorted(os.listdir()) == ["broken.py", "type.py", "typo.py"]


MAY_BE_ZERO = {"max_patches", "window", "n_encoder", "n_decoder", "seed", "max_iters",
               "sample_bytes"}


@pytest.mark.parametrize("key", [key for key, kind in T.KEYS.items() if kind in (int, float)])
def test_every_number_has_a_range(key, workdir):
    """Outside of it the line names the key, the value and the range; nothing is written."""
    kind = T.KEYS[key]
    outside = [-1, 10**20] if kind is int else [-1, -1e-9, "nan", "inf", "-inf", 1e300]
    if key in ("warmup", "cooldown"):
        outside.append(1.5)
    if kind is int and key not in MAY_BE_ZERO:
        outside.append(0)
    if key in T.SIZES:
        outside.append(2**30)
    for value in outside:
        refused([*SMALL, "--out_dir=run", f"--{key}={value}"], f"{key}={kind(value)}: expected ")
    assert not Path("run").exists()


@pytest.mark.parametrize("arguments", [
    ["--n_encoder=0", "--n_decoder=0"], ["--block_size=1"], ["--batch_size=1", "--max_patches=1"],
    ["--n_ngram=1", "--d_ngram=1"], ["--window=1"], ["--warmup=0", "--cooldown=0"],
    ["--warmup=1", "--cooldown=1"], ["--learning_rate=0", "--adam_learning_rate=0"],
    ["--seed=0"], ["--seed=1000000000000"], ["--eval_bytes=1"], ["--log_interval=1000"],
    ["--sample_bytes=200"], ["--n_head=1", "--n_embd=2"], ["--eval_interval=1"]])
def test_the_ends_of_the_ranges_train(arguments, workdir):
    small_run("--out_dir=run", "--max_iters=2", *arguments)
    assert checkpoint("run/best.pt")["state"]["iter"] in (1, 2)


def test_bad_files_get_one_clear_line(workdir):
    small_run("--out_dir=run")
    good = Path("run/ckpt.pt").read_bytes()
    train_bin, meta = Path("data/tiny/train.bin"), Path("data/tiny/meta.json")
    ids, described = train_bin.read_bytes(), meta.read_bytes()
    base, resume = [*SMALL, "--out_dir=again"], ["--resume", "--out_dir=run", "--max_iters=20"]

    refused([*base, "--block_size=100000"], "block_size=100000: expected at most")
    refused([*resume, "--n_layer=2", "--seed=5"], "n_layer, seed differ from run/ckpt.pt")
    train_bin.write_bytes(ids[:-1])
    refused(base, f"train.bin: expected {len(ids)} bytes")
    train_bin.unlink()
    refused(base, f"train.bin: expected {len(ids)} bytes")
    train_bin.write_bytes(ids)
    meta.write_bytes(described[:50])
    refused(base, "data/tiny is damaged")
    meta.write_bytes(described.replace(b'"words"', b'"fixed:4"'))
    refused(resume, "data/tiny differs from the data of the checkpoint in its patcher")
    meta.write_bytes(json.dumps(json.loads(described) | {"vocab": ["a", ""]}).encode())
    refused(base, "data/tiny does not fit tokenizer=bytes")
    for other in b"[]", b'{"train": 1}', b"5":
        meta.write_bytes(other)
        refused(base, "data/tiny is damaged")
    meta.write_bytes(described)
    for bad in good[: len(good) // 2], b"", b"hello", good[:1000] + bytes(5000) + good[6000:]:
        Path("run/ckpt.pt").write_bytes(bad)
        refused(resume, "run/ckpt.pt is missing, damaged or of another program")
    assert_one_clear_line(run_script("train.py", *resume, cwd=workdir), "run/ckpt.pt is missing")
    torch.save({"weights": torch.zeros(3)}, "run/ckpt.pt")
    refused(resume, "run/ckpt.pt is missing, damaged or of another program")

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    torch.save({"model": Evil()}, "run/ckpt.pt")
    refused(resume, "run/ckpt.pt is missing, damaged or of another program")
    assert not Path("pwned").exists()
    Path("file").write_text("")
    done = run_script("train.py", *base, "--out_dir=file/run", cwd=workdir)
    assert_one_clear_line(done, "file/run")


# --- the machine ----------------------------------------------------------------------------------
def test_out_of_memory_says_what_to_do(monkeypatch):
    """What torch raises on a CPU, on a GPU, when another rank is gone and when a disk is full."""
    def gpu(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    def gone(*given):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Read error: Connection reset by peer")

    def full(*given):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . PytorchStreamWriter failed")

    def wrong(*given):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    memory = "halve --batch_size and double --grad_accum"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for fails, advice in [(lambda *given: torch.empty(2**50), memory), (gpu, memory),
                          (gone, "another rank has gone: start again with --resume"),
                          (full, "is the disk full?"), (wrong, None)]:
        monkeypatch.setattr(T, "train", fails)
        with pytest.raises(P.BadInput if advice else RuntimeError) as error:
            T.main()
        if advice:
            assert advice in str(error.value) and "\n" not in str(error.value)


def test_precision_is_asked_of_the_machine(workdir, monkeypatch, capfd):
    """bf16 where the processor has it, else fp32; the first line says which."""
    device = torch.device("cpu")
    for has, expected in [({}, "float32"), ({"avx512_bf16": True}, "bfloat16"),
                          ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
                          ({"avx512_f": True, "amx_bf16": False}, "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert str(T.choose_dtype(device)) == f"torch.{expected}"
    small_run("--out_dir=run", "--max_iters=2")
    assert "torch.float32" in capfd.readouterr().out
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert T.choose_dtype(device) == torch.float32


needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [STLM, GPT])
def test_compiled_equals_eager(kind, capfd):
    """torch.compile changes speed, not results (to rounding): the loss, gradients and names."""
    model, text = random_model(kind=kind, vocab_size=512), symbols(65)[None]
    x, y = text[:, :-1], text[:, 1:]

    def loss_and_gradients():
        model.zero_grad()
        loss = model(x, y)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    names, eager = list(model.state_dict()), loss_and_gradients()
    T.compile_model(model, lambda model, x, y: model(x, y), x, y)
    assert "compiled after" in capfd.readouterr().out
    assert all(p.grad is None for p in model.parameters())
    for a, b in zip(loss_and_gradients(), eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == names


@needs_compiler
@pytest.mark.slow
def test_compiled_run(workdir, capfd, monkeypatch):
    """A compiled run ends where an eager one does (to rounding), goes on bit for bit after
    --resume, and writes its sample."""
    monkeypatch.setattr(T, "choose_dtype", lambda device: torch.float32)  # bf16 rounds too much
    base = [*TINY, "--dataset=tiny", "--warmup=0", "--cooldown=0", "--eval_interval=3"]

    def run(*arguments):
        train(*arguments)
        printed = capfd.readouterr().out
        return float(printed.split(" val ")[-1].split()[0]), printed.count("compiled after")

    eager, compiled = run(*base, "--out_dir=eager", "--max_iters=6")
    assert not compiled
    bpb, compiled = run(*base, "--out_dir=whole", "--max_iters=6", "--compile")
    assert compiled and bpb == pytest.approx(eager, rel=1e-3)
    run(*base, "--out_dir=parts", "--max_iters=3", "--compile")
    assert run("--out_dir=parts", "--resume", "--max_iters=6") == (bpb, 1)
    assert_same_weights(weights("whole"), weights("parts"))
    assert weights("whole").keys() == weights("eager").keys()


@pytest.mark.slow
def test_no_compiler_is_one_line(workdir):
    cache = str(workdir / "cache")
    hidden = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": cache}
    arguments = [argument for argument in SMALL if argument != "--compile=false"]
    done = run_script("train.py", *arguments, "--out_dir=run", cwd=workdir, env=hidden)
    assert done.returncode == 0 and "on all" in done.stdout, done.stderr
    assert done.stdout.count("compile off: ") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("extra", [[], ["--grad_accum=2"], ["--model=gpt"]])
def test_gpu_compiled_run_equals_eager(workdir, extra, monkeypatch):
    """As CUDA graphs, too, with other sequences, another learning rate and evaluations between."""
    monkeypatch.setattr(T, "choose_dtype", lambda device: torch.float32)
    for compiled in "false", "true":
        train(*TINY, "--dataset=tiny", "--device=cuda", f"--out_dir={compiled}", "--max_iters=9",
              "--eval_interval=3", "--log_interval=1", f"--compile={compiled}", *extra)
    for a, b in zip(read_log("false"), read_log("true"), strict=True):
        assert a.keys() == b.keys() and a["iter"] == b["iter"]
        for key in {"train_bpb", "val_bpb"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3)


# --- README.md ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_readmes_hacks_work(tmp_path):
    """Every diff of "Four hacks" fits the files as they are, is small, and what it makes trains."""
    for name in "model.py", "train.py", "prepare.py":
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "mine.txt").write_bytes(prose(60_000))
    files = [*tmp_path.glob("*.py"), tmp_path / "config" / "quick.py"]
    original = {path: path.read_text() for path in files}
    readme = (ROOT / "README.md").read_text()
    hacks = readme.split("## Four hacks")[1].split("\n## ")[0].split("```diff\n")[1:]
    assert len(hacks) == 4

    def run(*command):
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for hack in hacks:
        for path, text in original.items():
            path.write_text(text)
        diff = hack.split("```")[0]
        for part in diff.split("--- ")[1:]:
            name, *lines = part.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] in " -")
            new = "\n".join(line[1:] for line in lines if line[:1] in " +")
            source = (tmp_path / name).read_text()
            assert source.count(old) == 1, old
            (tmp_path / name).write_text(source.replace(old, new))
        changed = sum(line[0] in "+-" for line in diff.splitlines() if line and line[:3] != "---")
        assert diff.count("--- ") <= 2 and changed <= 10
        patcher = re.findall(r"--patcher=\w+", hack)[:1]
        done = run("prepare.py", "mine.txt", "--name=mine", *patcher)
        assert done.returncode == 0, done.stderr
        done = run("train.py", "config/quick.py", "--dataset=mine", *patcher, "--block_size=64",
                   "--batch_size=4", "--max_minutes=0", "--max_iters=10", "--compile=false",
                   "--sample_bytes=9")
        assert done.returncode == 0 and "on all" in done.stdout, done.stderr
        shutil.rmtree(tmp_path / "out")
