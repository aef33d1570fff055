"""bench.py measures what it says: it runs both models, and counts operations and compressed sizes right."""
import bz2
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_clear_line, prose, random_model, run_script

import bench
import sample as S
import train as T

CONFIG = "model = '{}'\nblock_size = {}\nn_layer = 1\nn_head = 2\nn_embd = {}\nd_byte = 16\nn_ngram = 160\ncompile = False\n"


def test_both_models_side_by_side(tmp_path):
    (tmp_path / "stlm_tiny.py").write_text(CONFIG.format("stlm", 64, 32))
    (tmp_path / "gpt_tiny.py").write_text(CONFIG.format("gpt", 64, 32))
    others = ["gpt_tiny.py", "transformers"] if importlib.util.find_spec("transformers") else []
    done = run_script("bench.py", "stlm_tiny.py", *others, "--patcher=fixed:1", cwd=tmp_path)  # the rival on flat bytes
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-13:]
    table = {line[:38].strip(): [float(v.replace(",", "")) for v in line[38:].split() if v != "-"] for line in lines}
    assert len(table) == 13 and (not others or len(table["writing after it, 64 rows, KB/s"]) == 5)
    for ours, rival, ratio, *_ in table.values():
        assert ours >= 0 and rival >= 0
        if min(ours, rival) > 1:  # smaller figures are printed too coarsely to compare
            assert ratio == pytest.approx(ours / rival, rel=0.01, abs=0.01)
    assert table["bytes of text a step"][0] == pytest.approx(8 * 64, rel=0.01)


def test_operations_by_hand():
    """2 a weight and position forward, twice that backward; attention 12 * positions * context / 2 * width."""
    core = 2 * (2 * 4 * 32 * 32 + 8 * 32 * 32) + (1 + 4) * 16 * 32  # n_layer 2, n_embd 32, d_byte 16, d_ngram 16, 1 + 2 MLPs
    each_byte = 3 * 4 * 16 * 16 + 512 * 16 + 5 * 16 * 16 + 16 * 16  # MLPs, the table, five n-grams, the query
    for window, seen in (0, 10), (2, 6):  # twice the patches that one sees on average, of the 10 in one row of 64 symbols
        model = random_model(attend_twice=True, window=window)
        attention = 2 * 2 * 6 * 10 * seen * 32
        assert T.model_flops(model, 64, 10) == 6 * core * 10 + 6 * each_byte * 64 + attention


def test_longer_rows(workdir):
    """As many bytes a step whatever the length of a row: fewer rows."""
    (workdir / "stlm_tiny.py").write_text(CONFIG.format("stlm", 1024, 32))
    done = run_script("bench.py", "--lengths", "stlm_tiny.py", "stlm_tiny.py", "--dataset=tiny", cwd=workdir)
    lines = [line.replace(",", "").split() for line in done.stdout.splitlines()[1:]]
    assert [line[:3] for line in lines] == 2 * [["stlm_tiny", "1024", "8"], ["stlm_tiny", "4096", "2"], ["stlm_tiny", "16384", "1"]]
    assert all(float(value) > 0 for line in lines for value in line[3:])


def test_profile(workdir):
    """The floor is the operations of the model; the operators' shares are of all the time that was seen."""
    (workdir / "stlm_tiny.py").write_text(CONFIG.format("stlm", 64, 32))
    done = run_script("bench.py", "--profile", "stlm_tiny.py", "--dataset=tiny", "--batch_size=256", cwd=workdir)
    assert done.returncode == 0, done.stderr
    data = T.Data(Path("data/tiny"), "train", T.load_meta(Path("data/tiny")), 64)
    n_bytes, n_patches, n_symbols = map(int, data.count(data.training_rows(0, 256, 0)[1]))
    core = 12 * 32 * 32 + 2 * 16 * 32 + 32 * n_patches / 256  # a layer, up and down, attention to half of a row's patches
    each_byte = 2 * 4 * 16 * 16 + 512 * 16 + 5 * 16 * 16 + 16 * 16
    text, gflop = re.search(r"^([\d,]+) bytes of text.*\n +[\d.]+ for ([\d.]+) GFLOP", done.stdout, re.M).groups()
    assert int(text.replace(",", "")) == n_bytes
    assert float(gflop) == pytest.approx(6 * (core * n_patches + each_byte * n_symbols) / 1e9, abs=0.06)
    ms, shares, names = zip(*re.findall(r"^ +([\d.]+) +(\d+)% +\d+  (\S+)", done.stdout, re.M))
    assert "aten::mm" in names and 50 < sum(map(int, shares)) <= 105
    assert list(map(float, ms)) == sorted(map(float, ms), reverse=True)


def test_compressors(workdir):
    done = run_script("bench.py", "--compress=data/tiny", cwd=workdir)
    text = (workdir / "val.txt").read_bytes()
    bits = float(re.search(r"bzip2 -9 +([\d.]+)", done.stdout)[1])
    assert bits == pytest.approx(8 * len(bz2.compress(text, 9)) / len(text), abs=1e-3)


def test_speed_of_prepare(workdir, gpt2):
    done = run_script("bench.py", "--prepare=data/tiny", cwd=workdir)
    speeds = re.findall(r"^(.{26}) *([\d.]+)$", done.stdout, re.M)
    assert [name.strip() for name, _ in speeds] == ["words, one core", "prepare.py, words", "gpt2, one core",
                                                    "prepare.py, gpt2", "tiktoken alone, one core"]
    assert all(float(speed) > 0 for _, speed in speeds)


