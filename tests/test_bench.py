"""bench.py measures what it says: speeds, finished runs, noise, sizes, likelihoods of bytes."""
import bz2
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_clear_line, prose, random_model, run_script

import bench
import sample as S
import train as T
from model import GPT, STLMConfig
from prepare import BadInput, prepare

CONFIG = """
model = '{}'
block_size = 64
n_layer = 1
n_head = 2
n_embd = 32
d_byte = 16
n_ngram = 160
compile = False
"""
NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, x, y):
        logits = self.table(x) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.view(-1))

    def generate(self, ids, max_new_tokens):
        return torch.cat([ids, ids[:, :1].expand(-1, max_new_tokens)], 1)
"""


def test_models_side_by_side(workdir):
    """Ours, a folder that looks like nanoGPT's and, where it is installed, transformers."""
    Path("stlm_tiny.py").write_text(CONFIG.format("stlm"))
    Path("gpt_tiny.py").write_text(CONFIG.format("gpt"))
    Path("nano").mkdir()
    Path("nano/model.py").write_text(NANOGPT)
    models = ["stlm_tiny.py", "gpt_tiny.py", "nano"]
    models += ["transformers"] if importlib.util.find_spec("transformers") else []
    done = run_script("bench.py", "speed", *models, "--dataset=tiny", cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    names, *lines = done.stdout.splitlines()[-11:]
    assert names.replace("ratio", "").split() == ["stlm_tiny", "gpt_tiny", *models[2:]]
    table = {}
    for line in lines:
        cells = line[28:].replace(",", "").split()
        table[line[:28].strip()] = [None if cell == "-" else float(cell) for cell in cells]
    assert len(table) == 10
    for figure, (ours, *others) in table.items():
        assert ours > 0 and len(others) == 2 * len(models) - 2
        for other, ratio in zip(others[::2], others[1::2]):
            if other is None:
                assert figure == "writing, 64 at once, KB/s" or figure == "reading, 64 at once, ms"
            elif min(ours, other) > 1:  # smaller figures are printed too coarsely to compare
                assert ratio == pytest.approx(ours / other, rel=0.01, abs=0.01)
    assert table["bytes of text a step"][0] == pytest.approx(8 * 64, rel=0.01)
    assert table["writing, 64 at once, KB/s"][3] is None  # of nanoGPT


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs bench.py in this process and returns its output."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        bench.main()
        return capsys.readouterr().out
    return call


def refuses(call, arguments, expected):
    with pytest.raises((BadInput, OSError, ModuleNotFoundError), match=re.escape(expected)):
        call(*arguments)


def test_one_clear_line_before_any_work(workdir, monkeypatch, call):
    Path("tiny.py").write_text(CONFIG.format("stlm"))
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(bench, "measure", None)
    for arguments, expected in [
        (["speed", "tiny.py", "transformers"], "transformers"),
        (["speed", "tiny.py", "../nanogtp"], "../nanogtp: expected CONFIG.py"),
        (["speed", "transformers", "tiny.py"], "transformers: expected CONFIG.py"),
        (["speed", "tiny.py", "--no_such_key=1"], "no_such_key"),
        (["speed", "tiny.py", "--dataset=absent"], "absent"),
        (["speed", "no_such_config.py"], "no_such_config.py"),
        (["val", "data/tiny", "data/tinny"], "data/tinny: no such file or folder"),
        (["val", "data/tiny"], "at least one model"),
        (["val", "data/tiny", "--noise=5"], "--noise=5.0: expected 0 to 1"),
        (["val", "data/tiny", "--noise=x"], "--noise"),
        (["tasks", "blimp", "--out_dir=absent"], "lm_eval"),
        (["compress", "data/tinny"], "data/tinny"),
        (["compress", "data/tiny", "--x=1"], "compress: unknown argument --x=1"),
        (["runs", "data/tiny"], "data/tiny"),
    ]:
        refuses(call, arguments, expected)
    done = run_script("bench.py", "speed", "tiny.py", "../nanogtp", cwd=workdir)
    assert_one_clear_line(done, "../nanogtp: expected")


def test_compressors(workdir, call):
    output = call("compress", "data/tiny")
    text = (workdir / "val.txt").read_bytes()
    bits = float(re.search(r"bzip2 -9 +([\d.]+)", output)[1])
    assert bits == pytest.approx(8 * len(bz2.compress(text, 9)) / len(text), abs=1e-3)


def train_tiny(out, *more):
    """A short training run; what its log ends with."""
    T.train(*T.parse([*TINY, "--dataset=tiny", f"--out_dir={out}", "--max_iters=10",
                     "--eval_interval=5", *more]))
    return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])


