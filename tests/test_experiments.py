"""Config files with code: what edit() and loss() may rely on, and what makes each experiment what
it is."""
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_one_clear_line, read_log, run_script

import prepare as P
import sample as S
import train as T


def train(*arguments):
    T.train(*T.parse(arguments))


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_the_readmes_own_experiment(workdir):
    """It trains, stops and resumes bit for bit, is scored by plain bits per byte, and its
    checkpoint is of use only with the config file, which no checkpoint can choose."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source, = (block for block in blocks if "def edit(model)" in block)
    assert source.count("\n") <= 15
    Path("typos.py").write_text(source)
    run = ["typos.py", *TINY, "--dataset=tiny", "--n_layer=2", "--eval_interval=4"]
    train(*run, "--out_dir=out/typos", "--max_iters=8")
    model = S.load("typos.py")
    assert model.blocks[0].mlp is model.blocks[1].mlp
    assert len(S.write(model, "the ", max_new_bytes=20, seed=1)) > 0
    data = T.Data(Path("data/tiny"), "val", T.load_meta(Path("data/tiny")), 64)
    bpb = T.evaluate(model, data, 4, torch.autocast("cpu", enabled=False))
    assert bpb == pytest.approx(read_log("out/typos")[-1]["val_bpb"], rel=1e-3)

    run += ["--warmup=0.01", "--cooldown=0"]  # so that the rates do not depend on max_iters
    train(*run, "--out_dir=parts", "--max_iters=4")
    train(*run, "--out_dir=parts", "--max_iters=8", "--resume")
    train(*run, "--out_dir=whole", "--max_iters=8")
    parts, whole = (checkpoint(f"{out}/ckpt.pt")["model"] for out in ("parts", "whole"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)

    for script, *arguments in [("train.py", "--out_dir=parts", "--resume", "--max_iters=9"),
                               ("sample.py", "--out_dir=parts", "--prompt=a"),
                               ("bench.py", "val", "parts", "data/tiny")]:
        done = run_script(script, *arguments, cwd=workdir)
        assert_one_clear_line(done, "expected the config file of its edit(), ", "typos.py")
    Path("plain.py").write_text("max_iters = 3\n")
    with pytest.raises(P.BadInput, match="expected the config file"):
        train("plain.py", *run[1:], "--out_dir=parts", "--resume")


def test_a_loss_alone_and_one_that_fails(workdir):
    """A model with only a loss() is loaded without its file, but resumed with it; a hook's fault
    ends the run before anything is written."""
    Path("double.py").write_text("def loss(model, x, y):\n    return 2 * model(x, y)\n")
    run = [*TINY, "--dataset=tiny", "--out_dir=run"]
    train("double.py", *run, "--max_iters=3", "--log_interval=1")
    train(*run, "--out_dir=plain", "--max_iters=3", "--log_interval=1")
    first = [read_log(out)[0]["train_bpb"] for out in ("run", "plain")]
    assert first[0] == pytest.approx(2 * first[1])
    assert S.load("run")
    with pytest.raises(P.BadInput, match=r"expected the config file .*double.py"):
        train("--out_dir=run", "--resume", "--max_iters=5")
    train("double.py", "--out_dir=run", "--resume", "--max_iters=5")
    Path("broken.py").write_text("import nothing_like_this\n")
    done = run_script("train.py", "broken.py", cwd=workdir)
    assert_one_clear_line(done, "config file broken.py: ModuleNotFoundError")