def test_runs_side_by_side(workdir):
    """Two seeds of one model make one line: the mean of what their logs end with."""
    finals = []
    for seed in 1, 2:
        out = f"out/tiny.{seed}"
        T.train(T.parse([*TINY, "--dataset=tiny", f"--out_dir={out}", f"--seed={seed}", "--max_iters=4", "--eval_interval=2"]))
        finals.append(json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])["val_bpb"])
    done = run_script("bench.py", "--runs", "out/tiny.1", "out/tiny.2", cwd=workdir)
    assert done.returncode == 0, done.stderr
    names, values = (next(line for line in done.stdout.splitlines() if line.split()[0] == word) for word in ("total", "tiny"))
    row = dict(zip(names.replace("MB seen", "MB").split(), map(float, values.split()[1:])))
    assert row["bpb"] == pytest.approx(np.mean(finals), abs=1e-3) and row["seeds"] == 2 and row["ratio"] == 1
    assert row["spread"] == pytest.approx(abs(finals[0] - finals[1]), abs=1e-3)
    assert row["rise"] == pytest.approx(row["noisy"] - row["bpb"], abs=2e-3)
    assert Path("images/runs.svg").exists() or not importlib.util.find_spec("matplotlib")
    text = b" " * 100_000
    noise = bench.noisy(text, np.random.default_rng(0))
    assert len(noise) == len(text) and noise.count(b" ") == pytest.approx(95_000, rel=0.01)
    assert noise == bench.noisy(text, np.random.default_rng(0))


class Request:
    def __init__(self, *args):
        self.args = args


def harness(patcher="words", **sizes):
    model = random_model(**sizes)
    model.text = {"patcher": patcher, "vocab": None}
    return bench.Harness(model)


def test_likelihoods_multiply_wherever_a_text_is_split():
    """P(text) = P(beginning) P(rest | beginning) at every byte, also inside a patch: nothing is lost between the two."""
    text = "def f(x1):\n    return naïve(x1) # one"
    for patcher in "words", "fixed:3":
        ours = harness(patcher)
        whole = ours.loglikelihood([Request("", text)])[0][0]
        splits = ours.loglikelihood([Request(*pair) for i in range(1, len(text)) for pair in [("", text[:i]), (text[:i], text[i:])]])
        for i in range(0, len(splits), 2):
            assert splits[i][0] + splits[i + 1][0] == pytest.approx(whole, abs=1e-3), text[: i // 2 + 1]


def test_batched_likelihoods_equal_single_ones():
    """Of all lengths, with no context, with one too long for the model, and with a continuation too long for it."""
    ours, words = harness(), prose(4000).decode("utf-8", "ignore")
    pairs = [("", "a"), ("", words[:40]), (words[:500], " b"), ("x", words[:300]), ("x", "")]
    pairs += [(words[i : i + i % 70], words[i + i % 70 : i + 90]) for i in range(100)]
    requests = [Request(*pair) for pair in pairs]
    batched, single = ours.loglikelihood(requests), ours.loglikelihood(requests, batched=False)
    for (a, greedy), (b, same) in zip(batched, single, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == same and np.isfinite(a) and a <= 0
    cut = words[:500].encode()[-63:].decode("utf-8", "ignore")  # 64 positions: what lies further left does not count
    assert ours.loglikelihood([Request("something else " + cut, " b")])[0][0] == pytest.approx(batched[2][0], abs=1e-4)


@torch.no_grad()
def test_greedy_and_generation_by_hand():
    ours = harness()
    for text in "def f(x)", "the naïve byte", "3.14":
        x = S.document(ours.model, text.encode())
        likeliest = ours.model(x[None])[0][0].argmax(-1)[:-1] % 256
        for i in range(1, len(text)):
            n = len(text[i:].encode())
            by_hand = bool((likeliest[-n:] == x[-n:] % 256).all())
            assert ours.loglikelihood([Request(text[:i], text[i:])])[0][1] == by_hand
    text = ours.generate_until([Request("the ", {"max_gen_toks": 8})])[0]
    assert text == S.write(ours.model, "the ", max_new_bytes=32, temperature=0, seed=0)
    stop = text[len(text) // 2]
    assert ours.generate_until([Request("the ", {"max_gen_toks": 8, "until": [stop, "never"]})])[0] == text.split(stop)[0]


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


def test_a_local_task_through_the_harness(workdir):
    """The real lm-evaluation-harness on a task of our own, without a network; its accuracy is the one by hand."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    T.train(T.parse([*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=60", "--learning_rate=0.02"]))
    documents = [{"q": "the model", "choices": [" byte", "zqxj"], "gold": 0}, {"q": "def ", "choices": ["###", "patch"], "gold": 1},
                 {"q": "", "choices": ["return", "Qqqq"], "gold": 1}]
    Path("task").mkdir()
    Path("task/rows.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    Path("task/local.yaml").write_text(TASK.replace("FILE", str(workdir / "task/rows.jsonl")))
    offline = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(workdir / "hf")}
    done = run_script("bench.py", "--tasks=local_choice", "--include_path=task", "--out_dir=run", cwd=workdir, env=offline)
    assert done.returncode == 0, done.stderr
    ours, right = bench.Harness(S.load("run")), 0
    for d in documents:
        scores = [ours.loglikelihood([Request(d["q"], " " + choice)])[0][0] for choice in d["choices"]]
        right += int(np.argmax(scores) == d["gold"])
    result = json.loads(Path("run/lm_eval.json").read_text())["results"]["local_choice"]
    assert "local_choice" in done.stdout and result["acc,none"] == pytest.approx(right / len(documents))
    done = run_script("bench.py", "--tasks=no_such_task", "--out_dir=run", cwd=workdir, env=offline)
    assert_one_clear_line(done, "--tasks: lm-eval knows no task no_such_task")
