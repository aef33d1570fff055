"""prepare.py's promises: exact round trips, whole documents, the same bytes every time, nothing half-written."""
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_clear_line, prose, random_model, read_bin, run_script

import prepare as P

SPACES, WORD = b" \t\n\v\f\r", set(range(128, 256)) | set(b"_") | {b for b in range(128) if chr(b).isalnum()}


def slow_word_ends(text):
    """The rule of word_ends, one byte at a time."""
    ends, begin = [], 0
    for i, byte in enumerate(text):
        before_word = byte not in WORD and i + 1 < len(text) and text[i + 1] in WORD
        space_after_other = byte in SPACES and i > 0 and text[i - 1] not in SPACES
        end = before_word or space_after_other
        if not end and i + 1 < len(text):  # is this where a long run is cut?
            cut = begin + P.MAX_PATCH - 1
            run_end = next((k for k in range(begin, len(text)) if natural_end(text, k)), len(text) - 1)
            if run_end > cut:
                for _ in range(3):
                    cut -= 0x80 <= text[cut + 1] < 0xC0
                end = i == cut
        ends.append(end)
        if end:
            begin = i + 1
    return ends


def natural_end(text, i):
    before_word = text[i] not in WORD and i + 1 < len(text) and text[i + 1] in WORD
    return before_word or (text[i] in SPACES and i > 0 and text[i - 1] not in SPACES)


def random_texts(n, longest=300):
    rng = random.Random(0)
    alphabets = [range(256), b"ab \n", b" \n\t", b"a", range(0x80, 0xC0), [0xFF, 0x20, 0x61], "日本語 ".encode(), b"x = (y)\r\n\0"]
    for _ in range(n):
        yield bytes(rng.choices(rng.choice(alphabets), k=rng.randrange(longest)))


def test_words_against_a_slow_loop():
    for text in [*random_texts(300, 120), prose(2000)]:
        expected = np.frombuffer(text, np.uint8) + 256 * (np.array(slow_word_ends(text), bool) & (np.frombuffer(text, np.uint8) != 255))
        assert P.encode(text).tolist() == expected.tolist()


def test_words_by_example():
    cut = lambda text: P.decode(np.concatenate([[s, 0x7C] if s >= 256 else [s] for s in P.encode(text)]).astype(int))
    assert cut(b'if x:\n    return foo("bar")  # done\n') == b'if |x:\n|    |return |foo("|bar") | # |done\n|'
    assert cut(b"don't stop, I said") == b"don'|t |stop, |I |said"
    assert cut(b"a" * 40) == b"a" * 16 + b"|" + b"a" * 16 + b"|" + b"a" * 8
    assert cut("日本語テキスト".encode()).decode() == "日本語テキ|スト"  # 15 bytes: never inside a character


@pytest.mark.parametrize("patcher", ["words", "gpt2", "fixed:1", "fixed:5"])
def test_round_trip(patcher, request):
    if patcher == "gpt2":
        request.getfixturevalue("gpt2")
    for text in random_texts(400):
        symbols = P.encode(text, patcher)
        assert symbols.dtype == np.uint16 and len(symbols) == len(text) and P.SEPARATOR not in symbols
        assert P.decode(symbols) == text
    assert P.decode(np.append(P.encode(b"ab", patcher), P.SEPARATOR)) == b"ab"


def test_gpt2_patches_are_tiktokens_tokens(gpt2):
    import tiktoken

    text = prose(5000)
    tokens = tiktoken.get_encoding("gpt2").encode_ordinary(text.decode())
    assert P.tokenize(text, gpt2).tolist() == tokens
    ends = np.flatnonzero(P.encode(text, "gpt2") >= 256) + 1
    assert ends.tolist() == np.cumsum([len(gpt2[t]) for t in tokens]).tolist()


def test_token_round_trip(gpt2):
    for text in random_texts(200):
        assert P.detokenize(P.tokenize(text, gpt2), gpt2) == text


