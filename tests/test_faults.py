"""Nothing lost, nothing let in: real kills, full disks, damaged files and files and texts from strangers."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_clear_line, prose, random_model, run_script

import prepare as P
import sample as S
import train as T

RUN = [*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=600", "--eval_interval=20"]


def start(script, *arguments):
    return subprocess.Popen([sys.executable, str(ROOT / script), *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_20_moments(workdir):
    """SIGKILL while it trains, evaluates or saves: the next start goes on, and the end is the same bit for bit."""
    big = [*RUN, "--n_ngram=20000"]  # so that writing a checkpoint takes a while
    T.train(T.parse([*big, "--out_dir=whole"]))
    rng, reached, halfway = random.Random(0), 0, 0
    for kill in range(20):
        resume = ["--out_dir=run", "--resume"] if Path("run/ckpt.pt").exists() else big
        with start("train.py", *resume) as process:
            sign = "first step" if kill % 2 else " val "  # every other start gets as far as a checkpoint
            for line in process.stdout:
                if sign in line:
                    break
            if kill % 2:  # in the middle of writing a checkpoint
                while not Path("run/ckpt.pt.tmp").exists() and process.poll() is None:
                    pass
            else:
                time.sleep(rng.uniform(0, 0.4))
            process.kill()
        halfway += Path("run/ckpt.pt.tmp").exists()
        if Path("run/ckpt.pt").exists():
            now = T.load_checkpoint("run/ckpt.pt")["iter"]
            assert now >= reached and T.read_log(Path("run"))[-1]["iter"] <= now + 20  # one interval lost at most
            reached = now
    assert reached > 0 and halfway > 0
    T.train(T.parse(["--out_dir=run", "--resume"]))
    whole, parts = (T.load_checkpoint(f"{d}/ckpt.pt")["model"] for d in ("whole", "run"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.slow
def test_prepare_killed(workdir):
    """A killed prepare.py leaves the old data, whole, or no data; never a mixture."""
    Path("new.txt").write_bytes(prose(3_000_000))
    before = T.load_meta(Path("data/tiny"))["sha256"]
    rng, seen = random.Random(0), set()
    for _ in range(8):
        with start("prepare.py", "new.txt", "--name=tiny") as process:
            time.sleep(rng.uniform(0.2, 1.5))
            process.send_signal(signal.SIGKILL)
        if not Path("data/tiny/meta.json").exists():
            seen.add(None)
            continue
        meta = T.load_meta(Path("data/tiny"))
        seen.add(meta["sha256"] == before)
        T.Data(Path("data/tiny"), "train", meta, 64)  # refuses a file of another length
    assert seen


def test_full_disk(workdir):
    """A disk with room for the first checkpoint but not for the next: one line, and the first one is still good."""
    Path("small").mkdir()
    size = 1_300_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "small"], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        small_run = [*RUN, "--out_dir=small/run", "--max_iters=40"]
        done = run_script("train.py", *small_run, cwd=workdir)
        assert done.returncode == 0, done.stderr  # roomy enough
        kept = Path("small/run/ckpt.pt").read_bytes()
        free = Path("small/filler")
        with pytest.raises(OSError), open(free, "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        done = run_script("train.py", "--resume", "--out_dir=small/run", "--max_iters=80", cwd=workdir)
        assert_one_clear_line(done, "o space left")
        assert Path("small/run/ckpt.pt").read_bytes() == kept and not list(Path("small/run").glob("*.tmp"))
        free.unlink()
        done = run_script("train.py", "--resume", "--out_dir=small/run", "--max_iters=80", cwd=workdir)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "small"])


def test_read_only_disk(workdir):
    """A folder that cannot be written to: one line before any training, for train.py, prepare.py and sample.py --html."""
    T.train(T.parse([*RUN, "--max_iters=5"]))
    Path("fixed").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "fixed"], capture_output=True).returncode:
        pytest.skip("a read-only file system cannot be mounted here")
    try:
        for script, *arguments in [
            ("train.py", *RUN, "--out_dir=fixed/run"),
            ("prepare.py", "val.txt", "--data_dir=fixed/data"),
            ("sample.py", "--out_dir=run", "--score=abc", "--html=fixed/page.html"),
        ]:
            assert_one_clear_line(run_script(script, *arguments, cwd=workdir), "ead-only file system", "fixed/")
    finally:
        subprocess.run(["umount", "fixed"])


HIDE = """
import importlib.machinery, runpy, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in {names} else find(name, *rest))
sys.path.insert(0, {root!r})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(names, script, *arguments):
    argv = [str(ROOT / script), *arguments]
    source = HIDE.format(names=set(names), root=str(ROOT), argv=argv)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)


