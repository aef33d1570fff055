"""prepare.py's promises: exact round trips, an honest split, the same bytes every time, nothing
half-written, one clear line where something is wrong."""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_clear_line, prose, random_model, read_bin, run_script

import prepare as P
from model import save_pretrained

def random_texts(n, longest=300):
    rng = random.Random(0)
    alphabets = [range(256), b"ab \n", b" \n\t", b"a", range(0x80, 0xC0), [0xFF, 0x20, 0x61],
                 "日本語 ".encode(), b"x = (y)\r\n\0"]
    for _ in range(n):
        yield bytes(rng.choices(rng.choice(alphabets), k=rng.randrange(longest)))


def cut(text):
    marked = b"".join(bytes([s & 255]) + b"\xff" * (s >= 256) for s in P.encode(text).tolist())
    return marked.removesuffix(b"\xff").split(b"\xff")


def test_words_against_regular_expressions():
    for text in [*random_texts(500), prose(5000)]:
        text = bytes(b & 0x7F for b in text)
        marked = re.sub(rb"\W(?=\w)|(?<=\S)\s", rb"\g<0>" + b"\xff", text).removesuffix(b"\xff")
        runs = marked.split(b"\xff")
        assert cut(text) == [run[i : i + 16] for run in runs for i in range(0, len(run) or 1, 16)]


def test_words_by_example():
    code = b'if x:\n    return foo("bar")  # done\n'
    assert b"|".join(cut(code)) == b'if |x:\n|    |return |foo("|bar") | # |done\n'
    assert b"|".join(cut(b"don't stop, I said")) == b"don'|t |stop, |I |said"
    assert b"|".join(cut(b"x = 1_000")) == b"x |= |1_000"


SCRIPTS = """“|Don’|t,” |said |she |— |“|stop…”
naïve |café, |Привіт, |«|світе»!
这|是|测|试，|你|好。|Hello|世|界
食|べ|る|コ|ピー|日|本|語。　|東|京|の|人々
한국어 |문장이다 |यह |एक |है। |שלום
ส|วั|ส|ดี|ค|รั|บ |ABC|ก|ข
用|Python|编|程|2024|年
😀👩👩👧|😀 |a😀|b"""


@pytest.mark.parametrize("line", SCRIPTS.split("\n"))
def test_words_of_every_script(line):
    """Punctuation of any script is no letter; scripts without spaces get a patch for each letter;
    no patch ends inside a character."""
    patches = cut(line.replace("|", "").encode())
    assert "|".join(patch.decode() for patch in patches) == line  # decode() raises inside of one


