"""bench.py measures what it says: it runs both models, and counts operations and compressed sizes right."""
import bz2
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, random_model, run_script

import bench
import train as T

CONFIG = "model = '{}'\nblock_size = {}\nn_layer = 1\nn_head = 2\nn_embd = {}\nd_byte = 16\nn_ngram = 32\ncompile = False\n"


def test_both_models_side_by_side(tmp_path):
    (tmp_path / "stlm_tiny.py").write_text(CONFIG.format("stlm", 64, 32))
    (tmp_path / "gpt_tiny.py").write_text(CONFIG.format("gpt", 64, 32))
    done = run_script("bench.py", "stlm_tiny.py", "--patcher=fixed:1", cwd=tmp_path)  # the rival on flat bytes
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-8:]
    table = {line[:42].strip(): [float(v.replace(",", "")) for v in line[42:].split()] for line in lines}
    assert len(table) == 8
    for ours, rival, ratio in table.values():
        assert ours >= 0 and rival >= 0
        if min(ours, rival) > 1:  # smaller figures are printed too coarsely to compare
            assert ratio == pytest.approx(ours / rival, rel=0.01, abs=0.01)
    assert table["bytes of text a step"][0] == pytest.approx(8 * 64, rel=0.01)


def test_operations_by_hand():
    """2 a weight and position forward, twice that backward; attention 12 * positions * context / 2 * width."""
    model = random_model(n_ngram=0)  # n_layer 2, n_embd 32, d_byte 16, 5 taps, one byte layer before and two after
    core = 2 * (4 * 32 * 32 + 8 * 32 * 32) + 2 * 16 * 32
    byte_layers = 3 * (4 * 16 * 16 + 4 * 16 * 16 + 5 * 16) + 512 * 16 + 2 * 16 * 16  # and what followed two matches
    attention = 2 * 6 * 10 * 10 * 32  # 10 patches in one row of 64 symbols
    assert T.model_flops(model, 64, 10) == 6 * core * 10 + 6 * byte_layers * 64 + attention


def test_compressors(workdir):
    done = run_script("bench.py", "--compress=data/tiny", cwd=workdir)
    text = (workdir / "val.txt").read_bytes()
    bits = float(re.search(r"bzip2 -9 +([\d.]+)", done.stdout)[1])
    assert bits == pytest.approx(8 * len(bz2.compress(text, 9)) / len(text), abs=1e-3)


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