def test_bpe(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    (tmp_path / "a.txt").write_bytes(prose(30_000))
    folder = P.prepare([str(tmp_path / "a.txt")], tokenizer="bpe:400", data_dir=tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    assert len(vocab) <= 400 and vocab[-1] == "" and len(set(vocab)) == len(vocab)
    assert len({v for v in vocab if len(v) == 1}) == 256
    ids = np.concatenate([read_bin(folder / "train.bin"), read_bin(folder / "val.bin")])
    assert P.detokenize(ids, vocab) == prose(30_000)
    assert len(ids) < 15_000  # it compresses
    for text in random_texts(100):
        assert P.detokenize(P.tokenize(text, vocab), vocab) == text


def test_every_kind_of_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("folder/sub")
    texts = [b"plain\r\ntext\x01\xff\xfe", b"gz " * 9, b"xz " * 9, "json é \n".encode(), b"second line", b"deep", b"from a pipe"]
    open("folder/1.txt", "wb").write(texts[0])
    gzip.open("folder/2.txt.gz", "wb").write(texts[1])
    lzma.open("folder/3.xz", "wb").write(texts[2])
    open("4.jsonl", "w").write(json.dumps({"text": texts[3].decode()}) + "\n" + json.dumps({"text": "second line"}) + "\n")
    open("folder/sub/5", "wb").write(texts[5])
    open("folder/6.empty", "wb").close()
    open("folder/7.pyc", "wb").write(b"\x61\r\r\n\0\0\0\0")  # binary: left out
    done = run_script("prepare.py", "folder", "*.jsonl", "-", "--name=all", "--val=folder/sub", cwd=tmp_path, input="from a pipe")
    assert done.returncode == 0, done.stderr
    train = read_bin("data/all/train.bin")
    documents = [P.decode(part) for part in np.split(train, np.flatnonzero(train == P.SEPARATOR) + 1)[:-1]]
    order = [0, 1, 2, None, 5, 3, 4, 6]  # folders in sorted order; the empty file is an empty document
    assert documents == [b"" if i is None else texts[i] for i in order]
    assert P.decode(read_bin("data/all/val.bin")) == texts[5]
    meta = json.loads(open("data/all/meta.json").read())
    assert meta["train"]["bytes"] == sum(map(len, documents)) and meta["patcher"] == "words"
    raw = b"".join(documents) + texts[5]
    assert meta["sha256"] == hashlib.sha256(raw).hexdigest()


def test_large_files_are_cut_where_nothing_straddles(tmp_path, gpt2):
    """A file of several pieces gives the same symbols and tokens as its text in one go."""
    text = prose(P.PIECE + 300_000)
    (tmp_path / "big.txt").write_bytes(text)
    for patcher in ("words", "gpt2"):
        folder = P.prepare([str(tmp_path / "big.txt")], patcher=patcher, data_dir=tmp_path / patcher)
        both = np.concatenate([read_bin(folder / "train.bin"), read_bin(folder / "val.bin")])
        assert np.array_equal(both[:-1], P.encode(text, patcher))
    text = b"x" * (3 * P.PIECE)  # no line end anywhere
    (tmp_path / "big.txt").write_bytes(text)
    folder = P.prepare([str(tmp_path / "big.txt")], data_dir=tmp_path)
    assert P.decode(np.concatenate([read_bin(folder / "train.bin"), read_bin(folder / "val.bin")])) == text


def test_documents_stay_whole_and_copies_stay_together(tmp_path):
    lines = [json.dumps({"text": f"document {i} " * 20}) for i in range(400)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines + lines) + "\n")
    folder = P.prepare([str(tmp_path / "d.jsonl")], val_fraction=0.2, data_dir=tmp_path)
    sides = []
    for split in ("train", "val"):
        ids = read_bin(folder / f"{split}.bin")
        assert ids[-1] == P.SEPARATOR
        sides.append([P.decode(part) for part in np.split(ids, np.flatnonzero(ids == P.SEPARATOR) + 1)[:-1]])
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(json.loads(line)["text"].encode() for line in lines + lines)
    assert 0.1 < len(sides[1]) / 800 < 0.3


def test_same_input_same_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(prose(5000))
    hashes = set()
    for name in ("one", "two"):
        folder = P.prepare([str(tmp_path / "a.txt")], name=name, data_dir=tmp_path)
        hashes.add(b"".join((folder / f).read_bytes() for f in ("train.bin", "val.bin", "meta.json")))
    assert len(hashes) == 1


def test_a_killed_run_leaves_the_old_data(tmp_path):
    (tmp_path / "a.txt").write_bytes(prose(50_000))
    folder = P.prepare([str(tmp_path / "a.txt")], name="x", data_dir=tmp_path / "data")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    command = [sys.executable, str(ROOT / "prepare.py"), "-", "--name=x"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(40):
        process.stdin.write(prose(1000) * 100)
    process.stdin.flush()
    temp = folder / "train.bin.tmp"
    deadline = time.time() + 60
    while not (temp.exists() and temp.stat().st_size) and time.time() < deadline:
        process.stdin.write(prose(1000) * 100)
    assert temp.stat().st_size  # it was killed while writing
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".tmp")} == before