def test_words_of_long_runs():
    """A run that is longer than a patch is cut between characters; bytes that are not UTF-8 come
    back and do not change how the text around them is cut."""
    for character in "a", "é", "한", "😀":
        n = len(character.encode())
        patches = cut(character.encode() * 50)
        assert {len(patch) for patch in patches[:-1]} == {16 // n * n}
    whole, broken = "这是一个测试，你好".encode(), b"\xe8\xbf a"
    assert cut(whole + broken)[:4] == cut(whole)[:4]


@pytest.mark.parametrize("patcher", ["words", "gpt2", "fixed:1", "fixed:5"])
def test_round_trip(patcher, request):
    if patcher == "gpt2":
        request.getfixturevalue("gpt2")
    for text in random_texts(400):
        symbols = P.encode(text, patcher)
        assert symbols.dtype == np.uint16 and len(symbols) == len(text)
        assert P.SEPARATOR not in symbols
        assert P.decode(symbols) == text
    assert P.decode(np.append(P.encode(b"ab", patcher), P.SEPARATOR)) == b"ab"


def test_gpt2_and_its_tokens(gpt2):
    import tiktoken

    text = prose(5000)
    tokens = tiktoken.get_encoding("gpt2").encode_ordinary(text.decode())
    assert P.tokenize(text, gpt2).tolist() == tokens
    ends = np.flatnonzero(P.encode(text, "gpt2") >= 256) + 1
    assert ends.tolist() == np.cumsum([len(gpt2[t]) for t in tokens]).tolist()
    for text in random_texts(200):
        assert P.decode(P.tokenize(text, gpt2), gpt2) == text


def test_bpe(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    (tmp_path / "a.txt").write_bytes(prose(30_000))
    folder = P.prepare([str(tmp_path / "a.txt")], tokenizer="bpe:400", data_dir=tmp_path)
    vocab = json.loads((folder / "meta.json").read_text())["vocab"]
    assert len(vocab) <= 400 and vocab[-1] == "" and len(set(vocab)) == len(vocab)
    assert {v for v in vocab if len(v) == 1} == set(map(chr, range(256)))
    ids = np.concatenate([read_bin(folder / "train.bin"), read_bin(folder / "val.bin")])
    assert P.decode(ids, vocab) == prose(30_000)
    assert len(ids) < 15_000  # it compresses
    for text in random_texts(100):
        assert P.decode(P.tokenize(text, vocab), vocab) == text


def read_documents(path):
    ids = read_bin(path)
    assert ids[-1] == P.SEPARATOR
    return [P.decode(part) for part in np.split(ids, np.flatnonzero(ids == P.SEPARATOR) + 1)[:-1]]


def test_every_kind_of_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("folder/sub")
    os.makedirs("folder/.hidden")
    texts = [b"plain\r\ntext\x01\xff\xfe", b"gz " * 9, b"xz " * 9, "json é \n".encode(),
             b"second line", b"deep", b"from a pipe"]
    open("folder/1.txt", "wb").write(texts[0])
    gzip.open("folder/2.txt.GZ", "wb").write(texts[1])
    lzma.open("folder/3.xz", "wb").write(texts[2])
    lines = [json.dumps({"text": text}) for text in (texts[3].decode(), texts[4].decode(), None)]
    open("4.jsonl", "w").write("\r\n".join(lines) + "\n\n")  # and no text, and a blank line
    open("folder/sub/5", "wb").write(texts[5])
    open("folder/6.empty", "wb").close()
    open("folder/7.pyc", "wb").write(b"\x61\r\r\n\0\0\0\0")  # binary: left out
    open("folder/.hidden/8", "wb").write(b"hidden")
    os.symlink("..", "folder/sub/loop")
    done = run_script("prepare.py", "folder", "4.jsonl", "-", "--name=all", "--val=folder/sub",
                      cwd=tmp_path, input="from a pipe")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out, as they are empty: 3 ") == 1
    documents = read_documents("data/all/train.bin")
    assert documents == [texts[i] for i in (0, 1, 2, 3, 4, 6)]  # in sorted order, 5 is held out
    assert "left out, as it is no text: folder/7.pyc\n" in done.stdout
    assert read_documents("data/all/val.bin") == [texts[5]]
    meta = json.loads(open("data/all/meta.json").read())
    assert meta["train"]["bytes"] == sum(map(len, documents)) and meta["patcher"] == "words"
    stored = open("data/all/train.bin", "rb").read() + open("data/all/val.bin", "rb").read()
    assert meta["sha256"] == hashlib.sha256(stored).hexdigest()


def test_streams(tmp_path):
    """Standard input and process substitution, also where the text is needed twice."""
    pytest.importorskip("tokenizers")
    (tmp_path / "a").write_bytes(prose(20_000))
    script = f"{sys.executable} {ROOT}/prepare.py"
    for command in (f"cat a | {script} - --name=x", f"{script} <(cat a) --name=x",
                    f"{script} - --tokenizer=bpe:300 --name=x < a", f"{script} a --name=y 2>&-"):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for folder in tmp_path.glob("data/*"):
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(prose(20_000))
    done = subprocess.run(["bash", "-c", f"{script} - <&-"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert_one_clear_line(done, "standard input is closed")


def test_large_files_are_cut_where_nothing_straddles(tmp_path, gpt2):
    """A document of several pieces gives the same symbols as its text in one go."""
    paragraphs = prose(100_000) * 14, b"A word, and more.\n\n" * 100_000
    for text in (*paragraphs, b"x" * (3 * P.PIECE), "日本語".encode() * 300_000):
        (tmp_path / "big.txt").write_bytes(text)
        for patcher in ("words", "gpt2") if text in paragraphs else ("words",):
            folder = P.prepare([str(tmp_path / "big.txt")], patcher=patcher, data_dir=tmp_path)
            parts = [read_documents(folder / f"{split}.bin") for split in ("train", "val")]
            assert len(parts[0]) == len(parts[1]) == 1 and parts[0][0] + parts[1][0] == text
            assert abs(len(parts[1][0]) - 0.05 * len(text)) < 100
            for split, (part,) in zip(("train", "val"), parts):
                ids = read_bin(folder / f"{split}.bin")
                part.decode()  # not cut inside a character
                if text in paragraphs:
                    assert np.array_equal(ids[:-1], P.encode(part, patcher))


@pytest.mark.parametrize("sizes", [
    [30_000], [500, 60_000], [60_000, 500], [0] + [9000] * 6, [0, 20], [10], [100] * 300,
    [5, 0, 200_000, 3], list(range(200)),
])
def test_the_share_held_out(sizes, tmp_path):
    """About val_fraction of the text is held out, whatever the number and sizes of documents."""
    for fraction in (0.05, 0.3):
        texts = [prose(size, seed=i)[:size] for i, size in enumerate(sizes)]
        for i, text in enumerate(texts):
            (tmp_path / f"{i:03}.txt").write_bytes(text)
        files = map(str, sorted(tmp_path.glob("*.txt")))
        folder = P.prepare(list(files), "x", val_fraction=fraction, data_dir=tmp_path)
        train, val = (read_documents(folder / f"{split}.bin") for split in ("train", "val"))
        held_out = sum(map(len, val))
        assert abs(held_out - fraction * sum(sizes)) < max(1, 0.15 * fraction * sum(sizes), 60)
        assert held_out + sum(map(len, train)) == sum(sizes)
        assert len(set(train + val) - set(texts)) <= 2  # one document is in two parts


def test_documents_stay_whole_and_copies_stay_together(tmp_path):
    texts = [f"document {i} " * 20 for i in range(400)]
    lines = [json.dumps({"text": text}) for text in texts + texts]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    folder = P.prepare([str(tmp_path / "d.jsonl")], val_fraction=0.2, data_dir=tmp_path)
    train, val = (read_documents(folder / f"{split}.bin") for split in ("train", "val"))
    assert not set(train) & set(val)
    parts = [part.decode() for part in train + val]
    assert all(parts.count(part) == 2 for part in parts)
    whole = set(parts) & set(texts)
    cut = set(parts) - whole  # one document, its beginning and its end
    assert whole | {a + b for a in cut for b in cut if a + b in texts} == set(texts)
    assert len(cut) in (0, 2)
    assert abs(sum(map(len, val)) / sum(map(len, train + val)) - 0.2) < 0.001


def test_same_input_same_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(prose(5000))
    contents = []
    for name, fraction in (("one", 0.05), ("two", 0.05), ("three", 0.2)):
        text = str(tmp_path / "a.txt")
        folder = P.prepare([text], name, val_fraction=fraction, data_dir=tmp_path)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == {"train.bin", "val.bin", "meta.json"}
    assert len({json.loads(files["meta.json"])["sha256"] for files in contents}) == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_the_old_data(tmp_path, how):
    (tmp_path / "a.txt").write_bytes(prose(50_000))
    folder = P.prepare([str(tmp_path / "a.txt")], name="x", data_dir=tmp_path / "data")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "big.txt").write_bytes(prose(1000) * 60_000)
    command = [sys.executable, str(ROOT / "prepare.py"), "big.txt", "--name=x"]
    obeys_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background, too
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE,
                               preexec_fn=obeys_ctrl_c)
    while not any(path.stat().st_size for path in folder.parent.glob(".x-*/new/train.bin")):
        assert process.poll() is None
    process.send_signal(how)
    stderr = process.communicate()[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how) and not stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if how == signal.SIGINT:
        assert list(folder.parent.iterdir()) == [folder]  # nothing else is left behind


def test_two_at_once(tmp_path):
    """The last whole one wins, and neither dies."""
    texts = {name: (name * 300_000).encode() for name in ("ab ", "cd ")}
    for name, text in texts.items():
        (tmp_path / name.strip()).write_bytes(text)
    for _ in range(3):
        both = [subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), name.strip(),
                                  "--name=x"], cwd=tmp_path) for name in texts]
        assert [process.wait() for process in both] == [0, 0]
        stored = [read_documents(tmp_path / f"data/x/{split}.bin") for split in ("train", "val")]
        assert stored[0][0] + stored[1][0] in texts.values()
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["x"]