def test_missing_packages(workdir):
    """Without tqdm, matplotlib or tiktoken the main job runs, and one line names what is missing; others are refused."""
    optional = ["tqdm", "matplotlib", "tiktoken", "tokenizers", "huggingface_hub", "pyarrow"]
    done = run_without(optional, "prepare.py", "val.txt", "--name=bare")
    assert done.returncode == 0 and done.stdout.count("no progress bar: pip install tqdm") == 1, done.stderr
    done = run_without(optional, "train.py", *RUN, "--max_iters=3")
    assert done.returncode == 0 and done.stdout.count("no loss.png: pip install matplotlib") == 1, done.stderr
    done = run_without(["tiktoken"], "prepare.py", "val.txt", "--patcher=gpt2")
    assert_one_clear_line(done, "pip install tiktoken")
    meta = Path("data/tiny/meta.json")
    meta.write_text(meta.read_text().replace('"words"', '"gpt2"'))  # what is cut already needs no vocabulary
    done = run_without(["tiktoken"], "train.py", *RUN, "--max_iters=3", "--out_dir=out/cut")
    assert done.returncode == 0, done.stderr
    done = run_without(["tokenizers"], "prepare.py", "val.txt", "--tokenizer=bpe:300")
    assert_one_clear_line(done, "pip install tokenizers")
    done = run_without(["huggingface_hub"], "prepare.py", "tinystories")
    assert_one_clear_line(done, "pip install huggingface_hub")


def test_no_fast_bf16(workdir):
    """A processor that multiplies bf16 slowly, as oneDNN makes of this one: the run says fp32 and trains."""
    slow = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = run_script("train.py", *RUN, "--max_iters=3", cwd=workdir, env=slow)
    assert done.returncode == 0 and "threads: fp32, matmul peak" in done.stdout, done.stderr


def test_paths_with_spaces_from_another_folder(workdir):
    """The project in a folder with a space, a config with Windows line endings, out_dir with a space, run from elsewhere."""
    home = workdir / "my models" / "stlm"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "data", "out"))
    config = home / "config" / "my own.py"
    lines = ['dataset = "tiny"', 'out_dir = "out/a run"', "max_iters = 5", "n_layer = 1", "n_ngram = 160",
             "compile = False", "eval_bytes = 1000", "sample_bytes = 20"]
    config.write_bytes("\r\n".join(lines).encode())
    for arguments in ([home / "train.py", config], [home / "sample.py", "--out_dir=out/a run", "--prompt=the ", "--seed=1"]):
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=workdir)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ") and Path("out/a run/best.pt").exists()


def mutations(good, n, seed=0):
    """n damaged copies of good: bits flipped, parts cut off, doubled or overwritten."""
    rng = random.Random(seed)
    for _ in range(n):
        data, at = bytearray(good), rng.randrange(len(good))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + rng.randrange(1, 100)] = rng.randbytes(rng.randrange(100))
        else:
            data[at:at] = data[: rng.randrange(1, 1000)]
        yield bytes(data)


def test_1000_damaged_checkpoints(workdir):
    """Each is refused in one line, or loads exactly what was saved."""
    T.train(T.parse([*RUN, "--max_iters=2"]))
    good = Path("run/ckpt.pt").read_bytes()
    saved = T.load_checkpoint("run/ckpt.pt")["model"]
    refused = 0
    for data in mutations(good, 1000):
        Path("run/bad.pt").write_bytes(data)
        try:
            loaded = T.load_checkpoint("run/bad.pt")["model"]
        except P.BadInput as error:
            refused += "\n" not in str(error)
        else:
            refused += all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert refused == 1000