def test_bad_input_gets_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello world\n" * 100)
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    (tmp_path / "short.txt").write_text("")
    for arguments, expected in [
        (["missing.txt"], "no such input: missing.txt"),
        (["empty"], "no file in empty"),
        (["a.txt", "--patcher=syllables"], "--patcher=syllables is unknown"),
        (["a.txt", "--patcher=fixed:0"], "--patcher=fixed:0 is unknown"),
        (["a.txt", "--tokenizer=bpe"], "--tokenizer=bpe is unknown"),
        (["a.txt", "--tokenizer=bpe:100"], "expected N between 258 and 65535"),
        (["a.txt", "--val_fraction=2"], "must lie between 0 and 1"),
        (["a.txt", "--val_fractoin=0.1"], "unrecognized arguments"),
        (["a.txt", "--val_fraction=x"], "invalid float"),
        (["bad.gz"], "bad.gz"),
        (["bad.jsonl"], "bad.jsonl line 1"),
        (["short.txt"], "too little text"),
        (["-", "--tokenizer=bpe:400"], "reads its input twice"),
    ]:
        done = run_script("prepare.py", *arguments, cwd=tmp_path, input="")
        assert_one_clear_line(done, expected)


def test_datasets_that_need_a_network_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "SHAKESPEARE", ("http://127.0.0.1:9/input.txt", ""))  # nothing listens there
    with pytest.raises(P.BadInput, match="could not be downloaded.*--dataset=stdlib.*your own text"):
        P.prepare(["shakespeare"], data_dir=tmp_path)


