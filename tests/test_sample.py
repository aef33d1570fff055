"""sample.py's promises: exact scores, text that is always whole, the same seed the same text."""
import json
import math
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_clear_line, random_model, run_script, symbols

import prepare as P
import sample as S
import train as T
from model import GPT, STLM, STLMConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small trained model in out/ and its data."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        P.prepare(["a.txt"], name="cats")
        T.train(T.parse([*TINY, "--dataset=cats", "--out_dir=out", "--max_iters=150"]))
    return folder


def test_score_is_the_models_own_loss(trained):
    model, text = S.load(str(trained / "out")), "the cat sat on the dog. naïve!"
    bits, ends = S.score(model, text)
    raw = text.encode()
    ids = torch.tensor([511, *P.encode(raw).tolist()])
    with torch.no_grad():
        logp = model(ids[None, :-1])[0][0].log_softmax(-1)[range(len(raw)), ids[1:]]
    assert bits == pytest.approx(-logp.numpy() / math.log(2), abs=1e-4)
    assert ends.tolist() == (P.encode(raw) >= 256).tolist()
    assert len(S.score(model, "x " * 500)[0]) == 1000  # longer than block_size
    assert bits[: len("the cat")].mean() < bits[-len("naïve!".encode()) :].mean()  # it knows cats


def test_writes_what_it_learned(trained):
    model = S.load(str(trained / "out"))
    text = S.write(model, "the cat sat ", temperature=0, max_new_bytes=12)
    assert text == "on the mat. "
    assert S.write(model, "the", seed=3) == S.write(model, "the", seed=3)


def test_a_prompt_may_stop_inside_a_patch(trained):
    """Whether "the" ends its patch is not known yet: the model decides, and goes on as if it had read it all."""
    model = S.load(str(trained / "out"))
    assert S.write(model, "the cat sa", temperature=0, max_new_bytes=5) == "t on "
    settled = S.settle(model, S.document(model, b"the "), torch.Generator().manual_seed(0))
    assert P.decode(settled.numpy()) == b"the " and settled[-1] == ord(" ") + 256