def test_checkpoints_that_claim_too_much(workdir):
    """Sizes that the weights do not have are refused before memory is taken for them."""
    T.train(T.parse([*RUN, "--max_iters=2"]))
    good = torch.load("run/ckpt.pt", weights_only=True)
    for key in ("n_embd", "d_byte", "n_layer", "n_encoder", "n_decoder", "n_ngram", "d_ngram", "block_size", "max_patches"):
        for value in (10**9, 2**62, -1, "9", None, 1e9):
            torch.save(good | {"config": good["config"] | {key: value}}, "run/bad.pt")
            with pytest.raises(P.BadInput, match="damaged or not a checkpoint"):
                S.load("run/bad.pt")
    torch.save(good | {"meta": good["meta"] | {"vocab": ["a"] * 10**6}}, "run/bad.pt")
    assert S.load("run/bad.pt")  # an STLM has no use for it


def test_1000_damaged_data_files(workdir):
    """A damaged meta.json or train.bin gives one line, or every row still holds known symbols."""
    folder = Path("data/tiny")
    for name in ("meta.json", "train.bin"):
        good = (folder / name).read_bytes()
        for data in mutations(good, 500):
            (folder / name).write_bytes(data)
            try:
                meta = T.load_meta(folder)
                rows = T.Data(folder, "train", meta, 64)
                for x, y in rows.scoring_batches(64):
                    assert x.max() < 512 and y.max() < 512
            except P.BadInput as error:
                assert "\n" not in str(error)
        (folder / name).write_bytes(good)


def strange_texts(n, seed=0):
    """n strings of bytes: every value, broken UTF-8, NULs, only spaces or newlines, right-to-left, emoji, CJK."""
    rng = random.Random(seed)
    alphabets = ["\0", " ", "\n", " \n\t\r", "אבגד ", "😀👩‍👩‍👧", "日本語の文章。", "abc de", "\x1b[31m\x07", "\u202e\u200b\ufeff"]
    for i in range(n):
        length = rng.randrange(1, 60)
        if i % 3 == 0:
            yield rng.randbytes(length)
        elif i % 3 == 1:
            yield "".join(rng.choices(rng.choice(alphabets), k=length)).encode()
        else:
            yield "".join(rng.choices("".join(alphabets), k=length)).encode()[: length]  # may end inside a character


def test_10000_strange_texts_come_back(gpt2):
    for text in [*strange_texts(10_000), b"x" * 1_000_000, b" " * 1_000_000, b"\n" * 1_000_000]:
        for patcher in ("words", "gpt2", "fixed:3") if len(text) < 100 else ("words", "fixed:3"):
            assert P.decode(P.encode(text, patcher)) == text
        if len(text) < 100:
            assert P.detokenize(P.tokenize(text, gpt2), gpt2) == text


@pytest.mark.slow
@torch.no_grad()
def test_10000_strange_texts_are_scored_and_gone_on_from():
    """Finite bits for every byte; nothing that a terminal would obey; a page whose only tags are ours."""
    model = random_model(n_layer=1)
    model.text = {"patcher": "words", "vocab": None}
    for i, text in enumerate(strange_texts(10_000)):
        bits, ends = S.score(model, text)
        assert len(bits) == len(ends) == len(text) and np.isfinite(bits).all()
        if i % 10 == 0:
            written = P.printable(S.write(model, text, max_new_bytes=5, seed=i))
            shown = "".join(c for c, _, _ in S.characters(text, bits, ends))
            assert all(c == "\n" or c == "\t" or c.isprintable() for c in written + shown)
            n_characters = len(text.decode("utf-8", "surrogateescape"))
            assert S.paint_html(text, bits, ends).count("<") == 2 * n_characters + S.PAGE.count("<")


def test_nan_stops_before_a_checkpoint(workdir):
    """A weight that becomes NaN: the line names it, and the last checkpoint is from before."""
    T.train(T.parse([*RUN, "--max_iters=20"]))
    checkpoint = torch.load("run/ckpt.pt", weights_only=True)
    checkpoint["model"]["up.weight"][0, 0] = float("nan")
    T.save(Path("run/ckpt.pt"), checkpoint)
    before = Path("run/ckpt.pt").read_bytes()
    with pytest.raises(P.BadInput, match=r"\w+ is no longer finite at iteration \d+: try lower learning rates"):
        T.train(T.parse(["--out_dir=run", "--resume", "--max_iters=60"]))
    assert Path("run/ckpt.pt").read_bytes() == before