class Mirror(BaseHTTPRequestHandler):
    """A server of files {path: bytes}, with ranges, and of what the Hugging Face hub says about a repository."""

    files, asked, commit = {}, [], "0123456789" * 4

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/"):
            names = [name.split("/resolve/")[1].split("/", 1)[1] for name in self.files]
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            about = {"id": "a/b", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            body, sha = json.dumps(tree if "/tree/" in path else about).encode(), ""
        elif path in self.files:
            body = self.files[path]
            sha = hashlib.sha256(body).hexdigest()
        else:
            return self.send_error(404)
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if self.command == "GET":
            self.asked.append((path, begin))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.send_header("ETag", f'"{sha}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[begin:])

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


def test_a_download_goes_on_where_it_stopped_and_is_checked(tmp_path, monkeypatch, mirror):
    text = prose(200_000)
    Mirror.files["/input.txt"] = text
    monkeypatch.setattr(P, "SHAKESPEARE", (f"{mirror}/input.txt", hashlib.sha256(text).hexdigest()))
    part = tmp_path / "download" / "shakespeare.txt.part"
    part.parent.mkdir()
    part.write_bytes(text[:70_000])  # what a killed download left
    folder = P.prepare(["shakespeare"], data_dir=tmp_path)
    assert Mirror.asked == [("/input.txt", 70_000)] and not part.exists()
    stored = b"".join(P.decode(np.fromfile(folder / f"{split}.bin", np.uint16)) for split in ("train", "val"))
    assert stored == text
    P.prepare(["shakespeare"], data_dir=tmp_path, patcher="fixed:4")  # not downloaded again
    assert len(Mirror.asked) == 1

    monkeypatch.setattr(P, "SHAKESPEARE", (f"{mirror}/input.txt", "0" * 64))
    with pytest.raises(P.BadInput, match="checksum differs"):
        P.prepare(["shakespeare"], data_dir=tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*shakespeare*"))


@pytest.mark.parametrize("name", ["tinystories", "fineweb-edu"])
def test_the_hubs_datasets_load_from_a_mirror(name, tmp_path, mirror):
    """The real libraries, in a process of its own, against a server that lays the files out as the hub does."""
    pytest.importorskip("huggingface_hub")
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    stories = [f"{prose(2_000, seed=i).decode()}{i}" for i in range(60)]
    repo, pattern = P.HUB[name]
    base = f"/datasets/{repo}/resolve/{Mirror.commit}"
    names = [pattern.replace("*", f"0000{i}-of-00002") for i in range(2 if "*" in pattern else 1)]
    for i, file in enumerate(names):
        table = pyarrow.table({"id": list(range(len(stories)))[i :: len(names)], "text": stories[i :: len(names)]})
        parquet.write_table(table, tmp_path / "table")
        Mirror.files[f"{base}/{file}"] = (tmp_path / "table").read_bytes()
    Mirror.files[f"{base}/data/validation-0.parquet"] = b"not wanted"

    cache = tmp_path / "hub"
    at_mirror = os.environ | {"HF_ENDPOINT": mirror, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = run_script("prepare.py", name, cwd=tmp_path, env=at_mirror)
    assert done.returncode == 0, done.stderr
    assert "a download of about" in done.stdout
    stored = [P.decode(np.fromfile(tmp_path / "data" / name / f"{split}.bin", np.uint16)) for split in ("train", "val")]
    expected = [story for i in range(len(names)) for story in stories[i :: len(names)]]
    assert sum(map(len, stored)) == sum(len(story.encode()) for story in expected)
    assert all(story.encode() in stored[0] or story.encode() in stored[1] for story in expected)
    assert not any("validation" in path for path, _ in Mirror.asked)

    n = len(Mirror.asked)
    done = run_script("prepare.py", name, "--patcher=fixed:4", cwd=tmp_path, env=at_mirror | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and len(Mirror.asked) == n, done.stderr  # from its cache
    blob = next(path for path in cache.rglob("blobs/*") if len(path.name) == 64)
    blob.write_bytes(b"damaged" + blob.read_bytes()[7:])
    done = run_script("prepare.py", name, "--patcher=fixed:5", cwd=tmp_path, env=at_mirror | {"HF_HUB_OFFLINE": "1"})
    assert_one_clear_line(done, "checksum differs")


def test_a_model_loads_from_the_hub(tmp_path, mirror):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    model = random_model()
    model.save_pretrained(tmp_path / "tiny")
    for file in (tmp_path / "tiny").iterdir():
        Mirror.files[f"/someone/tiny/resolve/{Mirror.commit}/{file.name}"] = file.read_bytes()
    Mirror.files[f"/someone/tiny/resolve/{Mirror.commit}/evil.py"] = b"not wanted"

    def load(name, **more):
        code = "import sys, torch; from model import STLM; from prepare import run\n" \
               "run(lambda: torch.save(STLM.from_pretrained(sys.argv[1]).state_dict(), 'got.pt'))"
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": mirror, "HF_HOME": str(tmp_path / "hub")} | more
        return subprocess.run([sys.executable, "-c", code, name], cwd=tmp_path, env=env, capture_output=True, text=True)

    done = load("someone/tiny", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    got, expected = torch.load(tmp_path / "got.pt", weights_only=True), model.state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert not any("evil" in path for path, _ in Mirror.asked)
    n = len(Mirror.asked)
    assert load("someone/tiny", HF_HUB_OFFLINE="1").returncode == 0 and len(Mirror.asked) == n  # from its cache
    assert_one_clear_line(load("someone/other", HF_HUB_OFFLINE="1"), "someone/other is no STLM")


def test_tables_need_a_column_of_text(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"story": ["once"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    for file in "a.parquet", "b.parquet":
        assert_one_clear_line(run_script("prepare.py", file, cwd=tmp_path), "expected a .parquet file with a column")