def test_runs_side_by_side(workdir, call):
    """Two seeds of one model make one line: the mean of what their logs end with. A torn last line
    is left out and said, a run that is not finished refused."""
    finals = [train_tiny(f"out/tiny.{seed}", f"--seed={seed}")["val_bpb"] for seed in (1, 2)]
    with open("out/tiny.2/log.jsonl", "a") as file:
        file.write('{"iter": 5, "minu')
    output = call("runs", "out/tiny.1", "out/tiny.2")
    assert "out/tiny.2/log.jsonl: a torn line is left out" in output
    line = next(line for line in output.splitlines() if line.startswith("tiny"))
    total, tables, read, minutes, speed, bpb, seeds, spread, ratio = map(float, line.split()[1:])
    assert bpb == pytest.approx(np.mean(finals), abs=1e-3) and seeds == 2 and ratio == 1
    assert spread == pytest.approx(abs(finals[0] - finals[1]), abs=1e-3)
    assert 0 < tables < total and read >= 0 and minutes >= 0 and speed > 0
    assert Path("images/runs.svg").read_text().count("<svg") == 1

    Path("out/tiny.1/log.jsonl").write_text('{"iter": 2, "minutes": 0.1, "train_bpb": 4}')
    refuses(call, ["runs", "out/tiny.1"], "out/tiny.1 is not finished")


def bits_per_byte(output, folder):
    return [float(value) for value in re.search(rf"^{folder} +(.*)$", output, re.M)[1].split()]


def test_validation_with_and_without_noise(workdir, call):
    """The score that training ended with; with noise a worse one, of a text that is kept."""
    final = train_tiny("out/tiny")["val_bpb"]
    prepare([str(workdir / "texts")], name="tiny", val=str(workdir / "val.txt"), patcher="fixed:4")
    both = ["out/tiny", "data/tiny", "data/tiny-fixed4"]
    clean = call("val", "out/tiny/ckpt.pt", *both)
    assert bits_per_byte(clean, "data/tiny")[0] == pytest.approx(final, abs=1e-3)
    noisy = call("val", *both, "--noise=0.05")
    for folder in "data/tiny", "data/tiny-fixed4":
        assert bits_per_byte(noisy, folder)[0] > bits_per_byte(clean, folder)[1]

    text = np.frombuffer(Path("val.txt").read_bytes(), np.uint8)
    kept = Path("data/tiny-noisy-0.05.txt").read_bytes()
    assert kept == Path("data/tiny-fixed4-noisy-0.05.txt").read_bytes()  # however it is cut
    assert kept[-1:] == b"\xff" and len(kept) == len(text) + 1
    changed = np.frombuffer(kept[:-1], np.uint8)
    differ = changed != text
    assert 0.03 < differ.mean() < 0.07
    assert set(changed[differ].tolist()) <= set(b"abcdefghijklmnopqrstuvwxyz")


def test_documents_stay_separated_in_noise(workdir):
    Path("a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n{"text": "four five"}\n')
    folder = prepare([str(workdir / "texts")], name="three", val="a.jsonl")
    meta = T.load_meta(folder)
    ids = bench.add_noise(folder, meta, 0.0)
    assert (ids == T.Data(folder, "val", meta, 1).ids).all()
    assert Path("data/three-noisy-0.0.txt").read_bytes() == b"one two\xffthree\xfffour five\xff"


def test_sizes(tmp_path, monkeypatch, call):
    """The parts add up to the whole, which is what the config files are named after."""
    monkeypatch.chdir(Path(bench.__file__).parent)
    lines = call("sizes", f"--figure={tmp_path}/sizes.svg").splitlines()[1:-1]
    table = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines}
    for name, (total, *parts) in table.items():
        assert sum(parts) == pytest.approx(total, abs=0.03)
        if "quick" not in name:
            assert total == pytest.approx(float(name.split("_")[1][:-1]), rel=0.05)
    assert table["gpt_10m"][4] == pytest.approx(50_257 * 160 / 1e6, abs=0.01)
    assert len(table) == 8 and "<svg" in (tmp_path / "sizes.svg").read_text()


class Request:
    def __init__(self, *args):
        self.args = args


def harness(patcher="words", **sizes):
    model = random_model(**sizes)
    model.text = {"patcher": patcher, "vocab": None}
    return bench.Harness(model)


