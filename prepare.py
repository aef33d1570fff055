"""
Text in, symbols out: cuts text into patches and writes data/NAME/{train,val}.bin and meta.json for train.py.

    python prepare.py                                   # the source of Python's standard library: needs no network
    python prepare.py novels/ letters.txt --name=mine   # your own text: files, folders, globs, .gz .xz .jsonl .parquet -
    python prepare.py shakespeare                       # a known dataset: shakespeare, tinystories, fineweb-edu
    python prepare.py stdlib --tokenizer=bpe:4096       # token ids instead, for the rival GPT

A byte of text becomes one symbol, byte + 256 * (this byte ends its patch), so a data file is a flat array of uint16
and any way of cutting text is only another flag. 0xFF + 256 separates documents; a text byte 0xFF (it never occurs in
UTF-8) is kept but never ends a patch, so every string of bytes comes back exactly.
"""
import argparse
import glob
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

SEPARATOR = 0xFF + 256
MAX_PATCH = 16      # bytes; a longer run is cut
PIECE = 1 << 20     # bytes of text that a worker cuts at a time


class BadInput(Exception):
    """The user's input is at fault: the message names the option or file, what was expected and what to do."""


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# ----------------------------------------------------------------------------------------------------------------------
# patches: which bytes end one


def byte_table(members):
    table = np.zeros(256, bool)
    table[list(members)] = True
    return table


SPACE = byte_table(b" \t\n\v\f\r")
LETTER = byte_table([b for b in range(256) if b >= 0x80 or chr(b).isalnum() or b == ord("_")])  # and digits, and UTF-8


def word_ends(text):
    """A patch ends before a word that follows anything else, and with the first whitespace byte after anything else.

    So "x = foo(bar)" is cut into |x |= |foo(|bar)|, and indentation is a patch. At most MAX_PATCH bytes.
    """
    space, letter = SPACE[text], LETTER[text]
    ends = np.zeros(len(text), bool)
    ends[:-1] = ~letter[:-1] & letter[1:]
    ends[1:] |= space[1:] & ~space[:-1]
    last = np.append(np.flatnonzero(ends), len(text) - 1)
    first = np.concatenate([[0], last[:-1] + 1])
    while True:  # cut runs longer than MAX_PATCH, one cut a run and round, never inside a UTF-8 character
        long = last - first >= MAX_PATCH
        first, last = first[long], last[long]
        if not len(first):
            return ends
        cut = first + MAX_PATCH - 1
        for _ in range(3):
            cut -= (text[cut + 1] & 0xC0) == 0x80  # the next byte continues a character: cut before it
        ends[cut] = True
        first = cut + 1


def gpt2_ends(text):
    """A patch is one token of GPT-2's vocabulary, as tiktoken cuts it: the paper's choice."""
    vocab = gpt2_vocab()
    lengths = np.array([len(token) for token in vocab])[tokenize(text.tobytes(), vocab)]
    ends = np.zeros(len(text), bool)
    ends[lengths.cumsum() - 1] = True
    return ends


def encode(text, patcher="words"):
    """Cuts text (bytes) into patches and returns its symbols, uint16, one a byte.

    patcher: "words", "gpt2" or "fixed:N". Raises BadInput for any other. decode() is the exact inverse.
    """
    raw = np.frombuffer(text, np.uint8)
    if patcher == "words":
        ends = word_ends(raw)
    elif patcher == "gpt2":
        ends = gpt2_ends(raw)
    elif re.fullmatch(r"fixed:[1-9]\d*", patcher):
        ends = np.arange(1, len(raw) + 1) % int(patcher[6:]) == 0
    else:
        raise BadInput(f"--patcher={patcher} is unknown: expected words, gpt2 or fixed:N (such as fixed:4)")
    return raw + np.uint16(256) * (ends & (raw != 0xFF))


def decode(symbols):
    """The bytes that symbols (an array of integers below 512) stand for; separators stand for none."""
    symbols = np.asarray(symbols)
    return (symbols[symbols != SEPARATOR] & 0xFF).astype(np.uint8).tobytes()


