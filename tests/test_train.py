"""train.py's promises: exact resume, ranks that add up, the true score, and one clear line for bad input."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_one_clear_line, prose, random_model, read_bin, run_script, symbols

import prepare as P
import train as T
from model import GPT, STLM, STLMConfig, likeliest


def weights(out_dir):
    return T.load_checkpoint(f"{out_dir}/ckpt.pt")["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small_run(*more):
    T.train(T.parse([*TINY, "--dataset=tiny", "--max_iters=12", "--eval_interval=6", *more]))


@pytest.mark.parametrize("extra", [[], ["--dropout=0.2", "--grad_accum=2"]])
def test_resumed_equals_uninterrupted(workdir, extra):
    small_run("--out_dir=whole", *extra)
    # stop at iteration 6 as a crash would, by keeping only that checkpoint
    kept = {}
    original = T.save

    def keep_sixth(path, checkpoint):
        original(path, checkpoint)
        if checkpoint["iter"] == 6:
            kept["file"] = Path(path).read_bytes()

    T.save = keep_sixth
    try:
        small_run("--out_dir=parts", *extra)
    finally:
        T.save = original
    Path("parts/ckpt.pt").write_bytes(kept["file"])
    T.train(T.parse(["--out_dir=parts", "--resume"]))
    assert_same_weights(weights("whole"), weights("parts"))
    logs = [[json.loads(line) for line in open(f"{d}/log.jsonl")] for d in ("whole", "parts")]
    for key in ("val_bpb", "train_bpb"):
        assert [e[key] for e in logs[0] if key in e and e["iter"] > 10] == [e[key] for e in logs[1] if key in e and e["iter"] > 10]


def test_sigterm_saves_and_resume_goes_on(workdir):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("iter    20"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    stopped = T.load_checkpoint("run/ckpt.pt")["iter"]
    assert 20 <= stopped < 4000
    T.train(T.parse(["--out_dir=run", "--resume", f"--max_iters={stopped + 3}"]))
    assert T.load_checkpoint("run/ckpt.pt")["iter"] == stopped + 3


def test_two_ranks_equal_one_with_twice_the_batch(workdir):
    common = [*TINY, "--dataset=tiny", "--max_iters=6", "--log_interval=1", "--device=cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    fp32 = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}  # without fast bf16, so sums differ less
    command = [*torchrun, str(ROOT / "train.py"), *common, "--out_dir=two", "--batch_size=4"]
    done = subprocess.run(command, capture_output=True, text=True, env=fp32)
    assert done.returncode == 0 and ": fp32" in done.stdout, done.stderr
    done = run_script("train.py", *common, "--out_dir=one", "--batch_size=8", cwd=".", env=fp32)
    assert done.returncode == 0, done.stderr
    logs = [[json.loads(line) for line in open(f"{d}/log.jsonl")] for d in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["iter"] == b["iter"]
        for key in ("train_bpb", "val_bpb"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4)
    one, two = weights("one"), weights("two")
    for name in one:  # Muon orthogonalises in bf16
        assert (one[name] - two[name]).norm() < 0.05 * one[name].norm() + 1e-4, name


def test_windows_are_visited_once_an_epoch_and_apart_between_ranks(workdir):
    meta = T.load_meta(Path("data/tiny"))
    data = T.Data(Path("data/tiny"), "train", meta, 64)
    data.ids = np.arange(len(data.ids)) % 500  # each window is known by where it starts
    per_epoch = len(data.ids) // 64 - 1
    T.epoch_order.cache_clear()
    for epoch in (0, 1):
        order, offset = T.epoch_order(per_epoch, 64, 7, epoch)
        assert sorted(order) == list(range(per_epoch)) and 0 <= offset < 64
        assert offset + per_epoch * 64 + 1 <= len(data.ids)
        rows = [data.training_rows(epoch * per_epoch + i, 1, 7) for i in range(per_epoch)]
        for (x, y), w in zip(rows, order):
            start = offset + w * 64
            assert x[0].tolist() == data.ids[start : start + 64].tolist()
            assert y[0].tolist() == data.ids[start + 1 : start + 65].tolist()
    assert list(T.epoch_order(per_epoch, 64, 7, 0)[0]) != list(T.epoch_order(per_epoch, 64, 7, 1)[0])
    # what train() asks for: rank r of 2 takes rows (2 * it + r) * B to + B, so that both together cover the sequence
    together = torch.cat([data.training_rows((2 * it + r) * 4, 4, 7)[0] for it in range(3) for r in range(2)])
    assert torch.equal(together, data.training_rows(0, 24, 7)[0])


@pytest.mark.parametrize("block_size", [32, 50, 64])
def test_bits_per_byte_by_hand(workdir, block_size):
    """A model that gives every symbol 1/512 needs 9 bits a symbol, the separators' included; only text counts below."""
    meta = T.load_meta(Path("data/tiny"))
    data = T.Data(Path("data/tiny"), "val", meta, block_size)
    model = STLM(STLMConfig(block_size=block_size, max_patches=16, n_layer=1, n_head=2, n_embd=32, d_byte=16))
    torch.nn.init.zeros_(model.wte.weight)
    n_bytes = len(Path("val.txt").read_bytes())
    by_hand = 9 * (n_bytes + 1) / n_bytes
    for batch_size in (1, 7):
        assert T.evaluate(model, data, batch_size, "cpu", T.nullcontext()) == pytest.approx(by_hand, rel=1e-6)
    shares = [list(data.scoring_batches(3, None, rank, 3)) for rank in range(3)]  # ranks share the windows out
    assert sum(int((y >= 0).sum()) for share in shares for _, y in share) == n_bytes + 1