def test_bad_input_gets_one_clear_line(tmp_path):
    folders = ["empty", "mine", "data/other", "data/odd/train.bin"]
    files = {
        "a.txt": b"hello world\n" * 100,
        "none.txt": b"",
        "shakespeare.txt": b"to be\n" * 100,
        "one.txt": b"1",
        "bad.gz": b"no gzip",
        "bad.jsonl": b'{"text": "1"}\n{"txt": 1}\n',
        "list.jsonl": b"[1]\n",
        "deep.jsonl": b"[" * 100_000,
        "zero.jsonl": b'{"text": 0}\n',
        "short.jsonl.gz": gzip.compress(json.dumps({"text": prose(9000).decode()}).encode())[:-99],
        "short.xz": lzma.compress(prose(9000))[:-99],
        "packed": gzip.compress(b"hello"),
        "a.bz2": bz2.compress(b"hello"),
        "a.docx": b"PK\x03\x04",
        "a.zst": b"\x28\xb5\x2f\xfd",
        "utf16.txt": "hello".encode("utf-16"),
        "mine/notes.txt": b"hello world\n" * 100,
        "data/other/notes.txt": b"mine",
    }
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data/loop").symlink_to("loop")
    for arguments, expected in [
        (["missing.txt"], "missing.txt: no such file or folder"),
        (["empty"], "too little text in empty"),
        (["/dev/zero"], "/dev/zero: no such file or folder"),
        (["none.txt"], "too little text in none.txt"),
        (["one.txt"], "too little text in one.txt"),
        (["a.txt", "--val=none.txt"], "too little text in a.txt none.txt"),
        (["a.txt", "--patcher=syllables"], "--patcher=syllables is unknown"),
        (["a.txt", "--patcher=fixed:0"], "--patcher=fixed:0 is unknown"),
        (["a.txt", "--tokenizer=bpe"], "--tokenizer=bpe: expected bytes"),
        (["a.txt", "--tokenizer=bpe:100"], "N = 258 to 65535"),
        (["a.txt", "--val_fraction=2"], "must lie between 0 and 1"),
        (["a.txt", "--val_fraction=nan"], "must lie between 0 and 1"),
        (["a.txt", "--val_fractoin=0.1"], "unrecognized arguments"),
        (["a.txt", "--val_fraction=x"], "invalid float"),
        (["bad.gz"], "bad.gz"),
        (["bad.jsonl"], "bad.jsonl, document 2"),
        (["list.jsonl"], "list.jsonl, document 1"),
        (["deep.jsonl"], "deep.jsonl, document 1"),
        (["zero.jsonl"], "zero.jsonl, document 1"),
        (["short.jsonl.gz"], "short.jsonl.gz"),
        (["short.xz"], "short.xz"),
        (["packed"], "a name that ends in .gz or .xz"),
        (["a.bz2"], "unpack it"),
        (["a.docx"], "unpack it"),
        (["a.zst"], "unpack it"),
        (["utf16.txt"], "utf16.txt is UTF-16"),
        (["-", "-"], "given twice"),
        (["shakespeare.txt"], "expected a --name, as shakespeare is a known dataset's"),
        ([""], "no such file or folder"),
        (["a.txt", "--name=other"], "data/other holds more than a dataset"),
        (["mine", "--data_dir=."], "mine holds more than a dataset"),
        (["a.txt", "--name=odd"], "data/odd holds more than a dataset"),
        (["a.txt", "--name=loop"], "data/loop holds more than a dataset"),
        (["a.txt", "--val="], "no such file or folder"),
        (["a.txt", "--name=.."], "holds more than a dataset"),
    ]:
        done = run_script("prepare.py", *arguments, cwd=tmp_path, input="")
        assert_one_clear_line(done, expected)
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    assert sorted(os.listdir(tmp_path / "data")) == ["loop", "odd", "other"]  # nothing is left behind