def printable(text):
    """text (str) without characters that a terminal would obey instead of show: they appear as \\x1b and the like."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ----------------------------------------------------------------------------------------------------------------------
# tokens, for the rival. A vocabulary is a list of strings, id -> its bytes as latin-1; the last, "", is the separator


PRETOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's rule


def need(module, what, package=None):
    """Imports a module that only `what` needs; where it is missing, BadInput names its package."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{what} needs the package {package or module}: pip install {package or module}")


@lru_cache(maxsize=4)
def tokenizer(vocab):
    """The tiktoken encoder of a vocabulary (a tuple of strings)."""
    tiktoken = need("tiktoken", "a vocabulary")

    ranks = {token.encode("latin-1"): i for i, token in enumerate(vocab[:-1])}
    return tiktoken.Encoding("vocab", pat_str=PRETOKEN, mergeable_ranks=ranks, special_tokens={})


def tokenize(text, vocab):
    """Token ids (uint16) of text (bytes). Bytes that are not UTF-8 become one token each."""
    encoder, ids = tokenizer(tuple(vocab)), []
    for run in re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape")):
        if "\udc80" <= run[:1] <= "\udcff":
            ids.append([encoder.encode_single_token(bytes([b])) for b in run.encode("utf-8", "surrogateescape")])
        else:
            ids.append(encoder.encode_to_numpy(run, disallowed_special=()))
    return np.concatenate(ids).astype(np.uint16)


def detokenize(ids, vocab):
    """The bytes that token ids stand for; separators stand for none."""
    return "".join(vocab[i] for i in ids).encode("latin-1")


# symbols or tokens: what vocab=None and a vocabulary have in common


def separator_of(vocab):
    return SEPARATOR if vocab is None else len(vocab) - 1


def to_ids(text, patcher, vocab):
    """Symbols of text (bytes) cut by patcher or, with a vocabulary, token ids: uint16."""
    return encode(text, patcher) if vocab is None else tokenize(text, vocab)


def to_text(ids, vocab):
    """The bytes that to_ids() came from; separators stand for none."""
    return decode(ids) if vocab is None else detokenize(ids, vocab)


def bytes_of_ids(vocab):
    """How many bytes of text each id stands for: 0 for the separator."""
    lengths = np.ones(512, np.int64) if vocab is None else np.array([len(token) for token in vocab])
    lengths[separator_of(vocab)] = 0
    return lengths


@lru_cache
def gpt2_vocab():
    tiktoken = need("tiktoken", "GPT-2's vocabulary")
    try:
        encoder = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its download library raises
        raise BadInput("GPT-2's vocabulary could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that has it "
                       f"({type(error).__name__})")
    return tuple(encoder.decode_single_token_bytes(i).decode("latin-1") for i in range(encoder.max_token_value)) + ("",)


def train_bpe(n_vocab, texts):
    """A byte-level BPE vocabulary of n_vocab entries, the separator included, from texts (an iterable of bytes)."""
    need("tokenizers", "--tokenizer=bpe:N")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # that library writes bytes as printable characters: those that print as themselves, the others from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=list(byte_of), show_progress=False)
    bpe.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    tokens = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return tuple(bytes(byte_of[c] for c in token).decode("latin-1") for token, _ in tokens) + ("",)


# ----------------------------------------------------------------------------------------------------------------------
# documents: from files, folders, streams and known datasets


KNOWN = {  # name: what it is and its size, said before it is read
    "stdlib": "the source of Python's standard library, about 12 MB, already on this machine",
    "shakespeare": "tiny Shakespeare, a download of 1.1 MB",
    "tinystories": "TinyStories (arXiv 2305.07759), 1.9 GB of text, a download of about 1 GB",
    "fineweb-edu": "the first file of FineWeb-Edu's 10BT sample (arXiv 2406.17557), a download of about 2 GB",
}
WITHOUT_NETWORK = ("without a network there are two ways on: --dataset=stdlib (or python prepare.py stdlib), or your own "
                   "text (python prepare.py FILES --name=mine, then --dataset=mine)")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")  # its SHA-256
HUB = {  # name: a repository of the Hugging Face hub, and which of its files
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet"),
}


def stdlib_files():
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]


