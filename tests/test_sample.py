"""sample.py's promises: exact scores, text that is always whole, the same seed the same text."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import TINY, assert_one_clear_line, random_model, run_script, symbols

import prepare as P
import sample as S
import train as T
from model import GPT, STLMConfig, from_pretrained, save_pretrained

BYTES = [chr(i) for i in range(256)] + [""]  # a vocabulary whose tokens are the bytes
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small trained model in out/ and its data."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        P.prepare(["a.txt"], name="cats")
        T.train(*T.parse([*TINY, "--dataset=cats", "--out_dir=out", "--max_iters=150"]))
    return folder


@pytest.fixture
def model(trained):
    return S.load(str(trained / "out"))


class Says(GPT):
    """A GPT over bytes that always goes on with the same bytes and then ends its document."""

    def __init__(self, says):
        super().__init__(STLMConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=32))
        self.says, self.text = [*says, 256, *b"never shown"], {"patcher": "words", "vocab": BYTES}

    def forward(self, x, cache=None):
        cache.append(x)
        return self.next_one(cache)[:, None]

    def step(self, x, cache):
        cache.append(x[:, None])
        return self.next_one(cache)

    def next_one(self, cache):
        n_read = 2  # the separator and a prompt of one byte
        logits = torch.full((1, 257), -math.inf)
        logits[0, self.says[cache.n - n_read]] = 0.0
        return logits


# --- scoring --------------------------------------------------------------------------------------
def test_score_is_the_models_own_loss(model):
    text = "the cat sat on the dog. naïve!"
    bits, ends = S.score(model, text)
    raw = text.encode()
    ids = torch.tensor([511, *P.encode(raw).tolist()])
    with torch.no_grad():
        logp = model(ids[None, :-1])[0].log_softmax(-1)[range(len(raw)), ids[1:]]
    assert bits == pytest.approx(-logp.numpy() / math.log(2), abs=1e-4)
    assert ends.tolist() == (P.encode(raw) >= 256).tolist()
    known = len("the cat")
    assert bits[:known].mean() < bits[-len("naïve!".encode()):].mean()  # it knows cats


def test_long_texts_are_scored_in_windows(model):
    """As many patches as there are, more than training had room for, and every byte once."""
    text = b"x " * 500
    ids, n = S.document(model, text), model.config.block_size
    bits, _ = S.score(model, text)
    assert len(bits) == 1000
    for start in range(0, 1000, n):
        x, y = ids[start : start + n][:1000 - start], ids[start + 1 : start + n + 1]
        with torch.no_grad():
            logp = model(x[None])[0].log_softmax(-1)[range(len(y)), y]
        found = bits[start : start + n]
        assert found == pytest.approx(-logp.numpy() / math.log(2), abs=1e-4)


def test_a_longer_block_size_remembers_more(trained, monkeypatch):
    """All of the validation text, in sequences as long as load() is told; by default as the run."""
    monkeypatch.chdir(trained)
    meta = T.load_meta(Path("data/cats"))

    def figure(**options):
        model = S.load("out", device="cpu", **options)
        data = T.Data(Path("data/cats"), "val", meta, model.config.block_size)
        bf16 = T.choose_dtype(torch.device("cpu")) == torch.bfloat16
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        return T.evaluate(model, data, 4, autocast)

    last = json.loads((trained / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["all_of_val"] and figure() == pytest.approx(last["val_bpb"], abs=2e-4)
    assert figure(block_size=1000) < figure(block_size=8) - 0.05


# --- writing --------------------------------------------------------------------------------------
def test_writes_what_it_learned(model):
    assert S.write(model, "the cat sat ", temperature=0, max_new_bytes=12) == "on the mat. "
    assert S.write(model, "the", seed=3) == S.write(model, "the", seed=3)
    warm = {"temperature": 2, "max_new_bytes": 40}
    assert S.write(model, "the", seed=3, **warm) != S.write(model, "the", seed=4, **warm)
    assert S.write(model, "the", max_new_bytes=0) == ""


def test_a_prompt_may_stop_inside_a_patch(model):
    """Whether "the" ends its patch is not known yet: the model decides, and goes on from there."""
    assert S.write(model, "the cat sa", temperature=0, max_new_bytes=5) == "t on "
    generator = torch.Generator().manual_seed(0)
    ids = S.decide_last_flag(model, S.document(model, b"the "), generator=generator)
    assert P.decode(ids.numpy()) == b"the " and ids[-1] == ord(" ") + 256

    stray = S.document(model, b"the \xff")  # this byte and a flag would be a separator
    for seed in range(20):
        assert S.decide_last_flag(model, stray, generator=generator.manual_seed(seed)).equal(stray)
    long = S.document(model, b"the cat sat on the mat. " * 100)
    assert len(S.decide_last_flag(model, long, generator=generator)) == len(long)


def test_streams_whole_characters():
    """A model of noise writes all sorts of bytes; a terminal gets nothing that it would obey."""
    model = random_model()
    model.text = {"patcher": "words", "vocab": None}
    with torch.no_grad():
        model.embed.byte.weight[511] = 0  # it should not end its document at once
    pieces = list(S.stream(model, "é", max_new_bytes=400, temperature=3.0, seed=1))
    assert len("".join(pieces)) > 50
    for piece in pieces:
        piece.encode()  # no lone surrogates: a terminal can print it
    shown = P.printable("".join(pieces) + "\x1b[2J\x07\u202e")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_pieces_are_never_half_a_character_or_half_a_line_end():
    text = "日本 naïve 😀\r\nx\ry\n"
    pieces = list(S.stream(Says(text.encode()), "a"))
    assert "".join(pieces) == text and "\r\n" in "".join(map(P.printable, pieces))
    assert not any(piece.endswith("\r") for piece in pieces)
    assert S.write(Says("日本".encode()), "a", max_new_bytes=4) == "日\ufffd"
    assert S.write(Says(b"a\xffb\xe6"), "a") == "a\ufffdb\ufffd"
    model = Says([200, 200])
    model.text["vocab"] = [*BYTES[:200], "token", *BYTES[201:]]
    for n, expected in [(4, ""), (9, "token"), (10, "tokentoken"), (300, "tokentoken")]:
        assert S.write(model, "a", max_new_bytes=n) == expected


def test_numbers_at_the_ends_of_their_ranges(model):
    """None of them makes the model write anything but the text that it has learned to write."""
    likeliest = S.write(model, "the cat sat ", temperature=0, max_new_bytes=12)
    for options in ({"temperature": 1e-40}, {"temperature": 1e-3}, {"top_k": 1}, {"top_p": 0.001}):
        for seed in (0, 10**18):
            options |= {"max_new_bytes": 12, "seed": seed}
            assert S.write(model, "the cat sat ", **options) == likeliest
    assert S.write(model, "the", temperature=100, top_k=10**6, top_p=1, seed=0, max_new_bytes=40)


def test_the_baseline_writes_and_scores(workdir, gpt2):
    P.prepare(["texts"], name="tiny", tokenizer="gpt2", val="val.txt")
    T.train(*T.parse([*TINY, "--dataset=tiny", "--tokenizer=gpt2", "--model=gpt", "--n_embd=16",
                     "--out_dir=baseline", "--max_iters=3"]))
    model = S.load("baseline")
    assert len(S.write(model, "the model", max_new_bytes=30, seed=0).encode()) > 0
    text = "byte patch naïve"
    bits, ends = S.score(model, text)
    tokens = P.tokenize(text.encode(), gpt2)
    assert len(bits) == len(text.encode()) and ends.sum() == len(tokens)
    assert bits.sum() == pytest.approx(len(tokens) * math.log2(50257), rel=0.2)  # hardly trained
    assert np.isfinite(bits).all()
    lengths = [len(gpt2[token]) for token in tokens]
    assert all(len(set(part.round(3))) == 1 for part in np.split(bits, np.cumsum(lengths)[:-1]))


# --- painting -------------------------------------------------------------------------------------
SHOWN = [  # text, its characters as they are shown
    (b"a b\tc\n", ["a", " ", "b", "    ", "c", "\n"]),
    (b"a\r\nb\rc", ["a", "\n", "b", r"\r", "c"]),
    (b"\x1b[2J\x07\x00\x7f", [r"\x1b", "[", "2", "J", r"\x07", r"\x00", r"\x7f"]),
    ("\u202ex\u2066\x9b".encode(), [r"\u202e", "x", r"\u2066", r"\x9b"]),
    (b"\xff\xe9t\xe6\x97", [r"\xff", r"\xe9", "t", r"\xe6", r"\x97"]),
    ("日本\u3000\xa0\u202f".encode(), ["日", "本", "\u3000", "\xa0", "\u202f"]),
    ("ne\u0301 👨\u200d👩 हिन्".encode(), ["n", "e\u0301", " ", "👨\u200d👩", " ", "हि", "न्"]),
    (b"<&>\"'", list("<&>\"'")),
    ("\ufffe\uffff\ufffd\U0001fffe".encode(), ["\ufffe", "\uffff", "\ufffd", "\U0001fffe"]),
]


@pytest.mark.parametrize("text, expected", SHOWN)
def test_what_is_painted(text, expected):
    """Every character once, with all of its bits; nothing that a terminal or a browser obeys."""
    bits = np.linspace(0.5, 9, len(text))
    ends = np.arange(len(text)) % 3 == 2
    painted = list(S.characters(text, bits, ends))
    assert [c for c, *_ in painted] == expected
    assert sum(surprise for _, surprise, *_ in painted) == pytest.approx(bits.sum())

    terminal = S.paint_terminal(text, bits, ends)
    plain = re.sub(r"\x1b\[[\d;]*m", "", terminal.replace("\x1b[36m|", ""))
    assert plain == "".join(c for c, *_ in painted).replace("\n", " \n")
    assert terminal.count("\x1b[36m|") == sum(end for *_, end in painted)

    picture = ElementTree.fromstring(S.paint_svg(text, bits, ends))
    drawn = [[part.text for part in cell if part.text] for cell in picture.iter(SVG + "g")]
    in_xml = str.maketrans("\ufffe\uffff", "??")
    assert drawn == [[f"{b:.2f} bits", c.translate(in_xml)] for c, b, *_ in painted]


def test_a_picture_has_room_for_everything():
    """Lines are cut at the right edge, and wide characters take two columns."""
    text = ("x" * 250 + "\n" + "日" * 99).encode()
    everywhere = np.ones(len(text), bool)
    picture = ElementTree.fromstring(S.paint_svg(text, 1.0 * everywhere, everywhere))
    width, height = int(picture.get("width")), int(picture.get("height"))
    taken = set()
    for cell in picture.iter(SVG + "g"):
        left, top = map(int, re.findall(r"\d+", cell.get("transform")))
        right = left + int(cell.find(SVG + "rect").get("width"))
        for column in range(left, right, 8):
            assert (column, top) not in taken
            taken.add((column, top))
        assert right <= width and top + 18 <= height
    assert len(taken) == 251 + 2 * 99


# --- the command line -----------------------------------------------------------------------------
def run_here(arguments, patch, capture):
    """Runs sample.py as a user does, but in this process. Returns its exit code, output, errors."""
    patch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    capture.readouterr()
    try:
        P.run(S.main)
        return 0, *capture.readouterr()
    except SystemExit as stop:
        return stop.code, *capture.readouterr()


def test_scores_a_file_into_a_picture(trained, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = b'<script>alert("x")</script>&amp;\x1b[31m\xff\xfe'
    (tmp_path / "t.txt").write_bytes(text)
    bits, ends = S.score(model, text)
    for name in ("o.html", "o.svg"):
        code, out, err = run_here([f"--out_dir={trained}/out", "--score=FILE:t.txt",
                                   f"--html={name}"], monkeypatch, capsys)
        assert (code, err) == (0, "")
        assert f"{bits.mean():.4f} bits per byte over {len(text)} bytes" in out
        page = (tmp_path / name).read_text("ascii")
        assert "<script" not in page and "\x1b" not in page and "&lt;" in page
        titles = re.findall(r"<title>[\d.]+ bits</title>", page)
        assert len(titles) == len(text.decode("utf-8", "surrogateescape"))
        drawn = ElementTree.fromstring(page).findall(f"{SVG}g/{SVG}text")
        assert [cell.text for cell in drawn] == [c for c, *_ in S.characters(text, bits, ends)]


def test_outputs_follow_links_and_spare_devices(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real.html").write_text("old")
    os.symlink("real.html", "link.html")
    os.symlink("new.html", "dangling.html")
    os.symlink("/dev/null", "null.html")
    os.symlink("/dev/stdout", "stdout.html")
    os.mkfifo("fifo.html")
    (tmp_path / "folder.html").mkdir()
    common = [f"--out_dir={trained}/out", "--score=abc"]
    for name, target in [("link.html", "real.html"), ("dangling.html", "new.html")]:
        assert run_here([*common, f"--html={name}"], monkeypatch, capsys)[0] == 0
        assert os.path.islink(name) and (tmp_path / target).read_text().startswith("<svg")
    for name in ("fifo.html", "folder.html", "null.html", "no/such/folder.html", "letter.txt"):
        code, _, err = run_here([*common, f"--html={name}"], monkeypatch, capsys)
        assert code == 2 and err.count("\n") == 1 and name in err
    done = run_script("sample.py", *common, "--html=stdout.html", cwd=tmp_path)
    assert_one_clear_line(done, "stdout.html")
    assert not os.path.isfile("/dev/null") and not os.path.isfile("fifo.html")
    assert not [name for name in os.listdir() if "tmp" in name]


def test_command_line(trained):
    common = [f"--out_dir={trained}/out", "--max_new_bytes=24", "--seed=1", "--device=cpu"]
    done = run_script("sample.py", *common, "--prompt=the cat", "--num_samples=2", cwd=trained)
    assert done.returncode == 0 and done.stdout.count("the cat") >= 2 and "-" * 80 in done.stdout
    done = run_script("sample.py", *common, cwd=trained, input="the cat\nthe mat\n\nthe end\n")
    assert done.returncode == 0 and "the cat" in done.stdout and "the mat" in done.stdout
    assert done.stdout.count("prompt> ") == 3 and "the end" not in done.stdout
    done = run_script("sample.py", *common, "--score=the\x1b cat", cwd=trained)
    assert "\\x1b" in done.stdout and "bits per byte" in done.stdout


@pytest.mark.parametrize("arguments, expected", [
    (["--prompt="], "zero bytes"),
    (["--score="], "zero bytes"),
    (["--prompt=FILE:missing"], "missing"),
    (["--score=FILE:missing"], "missing"),
    (["--prompt=FILE:."], "directory"),
    (["--prompt=a", "--out_dir=nowhere"], "nowhere"),
    (["--prompt=a", "--score=a"], "not allowed with"),
    (["--prompt=a", "--html=a.html"], "expected --score too"),
    (["--prompt=a", "--max_new_byte=2"], "unrecognized arguments"),
    (["--prompt=a", "--device=abacus"], "abacus"),
    (["--prompt=a", "--top_p=2"], "top_p=2.0: expected 0.001 to 1"),
    (["--prompt=a", "--top_p=0"], "top_p=0.0: expected 0.001 to 1"),
    (["--prompt=a", "--top_p=nan"], "top_p=nan: expected"),
    (["--prompt=a", "--temperature=nan"], "temperature=nan: expected 0.0 to 100"),
    (["--prompt=a", "--temperature=inf"], "temperature=inf: expected"),
    (["--prompt=a", "--temperature=-1"], "temperature=-1.0: expected"),
    (["--prompt=a", "--temperature=warm"], "invalid float value"),
    (["--prompt=a", "--top_k=0"], "top_k=0: expected 1 to"),
    (["--prompt=a", "--top_k=1.5"], "invalid int value"),
    (["--prompt=a", f"--seed={10**20}"], "expected 0 to"),
    (["--prompt=a", "--seed=-1"], "seed=-1: expected 0 to"),
    (["--prompt=a", "--max_new_bytes=-1"], "max_new_bytes=-1: expected 0 to"),
    (["--prompt=a", "--num_samples=0"], "num_samples=0: expected 1 to"),
    (["--prompt=a", "--block_size=0"], "block_size=0: expected 1 to"),
    (["--score=a", f"--block_size={2**40}"], "expected 1 to"),
])
def test_bad_options_get_one_clear_line(arguments, expected, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    code, out, err = run_here(["--out_dir=out", *arguments], monkeypatch, capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1 and expected in err


def test_a_notebook_gets_the_same_checks(model):
    for options in ({"temperature": math.nan}, {"top_p": 0}, {"top_k": 0}, {"seed": -1}):
        with pytest.raises(P.BadInput, match="expected"):
            S.write(model, "the", **options)
    for empty in ("", b""):
        with pytest.raises(P.BadInput, match="zero bytes"):
            S.write(model, empty)
        with pytest.raises(P.BadInput, match="zero bytes"):
            S.score(model, empty)


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "cp1252"}, {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
])
def test_output_and_input_of_any_kind(trained, environment):
    """What cannot be shown is replaced, and bytes that are not UTF-8 are taken as they are."""
    common = [f"--out_dir={trained}/out", "--max_new_bytes=5", "--device=cpu"]
    environment = os.environ | environment
    done = run_script("sample.py", *common, "--score=日本 naïve 😀", cwd=trained, env=environment,
                      errors="replace")
    assert done.returncode == 0 and "over 18 bytes" in done.stdout, done.stderr
    done = run_script("sample.py", *common, cwd=trained, env=environment, errors="surrogateescape",
                      input="the 日本 \udcff\udce9\r\n")
    assert done.returncode == 0 and "the " in done.stdout, done.stderr


def test_closed_input_is_one_clear_line(trained):
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, S.__file__, "--out_dir=out"]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True)
    assert_one_clear_line(done, "--prompt --score --page is required")


# --- weights that travel --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stlm", "gpt"])
def test_weights_that_travel(kind, dtype, tmp_path):
    """save_pretrained(), from_pretrained(): the same logits, one table; load() refuses damage."""
    safetensors = pytest.importorskip("safetensors")
    sizes = STLMConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    model = random_model() if kind == "stlm" else GPT(sizes)
    model.to(dtype).eval()
    model.text = {"patcher": "words", "vocab": None if kind == "stlm" else BYTES}
    folder = tmp_path / "a"
    save_pretrained(model, folder)
    again = from_pretrained(folder)
    x = symbols(24)[None] % 257
    with torch.no_grad():
        assert again(x).equal(model(x)) and next(again.parameters()).dtype == dtype
    assert type(again) is type(model) and again.text == model.text and not again.training
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        n_stored = sum(file.get_tensor(name).numel() for name in file.keys())
    assert n_stored == sum(p.numel() for p in model.parameters())
    loaded = S.load(folder, device="cpu")
    options = {"seed": 1, "max_new_bytes": 20}
    assert S.write(loaded, "ab ", **options) == S.write(model, "ab ", **options)
    assert np.array_equal(S.score(loaded, "ab cd")[0], S.score(model, "ab cd")[0])

    about = json.loads((folder / "config.json").read_text())
    for key, change in [("sizes", {"n_layer": 3}), ("sizes", {"n_layer": 10**9}),
                        ("sizes", {"block_size": 2**40}), ("sizes", {"n_embd": -32}),
                        ("sizes", {"n_head": 0}), ("sizes", {"odd": 1}), ("model", "Other"),
                        ("model", "GPT" if kind == "stlm" else "STLM"), ("sizes", None)]:
        new = about["sizes"] | change if isinstance(change, dict) else change
        (folder / "config.json").write_text(json.dumps(about | {key: new}))
        with pytest.raises(P.BadInput, match="holds no model of save_pretrained"):
            S.load(folder)
    (folder / "config.json").write_text(json.dumps(about))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(P.BadInput, match="holds no model of save_pretrained"):
        S.load(folder)