def test_bits_per_byte_of_tokens_by_hand(workdir, gpt2):
    folder = P.prepare(["texts"], tokenizer="gpt2", val="val.txt")
    meta = T.load_meta(folder)
    model = GPT(STLMConfig(block_size=32, n_layer=1, n_head=2, n_embd=8), len(meta["vocab"]))
    torch.nn.init.zeros_(model.wte.weight)
    text = Path("val.txt").read_bytes()
    n_tokens = len(tiktoken.get_encoding("gpt2").encode_ordinary(text.decode())) + 1
    by_hand = n_tokens * math.log2(50257) / len(text)
    assert len(meta["vocab"]) == 50257
    assert T.evaluate(model, T.Data(folder, "val", meta, 32), 4, "cpu", T.nullcontext()) == pytest.approx(by_hand, rel=1e-5)


def test_evaluation_scores_every_symbol_in_its_context(workdir):
    """The windows of evaluate() give each symbol the loss that the model gives it after the window so far."""
    meta = T.load_meta(Path("data/tiny"))
    data, model = T.Data(Path("data/tiny"), "val", meta, 64), random_model()
    ids = torch.from_numpy(np.concatenate([[P.SEPARATOR], read_bin("data/tiny/val.bin")]).astype(np.int64))
    with torch.no_grad():
        windows = [(ids[i : i + 64], ids[i + 1 : i + 65]) for i in range(0, len(ids) - 1, 64)]
        nats = sum(F.cross_entropy(model(x[None, : len(y)])[0][0], y, reduction="sum").item() for x, y in windows)
    expected = nats / math.log(2) / len(Path("val.txt").read_bytes())
    assert T.evaluate(model, data, 5, "cpu", T.nullcontext()) == pytest.approx(expected, rel=1e-5)


def test_every_parameter_in_exactly_one_optimizer():
    for model in (STLM(STLMConfig()), GPT(STLMConfig(), 100)):
        held = [p for o in T.make_optimizers(model, T.Config()) for g in o.param_groups for p in g["params"]]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_muon_takes_the_steps_of_torch(monkeypatch):
    """Three steps on matrices of several shapes: with its iterations what torch.optim.Muon does, to the rounding of bf16."""
    torch.manual_seed(0)
    x = T.orthogonal(torch.randn(2, 5, 9))  # with our own
    assert ((torch.linalg.svdvals(x) - 1).abs() < 0.3).all()
    monkeypatch.setattr(T, "ITERATIONS", [(3.4445, -4.775, 2.0315)] * 5)
    shapes = [(12, 8), (8, 12), (8, 12), (6, 6)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)))
                     for i, s in enumerate(shapes)] for _ in range(2))
    exact = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [T.Muon(ours, 0.1, weight_decay=0.1), T.Muon(exact, 0.1, weight_decay=0.1, dtype=torch.float32),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95)]
    for _ in range(3):
        for a, b, c in zip(ours, exact, theirs):
            a.grad = torch.randn_like(a)
            b.grad, c.grad = a.grad.clone(), a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, exact, theirs):
        assert torch.allclose(a, c, atol=4e-3) and torch.allclose(b, c, atol=2e-2)