def sha256_of(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(PIECE):
            sha256.update(chunk)
    return sha256.hexdigest()


def fetch(url, sha256, path):
    """Downloads url to path; what an interrupted download left is kept and gone on from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    have = part.stat().st_size if part.exists() else 0
    with urlopen(Request(url, headers={"Range": f"bytes={have}-"}), timeout=30) as answer:
        resumed = answer.status == 206  # else the server sends all of it
        with open(part, "ab" if resumed else "wb") as file:
            shutil.copyfileobj(answer, file)
    if sha256_of(part) != sha256:
        part.unlink()
        raise BadInput(f"{url} is not the file it was, its checksum differs; try again, or use another dataset")
    os.replace(part, path)


def known_files(name, data_dir):
    """The files of a known dataset, downloaded where they are missing and checked. Raises BadInput."""
    if name == "stdlib":
        return stdlib_files()
    try:
        if name == "shakespeare":
            path = Path(data_dir) / "download" / "shakespeare.txt"
            if not path.exists():
                fetch(*SHAKESPEARE, path)
            return [path]
        hub, (repo, pattern) = need("huggingface_hub", name), HUB[name]
        # the library shows progress, goes on after an interruption and keeps the files for the next time
        folder = Path(hub.snapshot_download(repo, repo_type="dataset", allow_patterns=pattern))
    except BadInput:
        raise
    except Exception as error:  # each of these libraries has its own kinds of network error
        raise BadInput(f"{name} could not be downloaded ({' '.join(repr(error).split())[:200]}); {WITHOUT_NETWORK}")
    paths = sorted(folder.glob(pattern))
    for path in paths:
        blob = path.resolve()  # the library keeps a large file under its SHA-256
        if len(blob.name) == 64 and sha256_of(blob) != blob.name:
            raise BadInput(f"{blob} is damaged, its checksum differs: delete it and start again")
    if not paths:
        raise BadInput(f"{name}: no file {pattern} in {repo}; {WITHOUT_NETWORK}")
    return paths


def is_binary(path):
    """Does it hold a zero byte near its beginning, as no text in UTF-8 does? (grep asks the same.)"""
    if str(path).endswith((".gz", ".xz", ".parquet")):  # text inside
        return False
    with open(path, "rb") as file:
        return b"\0" in file.read(4096)


def find_files(inputs):
    """Turns files, folders, globs and "-" into a sorted list of paths."""
    paths = []
    for name in inputs:
        if name == "-" or os.path.isfile(name):
            paths.append(name)
            continue
        found = sorted(glob.glob(name, recursive=True)) if not os.path.isdir(name) else [name]
        if not found:
            raise BadInput(f"no such input: {name}; expected a file, folder, glob, - or one of {', '.join(KNOWN)}")
        for top in map(Path, found):
            inside = [p for p in sorted(top.rglob("*")) if p.is_file() and "/." not in f"/{p.relative_to(top)}"]
            texts = [p for p in inside if not is_binary(p)]
            if len(texts) < len(inside):
                print(f"{top}: binary files left out: {len(inside) - len(texts)} (one that is named itself is taken)")
            paths += [top] if top.is_file() else texts  # without hidden files and folders
    if not paths:
        raise BadInput(f"no file in {' '.join(inputs)}: expected a folder with text files")
    return paths


def file_documents(path):
    """Yields the documents of one file as open binary files: one, or one a line of a .jsonl or a row of a .parquet."""
    if str(path).endswith(".parquet"):
        parquet = need("pyarrow.parquet", f"{path} is a table, which", "pyarrow")
        try:
            for rows in parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
                yield from (io.BytesIO(text.encode("utf-8", "surrogatepass")) for text in rows["text"].to_pylist())
        except (ValueError, KeyError, AttributeError) as error:
            raise BadInput(f'{path}: expected a .parquet file with a column of strings "text" ({first_line(error)})')
        return
    kind = re.sub(r"\.(gz|xz)$", "", str(path))
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    with sys.stdin.buffer if path == "-" else opener(path, "rb") as file:
        if not kind.endswith(".jsonl"):
            yield file
            return
        for n, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"].encode("utf-8", "surrogatepass")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f'{path} line {n}: expected a JSON object with a string "text"')
            yield io.BytesIO(text)


def read(file):
    try:
        return file.read(PIECE)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise BadInput(f"{getattr(file, 'name', 'an input')} is not a whole .gz or .xz file: {error}")


LINE_END = re.compile(rb"\S\r?\n(?=\S)")


def pieces(file):
    """Yields (text, last) for one document: pieces of about PIECE bytes, cut where no patch or token can straddle."""
    text = b""
    while more := read(file):
        text += more
        if len(text) > PIECE:
            # after a line end that stands between two non-space bytes; in text without any, where the piece ends
            cuts = [m.end() for m in LINE_END.finditer(text, len(text) - PIECE // 16)] or [len(text)]
            yield text[: cuts[-1]], False
            text = text[cuts[-1] :]
    yield text, True


def batches(documents, val_fraction):
    """Groups pieces into lists of about PIECE bytes of (for validation?, text, last piece of its document)."""
    batch, size = [], 0
    for is_val, file in documents:
        for text, last in pieces(file):
            if is_val is None:  # by a hash of its beginning: copies of one document fall on the same side
                is_val = zlib.crc32(text) < val_fraction * 2**32
            batch.append((is_val, text, last))
            size += len(text)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    yield batch


# ----------------------------------------------------------------------------------------------------------------------
# the data files


def cut(batch, patcher, vocab):
    """One worker's job: the symbols (or token ids) of a batch, [for training, for validation]."""
    out = [], []
    for is_val, text, last in batch:
        if text:
            out[is_val].append(to_ids(text, patcher, vocab))
        if last:
            out[is_val].append(np.array([separator_of(vocab)], np.uint16))
    return [np.concatenate(parts) if parts else np.array([], np.uint16) for parts in out]


def parallel_map(job, items, n_workers):
    """Like map() over processes, in order, holding only a few items at a time."""
    with ProcessPoolExecutor(n_workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(job, item))
            if len(waiting) > 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_chunks(path):
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, np.uint16, PIECE)):
            yield chunk


