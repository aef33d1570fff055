"""Nothing lost, nothing let in: real kills, full disks, damaged files, and files and texts from
strangers."""
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import (ROOT, TINY, assert_one_clear_line, prose, random_model, read_log, run_script)

import prepare as P
import sample as S
import train as T

RUN = [*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=600", "--eval_interval=20"]


def train(*arguments):
    T.train(*T.parse(arguments))


def checkpoint(path):
    return T.load_checkpoint(path)[1]


def start(script, *arguments):
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# --- killed ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_at_12_moments(workdir):
    """SIGKILL while it trains, evaluates or saves: the next start goes on, loses one interval at
    most, and the end is the same bit for bit."""
    big = [*RUN, "--n_ngram=20000", "--max_iters=500"]  # so that writing a checkpoint takes a while
    train(*big, "--out_dir=whole")
    rng, reached, halfway = random.Random(0), 0, 0
    for kill in range(12):
        with start("train.py", *big, *["--resume"] * Path("run/ckpt.pt").exists()) as process:
            n_seen = 0  # evaluations; the first is of the state that it goes on from
            for line in process.stdout:
                n_seen += " val " in line
                if "to train on" in line if kill % 2 else n_seen == 2:
                    break
            if kill % 2:  # in the middle of writing a checkpoint
                while not Path("run/ckpt.pt.unfinished").exists() and process.poll() is None:
                    pass
            else:
                time.sleep(rng.uniform(0, 0.4))
            process.kill()
        halfway += Path("run/ckpt.pt.unfinished").exists()
        if Path("run/ckpt.pt").exists():
            now = checkpoint("run/ckpt.pt")["state"]["iter"]
            whole_lines = Path("run/log.jsonl").read_text().split("\n")[:-1]
            assert now >= reached and json.loads(whole_lines[-1])["iter"] <= now + 20
            reached = now
    assert reached >= 40 and halfway > 0
    train(*big, "--resume")
    whole, parts = (checkpoint(f"{out}/ckpt.pt")["model"] for out in ("whole", "run"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    scores = [[(e["iter"], e["val_bpb"]) for e in read_log(out) if "val_bpb" in e]
              for out in ("whole", "run")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_prepare_killed(workdir):
    """A killed prepare.py leaves the old data, whole, or no data; never a mixture."""
    Path("new.txt").write_bytes(prose(30_000) * 100)
    before = T.load_meta(Path("data/tiny"))["sha256"]
    rng, seen = random.Random(0), set()
    for _ in range(8):
        with start("prepare.py", "new.txt", "--name=tiny") as process:
            time.sleep(rng.uniform(0.2, 1.5))
            process.kill()
        if not Path("data/tiny/meta.json").exists():
            seen.add(None)
            continue
        meta = T.load_meta(Path("data/tiny"))
        seen.add(meta["sha256"] == before)
        T.Data(Path("data/tiny"), "train", meta, 64)  # refuses a file of another length
    assert seen


# --- disks ----------------------------------------------------------------------------------------
@contextmanager
def mounted(folder, options):
    """A file system of its own in a new folder."""
    Path(folder).mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder])


def test_full_disk(workdir):
    """A disk with room for the first checkpoint but not for the next: one line, and the first one
    is still good."""
    with mounted("small", "size=2200000"):
        small_run = [*RUN, "--out_dir=small/run", "--max_iters=40"]
        done = run_script("train.py", *small_run, cwd=workdir)
        assert done.returncode == 0, done.stderr  # roomy enough
        kept, filler = Path("small/run/ckpt.pt").read_bytes(), Path("small/filler")
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        resume = ["--resume", "--out_dir=small/run", "--max_iters=80"]
        done = run_script("train.py", *resume, cwd=workdir)
        assert_one_clear_line(done)
        assert "o space left" in done.stderr or "is the disk full?" in done.stderr
        assert Path("small/run/ckpt.pt").read_bytes() == kept
        assert not list(Path("small/run").glob("*.unfinished"))
        filler.unlink()
        done = run_script("train.py", *resume, cwd=workdir)
        assert done.returncode == 0, done.stderr
        assert [e["iter"] for e in read_log("small/run") if "val_bpb" in e] == [20, 40, 60, 80]


def test_read_only_disk(workdir):
    """A folder that cannot be written to: one line before any training, for train.py, prepare.py
    and sample.py --html."""
    train(*RUN, "--max_iters=5")
    with mounted("fixed", "ro"):
        for script, *arguments in [
            ("train.py", *RUN, "--out_dir=fixed/run"),
            ("prepare.py", "val.txt", "--data_dir=fixed/data"),
            ("sample.py", "--out_dir=run", "--score=abc", "--html=fixed/page.html"),
        ]:
            done = run_script(script, *arguments, cwd=workdir)
            assert_one_clear_line(done, "ead-only file system", "fixed/")
            assert "iter " not in done.stdout


# --- other machines -------------------------------------------------------------------------------
HIDE = """
import importlib.machinery, runpy, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
hidden = {names}
finder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest))
sys.path.insert(0, {root!r})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(names, script, *arguments):
    argv = [str(ROOT / script), *arguments]
    source = HIDE.format(names=set(names), root=str(ROOT), argv=argv)
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_missing_packages(workdir):
    """Without the optional packages the main job runs; what needs one says so in one line."""
    optional = ["tiktoken", "tokenizers", "huggingface_hub", "pyarrow", "safetensors", "lm_eval"]
    done = run_without(optional, "prepare.py", "val.txt", "--name=bare")
    assert done.returncode == 0, done.stderr
    Path("data/tiny").rename("data/tiny-gpt2")
    meta = Path("data/tiny-gpt2/meta.json")  # what is cut already needs no vocabulary
    meta.write_text(meta.read_text().replace('"words"', '"gpt2"'))
    done = run_without(optional, "train.py", *RUN, "--max_iters=3", "--patcher=gpt2")
    assert done.returncode == 0 and Path("run/loss.png").exists(), done.stderr
    Path("table.parquet").write_text("")
    for package, *arguments in [("tiktoken", "val.txt", "--patcher=gpt2"),
                                ("tiktoken", "val.txt", "--tokenizer=gpt2"),
                                ("tokenizers", "val.txt", "--tokenizer=bpe:300"),
                                ("huggingface_hub", "tinystories"),
                                ("pyarrow", "table.parquet")]:
        done = run_without([package], "prepare.py", *arguments)
        assert_one_clear_line(done, f"needs the package {package}: pip install {package}")


def test_paths_with_spaces_from_another_folder(workdir):
    """The project in a folder with a space, a config with Windows line endings, an out_dir with a
    space, run from elsewhere."""
    home = workdir / "my models" / "stlm"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "data", "out"))
    config = home / "config" / "my own.py"
    lines = ['dataset = "tiny"', 'out_dir = "out/a run"', "max_iters = 5", "n_layer = 1",
             "n_ngram = 160", "compile = False", "eval_bytes = 1000", "sample_bytes = 20"]
    config.write_bytes("\r\n".join(lines).encode())
    for command in ([home / "train.py", config],
                    [home / "sample.py", "--out_dir=out/a run", "--prompt=the ", "--seed=1"]):
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=workdir)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ") and Path("out/a run/best.pt").exists()


# --- files from strangers -------------------------------------------------------------------------
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
    """Each is refused in one line, or loads numbers in the shapes that were saved."""
    train(*RUN, "--max_iters=2")
    good = Path("run/ckpt.pt").read_bytes()
    saved = checkpoint("run/ckpt.pt")["model"]
    n_refused = n_loaded = 0
    for data in mutations(good, 1000):
        Path("run/bad.pt").write_bytes(data)
        try:
            model, _ = T.load_checkpoint("run/bad.pt")
        except P.BadInput as error:
            n_refused += "\n" not in str(error)
        else:
            loaded = model.state_dict()
            n_loaded += all(saved[key].shape == loaded[key].shape for key in saved)
    assert n_refused + n_loaded == 1000 and n_refused > 500


def test_checkpoints_that_claim_too_much(workdir):
    """Sizes that the weights do not have are refused before memory is taken for them."""
    train(*RUN, "--max_iters=2")
    good = torch.load("run/ckpt.pt", weights_only=True)

    def refused(**changes):
        torch.save(good | changes, "run/bad.pt")
        with pytest.raises(P.BadInput, match="damaged or of another program") as error:
            S.load("run/bad.pt")
        assert "\n" not in str(error.value)

    for key in ("n_embd", "d_byte", "n_layer", "n_encoder", "n_decoder", "n_ngram", "d_ngram",
                "block_size", "max_patches", "vocab_size"):
        for value in 10**9, 2**62, -1, "9", None, 1e9:
            refused(sizes=good["sizes"] | {key: value})
    for changes in [
        dict(sizes=good["sizes"] | {"n_layers": 1}), dict(sizes=None), dict(kind="Config"),
        dict(model={}), dict(model=good["model"] | {"more": torch.zeros(3)}), dict(model=[1]),
        dict(data={}), dict(data={"patcher": "words", "vocab": 5}), dict(config={"no": 1}),
    ]:
        refused(**changes)
    torch.save(good | {"more": "keys"}, "run/bad.pt")
    assert S.load("run/bad.pt")


@pytest.mark.parametrize("key, value", [("n_layer", "9"), ("block_size", None), ("model", 5),
                                        ("patcher", "../.."), ("window", 1.5)])
def test_a_strangers_config_gets_one_clear_line(workdir, key, value):
    """Also where it is asked to go on from: values of another type, folders elsewhere."""
    train(*RUN, "--max_iters=2")
    good = torch.load("run/ckpt.pt", weights_only=True)
    torch.save(good | {"config": good["config"] | {key: value}}, "run/ckpt.pt")
    for start in ["--resume", "--out_dir=run"], ["--init_from=run/ckpt.pt", "--dataset=tiny"]:
        with pytest.raises(P.BadInput):
            train(*start, "--max_iters=4", "--compile=false")


def test_cut_off_data_files(workdir):
    """A meta.json or train.bin that ends anywhere before its end gives one line."""
    folder, rng = Path("data/tiny"), random.Random(0)
    for name in "meta.json", "train.bin":
        good = (folder / name).read_bytes()
        for _ in range(200):
            (folder / name).write_bytes(good[: rng.randrange(len(good))])
            with pytest.raises(P.BadInput, match="run prepare.py again") as error:
                T.Data(folder, "train", T.load_meta(folder), 64)
            assert "\n" not in str(error.value)
        (folder / name).write_bytes(good)


# --- texts from strangers -------------------------------------------------------------------------
def strange_texts(n, seed=0):
    """n strings of bytes: every value, broken UTF-8, NULs, only spaces or newlines, right-to-left,
    emoji, CJK."""
    rng = random.Random(seed)
    alphabets = ["\0", " ", "\n", " \n\t\r", "אבגד ", "😀👩‍👩‍👧", "日本語の文章。"]
    alphabets += ["abc de", "\x1b[31m\x07", "\u202e\u200b\ufeff"]
    for i in range(n):
        length = rng.randrange(1, 60)
        if i % 3 == 0:
            yield rng.randbytes(length)
        elif i % 3 == 1:
            yield "".join(rng.choices(rng.choice(alphabets), k=length)).encode()
        else:  # may end inside a character
            yield "".join(rng.choices("".join(alphabets), k=length)).encode()[:length]


def test_10000_strange_texts_come_back(gpt2):
    for text in strange_texts(10_000):
        for patcher in "words", "gpt2", "fixed:3":
            assert P.decode(P.encode(text, patcher)) == text
        assert P.decode(P.encode(text, "words", gpt2), gpt2) == text
    for text in b"x" * 1_000_000, b" " * 1_000_000, b"\n" * 1_000_000, b"\xff" * 1_000_000:
        for patcher in "words", "fixed:3":
            assert P.decode(P.encode(text, patcher)) == text


def obeyed(text):
    """What a terminal would obey instead of show. A last "\\r" may be half of a line end."""
    text = text.replace("\r\n", "\n").removesuffix("\r")
    directions = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
            or unicodedata.bidirectional(c) in directions]


@pytest.mark.slow
@torch.no_grad()
def test_3000_strange_texts_are_scored_and_gone_on_from():
    """Finite bits for every byte; nothing that a terminal would obey; a picture that is whole and
    holds nothing but what is ours."""
    model = random_model(n_layer=1)
    model.text = {"patcher": "words", "vocab": None}
    for i, text in enumerate(strange_texts(3000)):
        bits, ends = S.score(model, text)
        assert len(bits) == len(ends) == len(text) and np.isfinite(bits).all()
        if i % 10 == 0:
            written = P.printable(S.write(model, text, max_new_bytes=5, seed=i))
            shown = "".join(c for c, *_ in S.characters(text, bits, ends))
            assert not obeyed(written) and not obeyed(shown), text
            picture = ElementTree.fromstring(S.paint_svg(text, bits, ends))
            tags = {element.tag.split("}")[-1] for element in picture.iter()}
            assert tags <= {"svg", "rect", "text", "g", "title", "path"}


# --- numbers that are not finite ------------------------------------------------------------------
def test_nan_stops_before_a_checkpoint(workdir):
    """A weight that becomes NaN: one line, and the last checkpoint is from before."""
    train(*RUN, "--max_iters=20")
    broken = torch.load("run/ckpt.pt", weights_only=True)
    broken["model"]["to_patches.weight"][0, 0] = float("nan")
    torch.save(broken, "run/ckpt.pt")
    before = Path("run/ckpt.pt").read_bytes()
    clear = r"training diverged at iteration \d+: try lower learning rates"
    with pytest.raises(P.BadInput, match=clear):
        train("--out_dir=run", "--resume", "--max_iters=60")
    assert Path("run/ckpt.pt").read_bytes() == before


def test_nan_in_a_gradient_stops_at_the_next_step(workdir, monkeypatch):
    """At the 33rd step one gradient is NaN: the next step says so, and the checkpoint is from step
    20."""
    new_model, steps = T.new_model, []

    def new_model_with_fault(cfg, meta):
        def fault(grad):
            steps.append(1)
            return grad * float("nan") if len(steps) == 33 else grad

        model = new_model(cfg, meta)
        model.get_parameter("blocks.0.mlp.up.weight").register_hook(fault)
        return model

    monkeypatch.setattr(T, "new_model", new_model_with_fault)
    with pytest.raises(P.BadInput, match="training diverged at iteration 33"):
        train(*RUN)
    kept = checkpoint("run/ckpt.pt")
    assert kept["state"]["iter"] == 20 and all(w.isfinite().all() for w in kept["model"].values())


# --- ranks ----------------------------------------------------------------------------------------
def start_ranks(n, *arguments):
    """n processes of one distributed run, as torchrun starts them on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-u", str(ROOT / "train.py"), *arguments, "--device=cpu"]
    ranks = []
    for rank in range(n):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        ranks.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE))
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(workdir, victim):
    """One rank is killed: the other says so and ends within a minute, and one rank alone can go
    on."""
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
    assert len(said) == 1 and "another rank has gone" in said[0] and "--resume" in said[0]
    assert f"rank {1 - victim} stops" in said[0]
    now = checkpoint("run/ckpt.pt")["state"]["iter"]
    assert now >= 40
    train("--out_dir=run", "--resume", f"--max_iters={now + 5}")
    assert checkpoint("run/ckpt.pt")["state"]["iter"] == now + 5


def test_resume_with_another_number_of_ranks(workdir):
    """One rank, then two, then one: each goes on from the last, and the loss keeps falling."""
    train(*RUN, "--max_iters=40")
    for rank in start_ranks(2, "--out_dir=run", "--resume", "--max_iters=60"):
        _, stderr = rank.communicate(timeout=120)
        assert rank.returncode == 0, stderr
    train("--out_dir=run", "--resume", "--max_iters=80")
    val = {e["iter"]: e["val_bpb"] for e in read_log("run") if "val_bpb" in e}
    assert list(val) == [20, 40, 60, 80] and val[80] < val[40] < val[20]


def test_same_seed_same_log(workdir):
    logs = []
    for out in "a", "b":
        train(*RUN, f"--out_dir={out}", "--max_iters=20")
        logs.append([{key: e[key] for key in ("iter", "bytes", "train_bpb", "val_bpb") if key in e}
                     for e in read_log(out)])
    assert logs[0] == logs[1]
    train(*RUN, "--out_dir=c", "--max_iters=20", "--seed=2")
    assert read_log("c")[0]["train_bpb"] != logs[0][0]["train_bpb"]