def test_nan_in_a_gradient_is_named(workdir, monkeypatch):
    """At the 33rd step one gradient is NaN: the line names that weight alone, and the checkpoint is from step 20."""
    build, steps = T.build_model, []

    def build_with_fault(config, vocab):
        def fault(grad):
            steps.append(1)
            return grad * float("nan") if len(steps) == 33 else grad

        model = build(config, vocab)
        if model.wte.weight.device.type == "cpu":
            model.get_parameter("blocks.0.mlp.up.weight").register_hook(fault)
        return model

    monkeypatch.setattr(T, "build_model", build_with_fault)
    with pytest.raises(P.BadInput, match=r"^blocks.0.mlp.up.weight is no longer finite at iteration 33: try lower"):
        T.train(T.parse(RUN))
    checkpoint = T.load_checkpoint("run/ckpt.pt")
    assert checkpoint["iter"] == 20 and all(w.isfinite().all() for w in checkpoint["model"].values())


def start_ranks(n, *arguments):
    """n processes of one distributed run, as torchrun starts them on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(ROOT / "train.py"), *arguments, "--device=cpu"]
    return [subprocess.Popen(command, env=fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(workdir, victim):
    """One rank is killed: the other says so and ends within a minute, and one rank alone can go on."""
    ranks = start_ranks(2, *RUN, "--max_iters=100000")
    for line in ranks[0].stdout:
        if line.startswith("iter    40  val"):
            break
    ranks[victim].kill()
    left = ranks[1 - victim]
    _, stderr = left.communicate(timeout=60)
    ranks[victim].communicate()
    said = [line for line in stderr.splitlines() if line.startswith("train.py: ")]
    assert left.returncode == 2 and "Traceback" not in stderr, stderr
    assert len(said) == 1 and f"rank {1 - victim} stops: another rank has gone" in said[0] and "--resume" in said[0]
    now = T.load_checkpoint("run/ckpt.pt")["iter"]
    assert now >= 40
    T.train(T.parse(["--out_dir=run", "--resume", f"--max_iters={now + 5}"]))
    assert T.load_checkpoint("run/ckpt.pt")["iter"] == now + 5


def test_resume_with_another_number_of_ranks(workdir):
    """One rank, then two, then one: every part goes on from the last, and the loss keeps falling."""
    T.train(T.parse([*RUN, "--max_iters=40"]))
    ranks = start_ranks(2, "--out_dir=run", "--resume", "--max_iters=60")
    for rank in ranks:
        _, stderr = rank.communicate(timeout=120)
        assert rank.returncode == 0, stderr
    T.train(T.parse(["--out_dir=run", "--resume", "--max_iters=80"]))
    val = {e["iter"]: e["val_bpb"] for e in T.read_log(Path("run")) if "val_bpb" in e}
    assert list(val) == [20, 40, 60, 80] and val[80] < val[40] < val[20]


def test_ranks_read_disjoint_windows(workdir):
    """Over an epoch, two ranks together read every window once."""
    meta = T.load_meta(Path("data/tiny"))
    data = T.Data(Path("data/tiny"), "train", meta, 64)
    per_epoch, batch = len(data.ids) // 64 - 1, 4
    rows = []
    for it in range(per_epoch // (2 * batch)):
        for rank in range(2):
            x, _ = data.training_rows((it * 2 + rank) * batch, batch, seed=3)
            rows += [row.numpy().tobytes() for row in x]
    order, offset = T.epoch_order(per_epoch, 64, 3, 0)
    whole = [np.asarray(data.ids[offset + w * 64 : offset + w * 64 + 64]).astype(np.int64).tobytes() for w in order]
    assert rows == whole[: len(rows)] and len(set(order.tolist())) == per_epoch


def test_same_seed_same_log(workdir):
    logs = []
    for out in "a", "b":
        T.train(T.parse([*RUN, f"--out_dir={out}", "--max_iters=20"]))
        entries = [json.loads(line) for line in open(f"{out}/log.jsonl")]
        logs.append([{k: e[k] for k in ("iter", "bytes", "train_bpb", "val_bpb") if k in e} for e in entries])
    assert logs[0] == logs[1]