def move_tail(source, target, fraction, separator):
    """Gives an empty validation file the last document, or the last part of an only one."""
    n, ends = 0, [0]
    for chunk in read_chunks(source):
        ends = (ends + [n + int(i) + 1 for i in np.flatnonzero(chunk == separator)])[-2:]
        n += len(chunk)
    start = ends[0] or int(n * (1 - fraction))
    with open(source, "rb") as a, open(target, "wb") as b:
        a.seek(2 * start)
        shutil.copyfileobj(a, b)
    os.truncate(source, 2 * start)


def folder_name(dataset, patcher="words", tokenizer="bytes"):
    """The folder in data/ of one way to cut a dataset: stdlib, stdlib-fixed4, stdlib-tokens-bpe4096."""
    if tokenizer != "bytes":
        return f"{dataset}-tokens-{tokenizer}".replace(":", "")
    return dataset if patcher == "words" else f"{dataset}-{patcher}".replace(":", "")


def prepare(inputs=("stdlib",), name=None, patcher="words", tokenizer="bytes", val_fraction=0.05, val=None,
            data_dir="data"):
    """Writes {train,val}.bin and meta.json and returns their folder, data_dir/folder_name(...). Raises BadInput.

    The arguments are the options of the command line. meta.json is written last: a folder without one is not a dataset.
    """
    encode(b"", patcher)  # refuses an unknown patcher before any work
    if not re.fullmatch(r"bytes|gpt2|bpe:\d+", tokenizer):
        raise BadInput(f"--tokenizer={tokenizer} is unknown: expected bytes, gpt2 or bpe:N (such as bpe:4096)")
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1")

    known = inputs[0] if len(inputs) == 1 and inputs[0] in KNOWN and not os.path.exists(inputs[0]) else None
    if known:
        print(f"preparing {known}: {KNOWN[known]}", flush=True)
    paths = known_files(known, data_dir) if known else find_files(inputs)
    val_paths = find_files([val]) if val else []

    def documents():
        for path in paths:
            yield from ((None if not val else False, file) for file in file_documents(path))
        for path in val_paths:
            yield from ((True, file) for file in file_documents(path))

    vocab = None
    if tokenizer == "gpt2":
        vocab = gpt2_vocab()
    elif tokenizer != "bytes":
        if "-" in inputs:
            raise BadInput("--tokenizer=bpe:N reads its input twice: expected files, not -; save it to a file first")
        n_vocab = int(tokenizer[4:])
        if not 257 < n_vocab < 65536:
            raise BadInput(f"--tokenizer={tokenizer}: expected N between 258 and 65535")
        training_text = (text for b in batches(documents(), val_fraction) for is_val, text, _ in b if not is_val)
        vocab = train_bpe(n_vocab, training_text)
    separator = separator_of(vocab)

    stem = known or (Path(inputs[0]).name.split(".")[0] if inputs[0] != "-" else "stdin")
    folder = Path(data_dir) / folder_name(name or stem, patcher, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    final = {split: folder / f"{split}.bin" for split in ("train", "val")}
    temp = {split: folder / f"{split}.bin.tmp" for split in final}

    # read and cut: the reading is watched as it goes by, for the checksum and the progress bar
    sha256 = hashlib.sha256()
    plain = not any(str(p).endswith(("gz", "xz", "parquet", "-")) for p in paths)
    total = sum(map(os.path.getsize, paths + val_paths)) if plain else None
    try:
        from tqdm import tqdm

        bar = tqdm(total=total, unit="B", unit_scale=True, desc=str(folder), disable=None)
    except ImportError:
        print("no progress bar: pip install tqdm")
        bar = None

    def watched():
        for batch in batches(documents(), val_fraction):
            for _, text, _ in batch:
                sha256.update(text)
                if bar is not None:
                    bar.update(len(text))
            yield batch

    try:
        with open(temp["train"], "wb") as train, open(temp["val"], "wb") as val_file:
            for parts in parallel_map(partial(cut, patcher=patcher, vocab=vocab), watched(), os.cpu_count() or 1):
                parts[0].tofile(train)
                parts[1].tofile(val_file)
    finally:
        if bar is not None:
            bar.close()
    for a, b in (("val", "train"), ("train", "val")):  # chance, or too few documents, may leave one of them empty
        if not temp[a].stat().st_size and temp[b].stat().st_size:
            move_tail(temp[b], temp[a], val_fraction, separator)

    # measure and publish
    lengths, counts = bytes_of_ids(vocab), {}
    for split, path in temp.items():
        n = n_text = n_documents = n_patches = 0
        for chunk in read_chunks(path):
            n += len(chunk)
            n_text += int(lengths[chunk].sum())
            n_documents += int((chunk == separator).sum())
            n_patches += int((chunk >= 256).sum()) if vocab is None else len(chunk)
        if not n_text:
            raise BadInput(f"too little text in {' '.join(inputs)}: nothing is left for {final[split]}")
        counts[split] = {"symbols": n, "bytes": n_text, "documents": n_documents, "bytes_per_patch": n_text / n_patches}
    meta = {
        "inputs": list(inputs), "files": [str(p) for p in paths], "val_files": [str(p) for p in val_paths],
        "patcher": patcher, "tokenizer": tokenizer, "val_fraction": None if val else val_fraction, **counts,
        "sha256": sha256.hexdigest(), "python": sys.version.split()[0], "numpy": np.__version__,
    }
    (folder / "meta.json").unlink(missing_ok=True)  # from here until it is written again this folder is no dataset
    (folder / "vocab.json").unlink(missing_ok=True)
    if vocab is not None:
        with whole_file(folder / "vocab.json") as file:
            file.write(json.dumps(vocab).encode())
    for split in final:
        os.replace(temp[split], final[split])
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    for split, c in counts.items():
        print(f"{final[split]}: {c['bytes']:,} bytes of text in {c['documents']:,} documents, "
              f"{c['bytes_per_patch']:.2f} bytes a {'patch' if vocab is None else 'token'}")
    return folder


@contextmanager
def whole_file(path):
    """A binary file to write, under a temporary name until complete: a reader finds the old file or the new one."""
    temp = f"{path}.tmp"
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)  # a full disk needs the room
        raise


# ----------------------------------------------------------------------------------------------------------------------
# the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists the options")


def run(main):
    """Runs a script. What its user can mend ends it with one line and exit code 2."""
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", default=["stdlib"],
                        help=f"files, folders, globs, - for standard input, or one of {', '.join(KNOWN)}")
    parser.add_argument("--name", help="what train.py calls it (--dataset=NAME); default: after the first input")
    parser.add_argument("--patcher", default="words", help="words, gpt2 or fixed:N")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or gpt2 or bpe:N for the rival's token ids")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of the documents kept for validation")
    parser.add_argument("--val", metavar="PATH", help="validate on these files instead, and train on all of INPUT")
    parser.add_argument("--data_dir", default="data")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