def test_schedule():
    cfg = T.Config(warmup=0.1, cooldown=0.5)
    assert [T.lr_scale(p, cfg) for p in (0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.2)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])


def test_room_for_patches():
    meta = {"train": {"bytes_per_patch": 5.2}}
    room = lambda **keys: T.patches_a_row(T.Config(**{"block_size": 2048, "max_patches": 0} | keys), meta)
    assert room() == 452  # 15% more than the average
    assert room(window=64) == 7 * 64  # near that whole chunks of attention
    assert room(window=64, block_size=1024) == 226 and room(window=300) == 452  # far from it
    assert room(window=64, max_patches=50) == 50


def test_learning_works(workdir):
    """120 steps on repetitive text: far better than the 9 bits of no knowledge, and better than the bytes' frequencies."""
    T.train(T.parse([*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=120", "--eval_interval=60", "--sample_bytes=0",
                     "--learning_rate=0.02"]))
    entries = [json.loads(line) for line in open("run/log.jsonl")]
    counts = np.bincount(np.frombuffer(Path("val.txt").read_bytes(), np.uint8))
    p = counts[counts > 0] / counts.sum()
    final = [e["val_bpb"] for e in entries if "val_bpb" in e][-1]
    assert final < 0.75 * -(p * np.log2(p)).sum()
    assert Path("run/loss.png").exists() or not shutil.which("matplotlib")


def test_rival_trains_and_finetune_starts_from_a_checkpoint(workdir, gpt2):
    P.prepare(["texts"], name="tiny", tokenizer="gpt2", val="val.txt")
    small_run("--out_dir=rival", "--model=gpt", "--dataset=tiny", "--tokenizer=gpt2", "--n_embd=16")
    assert weights("rival")["wte.weight"].shape == (50257, 16)
    small_run("--out_dir=base")
    older = torch.load("base/ckpt.pt")
    del older["config"]["window"]  # a key younger than the checkpoint
    torch.save(older, "base/ckpt.pt")
    T.train(T.parse(["--init_from=base/ckpt.pt", "--dataset=tiny", "--out_dir=tuned", "--max_iters=1", "--warmup=0.5", "--compile=false"]))
    assert_same_weights(weights("base"), weights("tuned"))  # one step of warmup from zero moves nothing