@pytest.mark.parametrize("text, shown", [
    ("a\u3000b\u00a0c\u202fd\u200de\r\nf\tg 日本 é\u0301", None),
    ("\x1b[2J\x07\x00\x7f\x9b", r"\x1b[2J\x07\x00\x7f\x9b"),
    ("a\rb\r\n\r\r", "a\\rb\r\n\\r\r"),
    ("\u202eevil\u2066\u2069", r"\u202eevil\u2066\u2069"),
])
def test_printable(text, shown):
    assert P.printable(text) == (text if shown is None else shown)


def test_whole_file(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with P.whole_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    with pytest.raises(KeyError), P.whole_file(tmp_path / "real") as file:
        raise KeyError
    assert (tmp_path / "real").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
    for refused in ("/dev/null", tmp_path):
        with pytest.raises(P.BadInput, match="no regular file"), P.whole_file(refused):
            pass


class Mirror(BaseHTTPRequestHandler):
    """A server of files {path: bytes}, and of what the Hugging Face hub says about them."""

    files, asked, commit = {}, [], "0123456789" * 4

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/"):
            names = [name.split("/resolve/")[1].split("/", 1)[1] for name in self.files]
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            siblings = [{"rfilename": name} for name in names]
            about = {"id": "a/b", "sha": self.commit, "siblings": siblings}
            body, sha = json.dumps(tree if "/tree/" in path else about).encode(), ""
        elif path in self.files:
            body = self.files[path]
            sha = hashlib.sha256(body).hexdigest()
        else:
            return self.send_error(404)
        if self.command == "GET":
            self.asked.append(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Mirror.files, Mirror.asked = {}, []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch, mirror):
    text = prose(200_000)
    Mirror.files["/input.txt"] = text
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    address = (f"{mirror}/input.txt", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(P, "SHAKESPEARE", address)
    folder = P.prepare(["shakespeare"], data_dir=tmp_path / "data")
    stored = [P.decode(read_bin(folder / f"{split}.bin")) for split in ("train", "val")]
    assert b"".join(stored) == text
    P.prepare(["shakespeare"], data_dir=tmp_path / "data", patcher="fixed:4")
    assert len(Mirror.asked) == 1  # not downloaded again

    monkeypatch.setattr(P, "SHAKESPEARE", (address[0], "0" * 64))
    expected = "could not be downloaded.*[Hh]ash.*--dataset=stdlib.*your own text"
    with pytest.raises(P.BadInput, match=expected):
        P.prepare(["shakespeare"], data_dir=tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("name", ["tinystories", "fineweb-edu"])
def test_the_hubs_datasets_load_from_a_mirror(name, tmp_path, mirror):
    """The real libraries, in a process of their own, against a server that acts as the hub."""
    pytest.importorskip("huggingface_hub")
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    stories = [f"{prose(2_000, seed=i).decode()}{i}" for i in range(60)]
    repo, pattern = P.HUB[name]
    base = f"/datasets/{repo}/resolve/{Mirror.commit}"
    names = [pattern.replace("*", f"0000{i}-of-00002") for i in range(2 if "*" in pattern else 1)]
    for i, file in enumerate(names):
        own = stories[i :: len(names)]
        parquet.write_table(pyarrow.table({"id": own, "text": own}), tmp_path / "table")
        Mirror.files[f"{base}/{file}"] = (tmp_path / "table").read_bytes()
    Mirror.files[f"{base}/data/validation-0.parquet"] = b"not wanted"

    cache = tmp_path / "hub"
    at_mirror = os.environ | {"HF_ENDPOINT": mirror, "HF_HOME": str(cache)}
    at_mirror["HF_HUB_DISABLE_XET"] = "1"
    done = run_script("prepare.py", name, cwd=tmp_path, env=at_mirror)
    assert done.returncode == 0, done.stderr
    assert "a download of about" in done.stdout
    folder = tmp_path / "data" / name
    stored = [read_documents(folder / f"{split}.bin") for split in ("train", "val")]
    assert sum(len(d) for d in stored[0] + stored[1]) == sum(len(s.encode()) for s in stories)
    assert len({story.encode() for story in stories} - {*stored[0], *stored[1]}) <= 1  # cut
    assert not any("validation" in path for path in Mirror.asked)

    n = len(Mirror.asked)
    offline = at_mirror | {"HF_HUB_OFFLINE": "1"}
    done = run_script("prepare.py", name, "--patcher=fixed:4", cwd=tmp_path, env=offline)
    assert done.returncode == 0 and len(Mirror.asked) == n, done.stderr  # from its cache


def test_a_model_loads_from_the_hub(tmp_path, mirror):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    model = random_model()
    save_pretrained(model, tmp_path / "tiny")
    for file in (tmp_path / "tiny").iterdir():
        Mirror.files[f"/someone/tiny/resolve/{Mirror.commit}/{file.name}"] = file.read_bytes()
    Mirror.files[f"/someone/tiny/resolve/{Mirror.commit}/evil.py"] = b"not wanted"

    def load(name, **more):  # in a process of its own, as the library reads its settings once
        code = "import sys, torch; from model import from_pretrained\n" \
               "torch.save(from_pretrained(sys.argv[1]).state_dict(), 'got.pt')"
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": mirror} | more
        env["HF_HOME"] = str(tmp_path / "hub")
        return subprocess.run([sys.executable, "-c", code, name], cwd=tmp_path, env=env).returncode

    assert load("someone/tiny", HF_HUB_DISABLE_XET="1") == 0
    got, expected = torch.load(tmp_path / "got.pt", weights_only=True), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not any("evil" in path for path in Mirror.asked)
    n = len(Mirror.asked)
    assert load("someone/tiny", HF_HUB_OFFLINE="1") == 0 and len(Mirror.asked) == n  # its cache
    assert load("someone/other", HF_HUB_OFFLINE="1") != 0


def test_tables(tmp_path):
    """A column of strings; rows without text are left out, said once."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"story": ["once"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    for file in "a.parquet", "b.parquet":
        assert_one_clear_line(run_script("prepare.py", file, cwd=tmp_path), file, '"text"')
    table = pyarrow.table({"text": ["once upon a time", None, "there was"]})
    parquet.write_table(table, tmp_path / "c.parquet")
    held_out = pyarrow.table({"text": ["there was", None, "an end"]})
    parquet.write_table(held_out, tmp_path / "d.parquet")
    done = run_script("prepare.py", "c.parquet", "--val=d.parquet", cwd=tmp_path)
    assert done.stdout.count("left out, as they are empty: 1 ") == 2, done.stderr  # once a file
    assert read_documents(tmp_path / "data/c/train.bin") == [b"once upon a time"]
    assert read_documents(tmp_path / "data/c/val.bin") == [b"there was", b"an end"]
