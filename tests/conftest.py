"""What the tests share: an importable project, GPT-2's vocabulary where there is one, small texts
and small runs."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

# models this small gain nothing from more threads, and pytest -n runs one test on each core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT.parent / "shared" / "tiktoken_cache"
if CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))

import prepare as prepare_module  # noqa: E402
from model import STLM, STLMConfig  # noqa: E402


def pytest_configure(config):
    slow = "slow: takes more than ten seconds; leave out with -m 'not slow'"
    config.addinivalue_line("markers", slow)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's vocabulary; tests that need it are skipped where no cache and no network has it."""
    try:
        return prepare_module.gpt2_vocab()
    except prepare_module.BadInput as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


SIZES = dict(block_size=64, max_patches=16, n_layer=2, n_head=2, n_embd=32, d_byte=16, n_decoder=2,
             n_ngram=160)


def random_model(seed=0, kind=STLM, **sizes):
    """A small model whose every parameter is random: at initialisation some are zero and would hide
    faults."""
    model = kind(STLMConfig(**SIZES | sizes)).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def prose(n, seed=0):
    """About n bytes of made-up text with words, code, several scripts and indentation."""
    rng = random.Random(seed)
    words = ("the a of model byte patch def return self.x = foo(bar) 3.14 naïve 日本語 "
             "\n     \n\n \t don't --- 😀").split(" ")
    out = b""
    while len(out) < n:
        out += rng.choice(words).encode() + rng.choice([b" ", b" ", b"\n", b", ", b".\n    "])
    return out


def symbols(n, rate=0.25, seed=0):
    """Random symbols of which about `rate` end a patch: (n,) int64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (n,), generator=g) + 256 * (torch.rand(n, generator=g) < rate)


def run_script(script, *args, cwd, **options):
    """Runs one of the scripts as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def assert_one_clear_line(done, *expected):
    """Bad input: exit code 2, and one line on stderr that says what was expected."""
    assert done.returncode == 2, done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for text in expected:
        assert text in lines[0], lines[0]


TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--d_byte=16", "--n_ngram=160",
        "--block_size=64", "--max_patches=0", "--batch_size=4", "--eval_bytes=2000",
        "--log_interval=5", "--compile=false", "--sample_bytes=20"]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with a small dataset "tiny" in it."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_bytes(prose(5000, seed=i))
    (tmp_path / "val.txt").write_bytes(prose(3000, seed=99))
    prepare_module.prepare([str(texts)], name="tiny", val=str(tmp_path / "val.txt"))
    return tmp_path


def read_bin(path):
    return np.fromfile(path, np.uint16)


def read_log(out_dir):
    return [json.loads(line) for line in open(f"{out_dir}/log.jsonl")]