def test_log_to_tensorboard(workdir):
    """The same keys and numbers as log.jsonl."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    small_run("--out_dir=run", "--log=tensorboard")
    events = accumulator.EventAccumulator("run")
    events.Reload()
    for key in "train_bpb", "val_bpb", "bytes", "mfu":
        logged = [(e["iter"], e[key]) for e in T.read_log(Path("run")) if key in e]
        seen = {e.step: e.value for e in events.Scalars(key)}
        assert logged and all(seen[it] == pytest.approx(value, rel=1e-5) for it, value in logged)


def test_log_to_wandb_without_a_network(workdir, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = run_script("train.py", *TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=10", "--log=wandb", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert list(Path("run/wandb").glob("offline-run-*/*.wandb"))


def test_an_earlier_run_is_set_aside(workdir):
    small_run("--out_dir=run")
    first = weights("run")
    small_run("--out_dir=run", "--seed=1")
    assert_same_weights(weights("run.old"), first)


def test_two_runs_in_one_folder(workdir):
    """A folder that another process writes to is refused, whether to start there or to resume; then it is free again."""
    small_run("--out_dir=run")
    command = [sys.executable, "-c", "import time, train; from pathlib import Path; held = train.lock(Path('run')); "
               "print('held', flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        other.stdout.readline()
        for start in (lambda: small_run("--out_dir=run"), lambda: T.train(T.parse(["--out_dir=run", "--resume"]))):
            with pytest.raises(P.BadInput, match="another run is writing to run"):
                start()
        other.kill()
    small_run("--out_dir=run", "--seed=1")
    assert Path("run.old/ckpt.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(workdir):
    done = run_script("train.py", *TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=50", "--eval_interval=5",
                      "--adam_learning_rate=1e38", "--warmup=0.5", cwd=".")
    assert_one_clear_line(done, "is no longer finite at iteration", "try lower learning rates")
    if Path("run/ckpt.pt").exists():
        assert all(t.isfinite().all() for t in weights("run").values())


def test_config_files_and_keys(tmp_path):
    config = tmp_path / "with space.py"
    config.write_bytes(b'import math\r\n_hidden = 1\r\nlearning_rate = 1\r\nout_dir = "a=b"\r\nmax_iters = 5_000\r\n')
    given = T.parse([str(config), "--max_iters=7_0", "--compile=False", "--out_dir=c=d", "--resume"])
    assert given == {"learning_rate": 1.0, "out_dir": "c=d", "max_iters": 70, "compile": False, "resume": True}
    assert type(given["learning_rate"]) is float


def test_help_lists_every_key():
    done = run_script("train.py", "--help", cwd=".")
    for key in T.Config.__dataclass_fields__:
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"  --{key}="))
        assert len(line.split(None, 1)[1]) > 5  # with its line of explanation


def test_bad_keys_get_one_clear_line(tmp_path):
    (tmp_path / "typo.py").write_text("learning_rte = 0.1\n")
    (tmp_path / "type.py").write_text('n_layer = "four"\n')
    (tmp_path / "broken.py").write_text("n_layer = = 4\n")
    for arguments, expected in [
        (["typo.py"], "typo.py: unknown key learning_rte; did you mean learning_rate?"),
        (["--n_layers=3"], "did you mean n_layer?"),
        (["type.py"], "type.py: n_layer='four' is not of type int"),
        (["broken.py"], "broken.py: SyntaxError"),
        (["missing.py"], "no config file missing.py"),
        (["--n_layer=2.5"], "n_layer=2.5 is not of type int"),
        (["--compile=maybe"], "not of type bool"),
        (["--learning_rate"], "expected --key=value"),
        (["--n_embd=100", "--n_head=3"], "expected a multiple of 2 * n_head"),
        (["--n_layer=0"], "expected at least 1"),
        (["--max_iters=0"], "a run needs an end"),
        (["--model=bert"], "expected stlm or gpt"),
        (["--log=paper"], "expected tensorboard or wandb"),
        (["--dataset=nothing"], "no dataset in data/nothing"),
        (["--device=quantum"], "--device=quantum does not work here"),
        (["--resume", "--out_dir=none"], "no checkpoint none/ckpt.pt"),
    ]:
        assert_one_clear_line(run_script("train.py", *arguments, cwd=tmp_path), expected)


def test_bad_files_get_one_clear_line(workdir):
    small_run("--out_dir=run")
    good = Path("run/ckpt.pt").read_bytes()
    train, meta = Path("data/tiny/train.bin"), Path("data/tiny/meta.json")
    symbols, described = train.read_bytes(), meta.read_bytes()
    base = [*TINY, "--dataset=tiny", "--out_dir=again", "--max_iters=3"]

    def refused(arguments, *expected):
        assert_one_clear_line(run_script("train.py", *arguments, cwd=workdir), *expected)

    refused([*base, "--block_size=100000"], "block_size=100000 is too long")
    refused(["--resume", "--out_dir=run", "--n_layer=2", "--seed=5"], "n_layer, seed differ")
    train.write_bytes(symbols[:-1])
    refused(base, "train.bin is not the file that prepare.py wrote")
    train.write_bytes(b"\xff\xff" * (len(symbols) // 2))
    refused(base, "train.bin is corrupt: it holds 65535")
    train.write_bytes(symbols)
    meta.write_bytes(described[:50])
    refused(base, "data/tiny is damaged")
    meta.write_bytes(described.replace(b'"words"', b'"fixed:4"'))
    refused(["--resume", "--out_dir=run", "--max_iters=20"], "cut with fixed:4, the checkpoint with words")
    meta.write_bytes(described)
    for bad in (good[: len(good) // 2], b"", b"hello", good[:1000] + bytes(5000) + good[6000:]):
        Path("run/ckpt.pt").write_bytes(bad)
        refused(["--resume", "--out_dir=run", "--max_iters=20"], "run/ckpt.pt is damaged or not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, "run/ckpt.pt")
    refused(["--resume", "--out_dir=run"], "not a checkpoint of this project")

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    torch.save({"model": Evil()}, "run/ckpt.pt")
    refused(["--resume", "--out_dir=run"], "not a checkpoint of this project")
    assert not Path("pwned").exists()
    Path("file").write_text("")
    refused([*base, "--out_dir=file/run"], "file/run")


def test_compiled_equals_eager(workdir):
    """torch.compile changes speed, not results (to rounding); where there is no compiler one line says so."""
    if T.why_no_compile("cpu"):
        pytest.skip(f"torch.compile does not work here: {T.why_no_compile('cpu')}")
    torch.manual_seed(0)
    model, x = random_model(), symbols(65)[None]
    with torch.no_grad():
        eager = model(x[:, :-1], x[:, 1:])[1].item()
        T.compile_blocks(model)
        assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(eager, rel=1e-4)
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_compiled_run(workdir, capfd, monkeypatch):
    """A compiled run ends where an eager one does (to rounding), and goes on bit for bit. Only its very first step is not
    compiled."""
    if T.why_no_compile("cpu"):
        pytest.skip(f"torch.compile does not work here: {T.why_no_compile('cpu')}")
    monkeypatch.setattr(T, "choose_precision", lambda device: (T.nullcontext(), "fp32", 1e11))  # in bf16 roundings are large
    base = [*TINY, "--dataset=tiny", "--warmup=0", "--cooldown=0", "--sample_bytes=0"]

    def run(out, *arguments):
        T.train(T.parse([*arguments, f"--out_dir={out}"]))
        printed = capfd.readouterr().out
        return float(printed.split(" val ")[-1].split()[0]), printed.count("first step after"), printed.count("compiled after")

    eager, *told = run("eager", *base, "--max_iters=6")
    assert told == [1, 0]
    bpb, *told = run("whole", *base, "--max_iters=6", "--compile")
    assert told == [1, 1] and bpb == pytest.approx(eager, rel=1e-4)
    run("parts", *base, "--max_iters=3", "--compile")
    assert run("parts", "--resume", "--max_iters=6") == (bpb, 1, 0)
    assert_same_weights(weights("whole"), weights("parts"))
    assert weights("whole").keys() == weights("eager").keys()


def test_no_compiler_is_one_line(workdir):
    hidden = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(workdir / "cache")}
    arguments = [a for a in TINY if a != "--compile=false"]
    done = run_script("train.py", *arguments, "--dataset=tiny", "--out_dir=run", "--max_iters=3", cwd=workdir, env=hidden)
    assert done.returncode == 0, done.stderr
    assert "compile off: " in done.stdout and "no-such-compiler" in done.stdout + done.stderr


def test_the_readmes_hacks_work(tmp_path):
    """Every diff of the README's "Five hacks" fits the files as they are, is small, and what it makes trains."""
    for name in ("model.py", "train.py", "prepare.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "mine.txt").write_bytes(prose(60_000))
    original = {path: path.read_text() for path in (*tmp_path.glob("*.py"), tmp_path / "config" / "quick.py")}
    hacks = (ROOT / "README.md").read_text().split("## Five hacks")[1].split("\n## ")[0].split("```diff\n")[1:]
    assert len(hacks) == 5
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
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
        assert diff.count("--- ") <= 2 and sum(line[0] in "+-" for line in diff.splitlines() if line[:3] != "---") <= 10
        patcher = re.findall(r"--patcher=\w+", hack)[:1]
        done = run("prepare.py", "mine.txt", "--name=mine", *patcher)
        assert done.returncode == 0, done.stderr
        done = run("train.py", "config/quick.py", "--dataset=mine", *patcher, "--block_size=64", "--batch_size=4",
                   "--max_minutes=0", "--max_iters=10", "--compile=false", "--sample_bytes=9")
        assert done.returncode == 0 and "on all" in done.stdout, done.stderr
        shutil.rmtree(tmp_path / "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_steps_as_a_graph_equal_steps():
    """A recorded step does what a step does: with new rows, a new learning rate, and after an evaluation in between."""
    cfg = T.Config(block_size=64, max_patches=40, n_layer=2, n_head=2, n_embd=32, d_byte=16, n_ngram=160)
    rows = [(torch.randint(512, (4, 64), device="cuda"), torch.randint(512, (4, 64), device="cuda")) for _ in range(9)]
    losses = []
    for graph in False, True:
        torch.manual_seed(0)
        model = T.build_model(asdict(cfg), None).cuda()
        step = T.make_step(model, T.make_optimizers(model, cfg), nullcontext(), graph)
        losses.append([])
        for i, batch in enumerate(rows):
            losses[-1].append(step([batch], 0.1 + i / 10).item())
            with torch.no_grad():
                model(*rows[0], reduction="sum")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[0][::-1], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_likeliest_symbols():
    """Found by one maximum after the other, they are those that topk() finds."""
    logits = torch.randn(50, 512, device="cuda").bfloat16()
    values = [logits.gather(1, f(logits)).sort().values for f in (likeliest, torch.compile(likeliest))]
    assert torch.equal(*values)