def test_streams_whole_characters():
    """A model of noise writes all sorts of bytes; what is shown is valid text without control characters."""
    model = random_model()
    model.text = {"patcher": "words", "vocab": None}
    with torch.no_grad():
        model.wte.weight[511] = 0  # it should not end its document at once
    pieces = list(S.stream(model, "é", max_new_bytes=400, temperature=3.0, seed=1))
    assert len("".join(pieces)) > 50
    for piece in pieces:
        piece.encode()  # no lone surrogates: a terminal can print it
    shown = S.printable("".join(pieces) + "\x1b[2J\x07\u202e")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_html_escapes_everything(trained, tmp_path):
    text = b'<script>alert("x")</script>&amp;\x1b[31m\xff\xfe'
    (tmp_path / "t.txt").write_bytes(text)
    done = run_script("sample.py", f"--out_dir={trained}/out", f"--score=FILE:{tmp_path}/t.txt", f"--html={tmp_path}/o.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "o.html").read_text()
    body = page[page.index("</p>") :]
    assert "<script" not in body and "\x1b" not in body and "&lt;" in body
    assert len(re.findall(r'title="[\d.]+ bits"', body)) == len(text.decode("utf-8", "surrogateescape"))
    bits, _ = S.score(S.load(str(trained / "out")), text)
    assert f"{bits.mean():.4f} bits per byte over {len(text)} bytes" in done.stdout
    run_script("sample.py", f"--out_dir={trained}/out", f"--score=FILE:{tmp_path}/t.txt", f"--html={tmp_path}/o.svg", cwd=tmp_path)
    shown = [c for c, _, _ in S.characters(text, bits, np.zeros(len(text), bool))]
    assert [t.text for t in ElementTree.parse(tmp_path / "o.svg").iter("{http://www.w3.org/2000/svg}text")] == shown


def test_command_line(trained):
    common = [f"--out_dir={trained}/out", "--max_new_bytes=24", "--seed=1", "--device=cpu"]
    done = run_script("sample.py", *common, "--prompt=the cat", "--num_samples=2", cwd=trained)
    assert done.returncode == 0 and done.stdout.count("the cat") >= 2 and "-" * 80 in done.stdout
    (trained / "p.txt").write_text("the mat")
    assert run_script("sample.py", *common, "--prompt=FILE:p.txt", cwd=trained).stdout.startswith("the mat")
    done = run_script("sample.py", *common, "--prompt=the cat", "--bf16", cwd=trained)
    assert done.returncode == 0 and len(done.stdout.encode()) > len("the cat\n")
    done = run_script("sample.py", *common, cwd=trained, input="the cat\n\n")
    assert done.returncode == 0 and "the cat" in done.stdout
    done = run_script("sample.py", *common, "--score=the\x1b cat", cwd=trained)
    assert "\\x1b" in done.stdout and "bits per byte" in done.stdout
    done = run_script("sample.py", *common, "--prompt=a", "--compile", cwd=trained, env=os.environ | {"CXX": "no-such-compiler"})
    assert_one_clear_line(done, "--compile does not work here", "no-such-compiler")
    for arguments, expected in [
        (["--prompt="], "the prompt has zero bytes"),
        (["--score="], "zero bytes"),
        (["--prompt=FILE:missing"], "missing"),
        (["--prompt=a", "--out_dir=nowhere"], "no checkpoint nowhere"),
        (["--prompt=a", "--top_p=2"], "expected"),
        (["--prompt=a", "--html=a.html"], "--html only with it"),
        (["--score=a", "--compile"], "--compile and --bf16 without --score"),
        (["--prompt=a", "--max_new_byte=2"], "unrecognized arguments"),
        (["--prompt=a", "--block_size=0"], "block_size=0: expected 1 to"),
    ]:
        assert_one_clear_line(run_script("sample.py", *common, *arguments, cwd=trained), expected)


def test_validation_in_longer_rows(trained):
    """bench.py --val scores all of the text in rows as long as it is told to; in those of training it prints the run's figure."""
    figure = lambda *options: float(run_script("bench.py", "--val", "out", "data/cats", *options, cwd=trained).stdout.split()[-1])
    last = json.loads((trained / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["all_of_val"] and figure() == pytest.approx(last["val_bpb"], abs=2e-4)
    assert figure("--block_size=1000") < figure("--block_size=8") - 0.05  # it remembers more


def test_the_rival_writes_and_scores(workdir, gpt2):
    P.prepare(["texts"], name="tiny", tokenizer="gpt2", val="val.txt")
    T.train(T.parse([*TINY, "--dataset=tiny", "--tokenizer=gpt2", "--model=gpt", "--out_dir=rival", "--max_iters=3", "--n_embd=16"]))
    model = S.load("rival")
    assert len(S.write(model, "the model", max_new_bytes=30, seed=0).encode()) > 0
    text = "byte patch naïve"
    bits, ends = S.score(model, text)
    tokens = P.tokenize(text.encode(), gpt2)
    assert len(bits) == len(text.encode()) and ends.sum() == len(tokens)
    assert bits.sum() == pytest.approx(len(tokens) * math.log2(50257), rel=0.2)  # hardly trained
    assert np.isfinite(bits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stlm", "gpt"])
def test_weights_that_travel(kind, dtype, tmp_path):
    """save_pretrained() and from_pretrained(): the same logits, one table, and damaged folders get one clear line."""
    safetensors = pytest.importorskip("safetensors")
    model = random_model() if kind == "stlm" else GPT(STLMConfig(block_size=32, n_layer=2, n_head=2, n_embd=32), 300)
    model.to(dtype).eval()
    model.text = {"patcher": "words", "vocab": None}
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    x = symbols(24)[None] % 300
    with torch.no_grad():
        assert again(x)[0].dtype == dtype and torch.equal(again(x)[0], model(x)[0])
    assert again.text == model.text and not again.training
    with safetensors.safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == sum(p.numel() for p in model.parameters())
    if kind == "stlm":
        torch.manual_seed(0)
        text = S.write(S.load(tmp_path / "a"), "ab ", seed=1, max_new_bytes=20)  # sample.py's functions take it too
        assert text == S.write(model, "ab ", seed=1, max_new_bytes=20)

    other = GPT if kind == "stlm" else STLM
    about = json.loads((tmp_path / "a" / "config.json").read_text())
    for change in ({"n_layer": 3}, {"n_layer": 10**9}, {"block_size": 2**40}, {"n_embd": -32}, {"n_head": 0}, {"odd": 1}):
        damaged = about | {"sizes": about["sizes"] | change}
        (tmp_path / "a" / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(P.BadInput, match="expected a folder with config.json and model.safetensors"):
            type(model).from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(about))
    with pytest.raises(P.BadInput, match="it is a"):
        other.from_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(P.BadInput, match="save_pretrained"):
        type(model).from_pretrained(tmp_path / "a")