def gpt_harness():
    """A GPT over single bytes and the separator."""
    torch.manual_seed(0)
    model = GPT(STLMConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.text = {"patcher": None, "vocab": [chr(i) for i in range(256)] + [""]}
    return bench.Harness(model)


def test_likelihoods_multiply_wherever_a_text_is_split():
    """P(text) = P(beginning) P(rest | beginning) at every byte, also inside a patch: nothing is
    lost between the two."""
    text = "def f(x1):\n    return naïve(x1) # one"
    for ours in harness("words"), harness("fixed:3"), gpt_harness():
        whole = ours.loglikelihood_rolling([Request(text)])[0]
        assert ours.loglikelihood([Request("", text)])[0][0] == whole < 0
        for i in range(1, len(text)):
            requests = [Request("", text[:i]), Request(text[:i], text[i:])]
            (beginning, _), (rest, _) = ours.loglikelihood(requests)
            assert beginning + rest == pytest.approx(whole, abs=1e-3), text[:i]


@torch.no_grad()
def by_hand(model, context, continuation):
    """(nats, greedy) of a pair, each byte from what stands before it in its window alone."""
    ids = S.document(model, (context + continuation).encode())
    n, N, nats, greedy = len(continuation.encode()), model.config.block_size, 0.0, True
    for i in range(max(1, len(ids) - n - 1), len(ids)):
        end = len(ids) - (len(ids) - 1 - i) // N * N  # of its window
        logp = model(ids[None, max(0, end - 1 - N) : i])[0, -1].log_softmax(-1)
        byte = int(ids[i]) % 256
        of_byte = float(logp[[byte, byte + 256]].logsumexp(0))
        if i == len(ids) - n - 1:  # the context's last byte is given, its flag is not
            nats += float(logp[ids[i]]) - of_byte
        else:
            nats += float(logp[ids[i]]) if i < len(ids) - 1 else of_byte
            greedy &= int(logp.argmax()) % 256 == byte
    return nats, greedy


def test_likelihoods_by_hand():
    """Of all lengths, without a context, with one too long for the model, and with a continuation
    too long for it."""
    ours, words = harness(), prose(4000).decode("utf-8", "ignore")
    pairs = [("", "a"), ("", words[:40]), (words[:500], " b"), ("x", words[:300])]
    pairs += [(words[i : i + i % 70], words[i + i % 70 : i + 90]) for i in range(0, 100, 9)]
    for pair, (nats, greedy) in zip(pairs, ours.loglikelihood([Request(*pair) for pair in pairs])):
        expected, all_likeliest = by_hand(ours.model, *pair)
        assert nats == pytest.approx(expected, abs=1e-3) and greedy == all_likeliest, pair
    assert ours.loglikelihood([Request("x", "")]) == [(0.0, True)]
    # 64 positions: what lies further left does not count
    cut = words[:500].encode()[-63:].decode("utf-8", "ignore")
    short, long = ours.loglikelihood([Request("something else " + cut, " b"), Request(*pairs[2])])
    assert short[0] == pytest.approx(long[0], abs=1e-4)


@torch.no_grad()
def test_greedy_and_generation_by_hand():
    ours = harness()
    for text in "def f(x)", "the naïve byte", "3.14":
        x = S.document(ours.model, text.encode())
        likeliest = ours.model(x[None])[0].argmax(-1)[:-1] % 256
        for i in range(1, len(text)):
            n = len(text[i:].encode())
            expected = bool((likeliest[-n:] == x[-n:] % 256).all())
            assert ours.loglikelihood([Request(text[:i], text[i:])])[0][1] == expected
    text = ours.generate_until([Request("the ", {"max_gen_toks": 8})])[0]
    assert text == "".join(S.stream(ours.model, "the ", 32, temperature=0, seed=0))
    stop = text[len(text) // 2]
    options = {"max_gen_toks": 8, "until": [stop, "never"]}
    assert ours.generate_until([Request("the ", options)])[0] == text.split(stop)[0]


TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_a_local_task_through_the_harness(workdir, call):
    """The real lm-evaluation-harness on a task of our own, without a network; its accuracy is the
    one by hand."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    train_tiny("run", "--max_iters=60", "--eval_interval=60", "--learning_rate=0.02")
    documents = [{"q": "the model", "choices": [" byte", "zqxj"], "gold": 0},
                 {"q": "def ", "choices": ["###", "patch"], "gold": 1},
                 {"q": "", "choices": ["return", "Qqqq"], "gold": 1}]
    Path("task").mkdir()
    Path("task/rows.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    Path("task/local.yaml").write_text(TASK.replace("FILE", str(workdir / "task/rows.jsonl")))
    offline = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
                            "HF_HOME": str(workdir / "hf")}
    done = run_script("bench.py", "tasks", "local_choice", "--include_path=task", "--out_dir=run",
                      cwd=workdir, env=offline)
    assert done.returncode == 0, done.stderr
    ours, right = bench.Harness(S.load("run")), 0
    for d in documents:
        scores = [ours.loglikelihood([Request(d["q"], " " + choice)])[0][0]
                  for choice in d["choices"]]
        right += int(np.argmax(scores) == d["gold"])
    result = json.loads(Path("run/lm_eval.json").read_text())["results"]["local_choice"]
    assert "local_choice" in done.stdout
    assert result["acc,none"] == pytest.approx(right / len(documents))
    refuses(call, ["tasks", "no_such_task"], "lm-eval knows no task no_such_task")
