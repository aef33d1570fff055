"""Config files with code: what edit() and loss() may rely on, and what makes each experiment what
it is."""
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_one_clear_line, random_model, read_log, run_script, symbols

import bench as B
import prepare as P
import sample as S
import train as T
from model import STLM, STLMConfig, build

SHORT = [*TINY, "--dataset=tiny", "--max_minutes=0"]


def train(*arguments):
    T.train(*T.parse(arguments))


def path(name):
    return str(ROOT / "config" / f"{name}.py")


def experiment(name):
    """The module that is config/name.py, and its hooks."""
    _, hooks = T.parse([path(name)])
    return sys.modules[re.sub(r"\W", "_", path(name))], hooks


def by_itself(name, *arguments):
    command = [sys.executable, "-m", f"config.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert B.read_run("typos.py")[0][-1] == read_log("out/typos")[-1]["val_bpb"]
    data = T.Data(Path("data/tiny"), "val", T.load_meta(Path("data/tiny")), 64)
    bpb = T.evaluate(model, data, 4, torch.autocast("cpu", enabled=False))
    assert bpb == pytest.approx(read_log("out/typos")[-1]["val_bpb"], rel=1e-3)

    run += ["--warmup=0.01", "--cooldown=0"]  # so that the rates do not depend on max_iters
    train(*run, "--out_dir=parts", "--max_iters=4")
    train(*run, "--out_dir=parts", "--max_iters=8", "--resume")
    train(*run, "--out_dir=whole", "--max_iters=8")
    parts, whole = (checkpoint(f"{out}/ckpt.pt")["model"] for out in ("parts", "whole"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)

    done = run_script("sample.py", "--out_dir=parts", "--prompt=a", cwd=workdir)
    assert_one_clear_line(done, "expected the config file of its edit(): typos.py")
    with pytest.raises(P.BadInput, match=r"the config file of its edit\(\): typos.py"):
        train("--out_dir=parts", "--resume", "--max_iters=9")
    Path("plain.py").write_text("max_iters = 3\n")
    Path("other.py").write_text(source)
    for other in "plain.py", "other.py":
        with pytest.raises(P.BadInput, match="expected the config file of its edit"):
            train(other, *run[1:], "--out_dir=parts", "--resume")


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
    Path("returns.py").write_text("def edit(model):\n    return model\n")
    Path("print.py").write_text("edit = print\n")
    for name, expected in [
        ("broken.py", "config file broken.py: ModuleNotFoundError"),
        ("returns.py", "edit() of a config file: expected it to change the model"),
        ("print.py", "config file print.py: expected edit to be a function"),
    ]:
        done = run_script("train.py", name, *run, cwd=workdir)
        assert_one_clear_line(done, expected)


def test_a_config_file_may_have_the_name_of_one_that_it_imports(workdir):
    Path("mine").mkdir()
    Path("mine/quick.py").write_text("from config.quick import *\nn_layer = 2\n")
    assert T.parse(["mine/quick.py"])[0] == T.parse([path("quick")])[0] | {"n_layer": 2}


def test_two_runs_in_one_folder(workdir):
    """The first one notices that its folder has been renamed, and stops; it can go on there."""
    run, calls = [*TINY, "--dataset=tiny", "--out_dir=run", "--max_iters=6"], []

    def loss(model, x, y):
        calls.append(x)
        if len(calls) == 4:
            train(*run, "--seed=2")
        return model(x, y)

    given, _ = T.parse([*run, "--eval_interval=2"])
    with pytest.raises(P.BadInput, match="another run has begun in run"):
        T.train(given, {"loss": loss})
    assert checkpoint("run/ckpt.pt")["config"]["seed"] == 2
    assert checkpoint("run.1/ckpt.pt")["state"]["iter"] == 2
    assert not read_log("run.1")[-1]["all_of_val"] and read_log("run")[-1]["all_of_val"]


# --- those of config/ -----------------------------------------------------------------------------
EXPERIMENTS = [{"name": "share", "SHARE": "all"}, {"name": "dropout", "SCHEDULE": "late"},
               {"name": "multibyte", "ORDER": "forward"}, {"name": "distill"}, {"name": "spin"},
               {"name": "denoise", "MADE": "0.5"}, {"name": "infill"}, {"name": "caption"},
               {"name": "experts"}, {"name": "experts_start"}, {"name": "selfplay"}]


def test_all_experiments_are_here():
    hooked = {file.stem for file in (ROOT / "config").glob("*.py") if "\ndef " in file.read_text()}
    assert hooked == {case["name"] for case in EXPERIMENTS}


@pytest.mark.parametrize("case", EXPERIMENTS, ids=lambda case: case["name"])
def test_five_steps_and_resume(workdir, case, monkeypatch):
    """Killed in an evaluation and resumed, the weights and buffers are those of a run in one go."""
    def killed(*arguments):
        raise KeyboardInterrupt

    name = case["name"]
    if name == "caption":
        pytest.importorskip("sklearn")
    for key in case.keys() - {"name"}:
        monkeypatch.setenv(key, case[key])
    for out in "quick", "helper", "games":
        train(path("quick"), *SHORT, f"--out_dir=out/{out}", "--max_iters=2")
    module, hooks = experiment(name)
    if hasattr(module, "STAGE"):
        module.STAGE = 2
    run = [path(name), *SHORT, "--patcher=words", "--max_iters=5", "--eval_interval=3"]
    train(*run, "--out_dir=whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "evaluate", killed)
        train(*run, "--out_dir=parts")
    assert checkpoint("parts/ckpt.pt")["state"]["iter"] == 3
    train(*run, "--out_dir=parts", "--resume")
    whole, parts = (checkpoint(f"{out}/ckpt.pt")["model"] for out in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def n_parameters(given, hooks={}):
    with torch.device("meta"):
        model = STLM(STLMConfig(**{key: given[key] for key in T.SIZES & given.keys()}))
        hooks.get("edit", id)(model)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


@pytest.mark.parametrize("share", ["none", "mlp", "all"])
def test_shared_tensors_are_one(share, monkeypatch):
    """With as many parameters as quick.py, also after loading; and generation still is exact."""
    monkeypatch.setenv("SHARE", share)
    given, hooks = T.parse([path("share")])
    assert n_parameters(given, hooks) == n_parameters(T.parse([path("quick")])[0])
    model = random_model(n_layer=3)
    hooks["edit"](model)
    model = build("STLM", model.config, model.state_dict(), hooks["edit"]).eval()
    first, _, last = model.blocks
    assert (last.mlp.up.weight is first.mlp.up.weight) == (share != "none")
    assert (last.attn.qkv.weight is first.attn.qkv.weight) == (share == "all")
    new = model.generate(symbols(20)[None], 20, temperature=0)
    text = torch.cat([symbols(20)[None], new], dim=1)
    assert torch.equal(model(text)[0, 19:-1].argmax(-1), new[0])


def test_dropout_by_schedule(monkeypatch):
    module, hooks = experiment("dropout")
    monkeypatch.setattr(module, "max_iters", 4)
    model = random_model()
    hooks["edit"](model)
    x = symbols(60)[None]
    for schedule, active in [("none", "0000"), ("constant", "1111"), ("early", "1100"),
                             ("late", "0011")]:
        monkeypatch.setattr(module, "SCHEDULE", schedule)
        model.steps.zero_()
        changed = ""
        for _ in range(4):
            expected = model.eval()(x, x)
            changed += str(int(hooks["loss"](model.train(), x, x) != expected))
        assert changed == active


def test_what_is_ahead(monkeypatch):
    """Of abcdefgabc... each matrix learns its own distance; one that is left out gets no gradient,
    and without any the loss is the plain one."""
    module, hooks = experiment("multibyte")
    model = random_model()
    hooks["edit"](model)
    text = torch.arange(97, 104).repeat(10)[None, :65]
    text[:, 6::7] += 256  # ends of patches
    x, y = text[:, :-1], text[:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        hooks["loss"](model, x, y).backward()
        optimizer.step()
    z = model.decoder.output.view(1, 64, -1)
    for i, matrix in enumerate(model.ahead, start=1):
        logits = F.linear(z + matrix(z), model.embed.byte.weight)
        assert torch.equal(logits.argmax(-1)[:, 20:-i], y[:, 20 + i :])
    model.zero_grad()
    model.steps.fill_(module.STAGE)  # the second stage: the farthest is left out
    hooks["loss"](model, x, y).backward()
    assert [matrix.weight.grad is not None for matrix in model.ahead] == [True, True, False]
    model.steps.fill_(3 * module.STAGE)
    assert hooks["loss"](model, x, y).item() == model(x, y).item()


def test_distillation(workdir, monkeypatch):
    """The loss is the mixture by hand; a student that equals its teacher learns nothing from it
    alone; the teacher gets no gradient. Its text is trained on, the real text validates."""
    train(path("quick"), *SHORT, "--max_iters=5")
    module, hooks = experiment("distill")
    module.teacher.cache_clear()
    teacher = module.teacher("out/quick", "cpu")
    text = symbols(130).view(2, 65)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    student = random_model(max_patches=64)
    loss = hooks["loss"](student, x, y)
    loss.backward()
    log_p, q = student(x).log_softmax(-1), teacher(x).softmax(-1)
    by_hand = 0.5 * student(x, y) - 0.5 * (q * log_p).sum(-1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    monkeypatch.setattr(module, "SHARE", 1)
    same, _ = T.load_checkpoint("out/quick/best.pt")
    same.config.max_patches = 64
    hooks["loss"](same, x, y).backward()
    assert max(p.grad.abs().max() for p in same.parameters()) < 1e-6

    os.symlink("tiny", "data/stdlib")
    by_itself("distill", "3")
    written, val, real = (np.fromfile(f"data/{name}.bin", np.uint16) for name in
                          ("written/train", "written/val", "tiny/val"))
    assert np.array_equal(val, real) and 3 * 480 < len(written) < 6 * 520


def test_spin(workdir):
    """Its loss is log 2 when both selves agree, learning makes real text the likelier one, and the
    previous self gets no gradient."""
    for out in "quick", "judge", "spin_0", "spin_1":
        train(path("quick"), *SHORT, f"--out_dir=out/{out}", "--max_iters=5")
    module, hooks = experiment("spin")
    module.previous_self.cache_clear()
    x = torch.from_numpy(np.fromfile("data/tiny/train.bin", np.uint16)[:512].astype(np.int64))
    x = x.view(8, 64)
    model, _ = T.load_checkpoint("out/quick/best.pt")
    assert hooks["loss"](model, x, x).item() == pytest.approx(math.log(2), rel=1e-6)
    previous = module.previous_self("out/quick/best.pt", "cpu", 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        hooks["loss"](model, x, x).backward()
        optimizer.step()
    assert all(p.grad is None for p in previous.parameters())
    with torch.no_grad():
        real = x.view(-1, 4)
        written = module.rewrite(previous, real)
        assert torch.equal(written[:, :2], real[:, :2]) and not torch.equal(written, real)
        ratio = [(module.log_prob(model, text) - module.log_prob(previous, text)).mean()
                 for text in (real, written)]
        assert ratio[0] > ratio[1] + 1
        nats = model(x[:1, :-1], x[:1, 1:], reduction="none")[31:].sum()  # the second half, by hand
        assert module.log_prob(model, x[:1]).item() == pytest.approx(-nats.item(), rel=1e-4)
    os.symlink("tiny", "data/stdlib")
    assert len(re.findall(r"AUC [01]\.\d{3}\n", by_itself("spin"))) == 3


def rows_of_tiny(n, block_size):
    folder = Path("data/tiny")
    return T.Data(folder, "train", T.load_meta(folder), block_size).sequences(0, n, seed=0)


def test_noise_and_its_targets(workdir, monkeypatch):
    """Letters stand in input and targets, what the helper made in the input alone and never what
    stood there; about RATE of the bytes are hit, and a row is cut as its text would be."""
    train(path("quick"), *SHORT, "--out_dir=out/helper", "--max_iters=3", "--block_size=1000")
    module, hooks = experiment("denoise")
    module.helper.cache_clear()
    x, y = rows_of_tiny(4, 1000)

    def given_to_the_model(letters, made):
        monkeypatch.setattr(module, "LETTERS", letters)
        monkeypatch.setattr(module, "MADE", made)
        return hooks["loss"](lambda x, y: (x, y), x, y)

    same = given_to_the_model(0, 0)
    assert torch.equal(same[0], x) and torch.equal(same[1], y)
    noisy, noisy_y = given_to_the_model(1, 0)
    assert torch.equal(noisy[:, 1:], noisy_y[:, :-1])
    made, made_y = given_to_the_model(0, 1)
    assert torch.equal(made_y, y)
    for new in noisy, made:
        assert 0.03 < (new % 256 != x % 256).float().mean() < 0.07
        assert torch.equal(new == P.SEPARATOR, x == P.SEPARATOR)
    letters = noisy[noisy % 256 != x % 256] % 256
    assert letters.min() >= ord("a") and letters.max() <= ord("z") and len(letters.unique()) > 20
    for row in noisy[:, :-1][:, 16:]:  # a row may begin inside a patch
        kept = row[row != P.SEPARATOR].numpy()
        assert (P.encode(P.decode(row))[16:-1] != kept[16:-1]).mean() < 0.01
    row = torch.cat([x[0, :1], y[0]])
    assert (module.made(row)[1:] != row[1:] % 256).all()


def test_a_middle_comes_last_and_returns_to_its_place(workdir):
    module, _ = experiment("infill")
    model = random_model(block_size=200, max_patches=100)
    model.text = {"patcher": "words", "vocab": None}
    x, y = rows_of_tiny(8, 200)
    for row in torch.cat([x[:, :1], y], dim=1):
        for place, stop in (1, 2), (50, 120), (100, 197):
            turned = module.turn(row, place, stop)
            assert turned.shape == row.shape and turned[0] == turned[3 + stop] == P.SEPARATOR
            text, gap = bytes((turned % 256).tolist()), 2 + stop - place
            assert text[1:2] == module.AFTER and text[gap : gap + 1] == module.BEFORE
            back = text[gap + 1 : 3 + stop] + text[2:gap] + text[4 + stop :]
            assert back == bytes((row[:-4] % 256).tolist())
            if P.SEPARATOR not in row:  # training shows what a prompt shows
                prompt = S.document(model, text[1 : 3 + stop])
                assert torch.equal(prompt[:-1], turned[: 2 + stop])
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    ids = np.fromfile("data/tiny/val.bin", np.uint16)
    assert module.score(model, ids) == pytest.approx([9, 9])  # log2(512)
    train(path("infill"), *SHORT, "--block_size=300", "--max_iters=2")
    assert re.match(r"\d\.\d{4} bits per byte of middles, \d\.\d{4} with",
                    by_itself("infill", "data/tiny"))
    filled = by_itself("infill", "def né", "return")
    assert filled.startswith("def né[") and filled.endswith("]return\n")


def test_experts_of_all_neurons_equal_the_dense_model(monkeypatch):
    module, hooks = experiment("experts")
    x = symbols(60)[None]
    for k, same in (16, True), (4, False):
        monkeypatch.setattr(module, "K", k)
        model = random_model()
        hooks["edit"](model)
        assert torch.allclose(model(x), random_model()(x), rtol=1e-3, atol=1e-3) == same
    model(x, x).backward()  # the router learns, also of the experts that it does not pick
    assert all(block.mlp.router.weight.grad.abs().amin(1).min() > 0 for block in model.blocks)

    generator = torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0][:16]
    kind = (torch.arange(128) % 16)[torch.randperm(128, generator=generator)]
    order = module.group(directions[kind] + 0.01 * torch.randn(128, 32, generator=generator))
    assert order.sort().values.tolist() == list(range(128))  # each neuron in exactly one
    groups = kind[order].view(16, 8)  # those that fire together are in one
    assert (groups == groups.mode(1).values[:, None]).float().mean() > 0.8


def test_one_expert_of_several_from_the_start():
    """With equal MLPs it does not matter which one is chosen: only the router's factor is left."""
    _, hooks = experiment("experts_start")
    model, dense = random_model(), random_model().blocks[0].mlp
    hooks["edit"](model)
    experts, x = model.blocks[0].mlp, torch.randn(2, 30, 32)
    assert not experts(x).any()  # it begins as the identity, as all layers do
    for mlp in experts.mlps:
        mlp.load_state_dict(dense.state_dict())
    p = experts.router(x).softmax(-1)
    assert p.argmax(-1).unique().numel() > 1
    assert torch.allclose(experts(x), p.amax(-1, keepdim=True) * dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_frozen_weights_do_not_move_and_pictures_are_named(workdir):
    """A model that was trained on the ten words, in no order, learns which picture is which."""
    pytest.importorskip("sklearn")
    module, hooks = experiment("caption")
    total, trained = n_parameters(T.parse([path("caption")])[0], hooks)
    assert 0 < trained < 0.01 * total
    rng, words = random.Random(0), [P.decode(word).decode() for word in module.WORDS]
    for split, n in ("numbers.txt", 20000), ("val.txt", 500):
        Path(split).write_text("".join(rng.choice(words) for _ in range(n)))
    P.prepare(["numbers.txt"], name="tiny", val="val.txt")
    sizes = [*SHORT, "--d_byte=64"]
    train(path("quick"), *sizes, "--max_iters=150", "--batch_size=8", "--learning_rate=0.02")
    train(path("caption"), *sizes, "--max_iters=250")

    before, _ = T.load_checkpoint("out/quick/best.pt")
    model, _ = T.load_checkpoint("out/caption/best.pt", hooks["edit"])
    after = model.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.state_dict().items())
    x = symbols(60)[None]
    assert torch.equal(before(x), model(x))  # text without a picture is as it was
    pixels, labels = module.digits(held_out=True)
    with torch.no_grad():
        each = [module.nats(model, pixels, torch.full_like(labels, i)) for i in range(10)]
    assert (torch.stack(each).argmin(0) == labels).float().mean() > 0.7


def test_tic_tac_toe():
    """The perfect player never loses and beats a random one; results and role means are those of
    the games; an illegal move ends a game; the gradient makes what won likelier."""
    module, hooks = experiment("selfplay")
    torch.manual_seed(0)
    perfect, at_random = module.perfect_player, module.random_player
    assert (module.play([perfect, perfect], 50)[1] == 0).all()
    assert module.play([perfect, at_random], 200)[1][:, 0].mean() > 0.9
    assert module.play([at_random, perfect], 200)[1][:, 1].min() == 0

    def first(moves, board):
        return torch.zeros(len(board), dtype=torch.long)

    moves, results = module.play([first, first], 3)
    assert (moves[:, :2] == 0).all() and (moves[:, 2:] == -1).all()
    assert results.tolist() == [[0, module.ILLEGAL]] * 3
    moves, _ = module.play([first, first], 200, n_mixed=1)
    assert 80 < (moves[:, 0] == 0).sum() < 140 and (moves[:, 1] == 0).all()  # half of them: 111

    def row_by_row(moves, board):  # X takes the first row, O the second
        return torch.full((len(board),), moves.size(1) // 2 + 3 * (moves.size(1) % 2))

    moves, results = module.play([row_by_row, row_by_row], 2)
    assert moves[0].tolist() == [0, 3, 1, 4, 2, -1, -1, -1, -1]
    assert results.tolist() == [[1, -1]] * 2

    model = random_model(block_size=16)
    hooks["edit"](model)
    hooks["loss"](model, None, None).backward()
    assert model.role_means.abs().sum() > 0 and model.embed.byte.weight.grad.isfinite().all()
