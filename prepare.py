"""
Cuts text into patches and writes it as symbols to data/NAME/{train,val}.bin, for train.py.

    python prepare.py                                # Python's standard library: needs no network
    python prepare.py novels/ more.txt --name=mine   # your own text
    python prepare.py shakespeare                    # or tinystories, fineweb-edu: downloads
    python prepare.py stdlib --tokenizer=bpe:4096    # token ids instead, for the baseline GPT

Own text: files, folders or - (standard input). .gz and .xz are unpacked; each line of a .jsonl and
each row of a .parquet is a document, its "text"; any other file is one document.

A byte of text becomes one symbol, byte + 256 * (this byte ends its patch), so a data file is a flat
array of uint16 and any way of cutting text is only another flag. 0xFF + 256 follows each document.
A text byte 0xFF (there is none in UTF-8) is kept but never ends a patch, so every string of bytes
comes back exactly.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import os
import signal
import sys
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import regex
from tqdm import tqdm

SEPARATOR = 0xFF + 256
MAX_PATCH = 16   # bytes; a longer run is cut
PIECE = 1 << 20  # bytes of text that are read and cut at a time


class BadInput(Exception):
    """The user can fix it: the message names the option or file, what was expected, what to do."""


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# --- patches: which bytes end one -----------------------------------------------------------------
OTHER, SPACE, LETTER, WORD = range(4)  # kinds of characters; WORD is a letter and a word by itself
WITHOUT_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"


@lru_cache
def kinds():
    """The kind of each character up to U+FFFF; all after it count as U+FFFF does, as OTHER."""
    characters = "".join(map(chr, range(1 << 16)))
    kind = np.full(len(characters), OTHER, np.uint8)
    for number, pattern in [
        (SPACE, r"[ \t\n\v\f\r]"),
        (LETTER, r"[\p{L}\p{M}\p{N}_\udc80-\udcff]"),  # the last are bytes that are not UTF-8
        (OTHER, WITHOUT_SPACES + "|ー"),  # signs that change the letter before them
        (WORD, rf"(?=\p{{Lo}}){WITHOUT_SPACES}"),
    ]:
        kind[[match.start() for match in regex.finditer(pattern, characters)]] = number
    return kind


def word_ends(text):
    """Where patches of at most MAX_PATCH bytes end: before a word that follows anything else, and
    with the first whitespace byte that follows anything else: |x |= |foo(|bar). In scripts without
    spaces each letter is a word."""
    points = np.frombuffer(text, np.uint8)  # one for each character
    if not text.isascii():
        points = text.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass")
        points = np.frombuffer(points, np.uint32)
    kind = kinds()[points if text.isascii() else np.minimum(points, 0xFFFF)]
    begins = np.zeros(len(kind) + 1, bool)  # patches; the last also at the end of the text
    begins[1:-1] = (kind[1:] == WORD) | (kind[1:] == LETTER) & (kind[:-1] != LETTER)
    begins[2:] |= (kind[1:] == SPACE) & (kind[:-1] != SPACE)
    stops = np.flatnonzero(begins)
    if not text.isascii():  # from characters to bytes
        n_bytes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        n_bytes[(points >= 0xDC80) & (points < 0xDD00)] = 1
        stops = np.cumsum(n_bytes)[stops - 1]
    ends = np.zeros(len(text), bool)
    ends[stops - 1] = True
    starts, stops = np.append(0, stops), np.append(stops, len(text))
    long = stops - starts > MAX_PATCH
    for start, stop in zip(starts[long].tolist(), stops[long].tolist()):
        while stop - start > MAX_PATCH:
            start = character_start(text, start + MAX_PATCH)
            ends[start - 1] = True
    return ends


def character_start(text, at):
    """Where the UTF-8 character that holds byte `at` begins; in other bytes, up to 3 earlier."""
    for i in range(at, max(0, at - 3), -1):
        if text[i] & 0xC0 != 0x80:
            return i
    return max(0, at - 3)


def encode(text, patcher="words", vocab=None):
    """The symbols of text (bytes), one a byte, cut by "words", "gpt2" or "fixed:N", or with a
    vocabulary its token ids: uint16."""
    if vocab is not None:
        return tokenize(text, vocab)
    raw = np.frombuffer(text, np.uint8)
    if patcher == "words":
        ends = word_ends(text)
    elif patcher == "gpt2":  # a patch is a token of GPT-2, the paper's choice
        vocab, ends = gpt2_vocab(), np.zeros(len(raw), bool)
        ends[np.cumsum([len(vocab[i]) for i in tokenize(text, vocab)], dtype=int) - 1] = True
    elif regex.fullmatch(r"fixed:[1-9]\d{0,8}", patcher):
        ends = np.arange(1, len(raw) + 1) % int(patcher[6:]) == 0
    else:
        raise BadInput(f"--patcher={patcher} is unknown: expected words, gpt2 or fixed:N (fixed:4)")
    return raw + np.uint16(256) * (ends & (raw != 0xFF))


def decode(ids, vocab=None):
    """The bytes of symbols, or with their vocabulary of token ids; separators stand for none."""
    if vocab is not None:
        return "".join(vocab[i] for i in ids).encode("latin-1")
    ids = np.asarray(ids)
    return (ids[ids != SEPARATOR] & 0xFF).astype(np.uint8).tobytes()


def printable(text):
    """text (str) with what a terminal would obey instead of show (control characters, changes of
    the direction of writing) as \\x1b and the like. A last "\\r" is left, as "\\n" may follow."""
    obeyed = r"[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?=[^\n])"
    return regex.sub(obeyed, lambda match: match[0].encode("unicode_escape").decode(), text)


# --- tokens, for the baseline ---------------------------------------------------------------------
# A vocabulary is a list of strings, id -> its bytes as latin-1. The last, "", is the separator. Of
# symbols it is None.
GPT2_RULE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@lru_cache(maxsize=4)
def encoding_of(vocab):
    import tiktoken
    ranks = {token.encode("latin-1"): i for i, token in enumerate(vocab[:-1])}
    return tiktoken.Encoding("", pat_str=GPT2_RULE, mergeable_ranks=ranks, special_tokens={})


def tokenize(text, vocab):
    """Token ids (uint16) of text (bytes). Bytes that are not UTF-8 become one token each."""
    encoding, ids = encoding_of(tuple(vocab)), []
    for part in regex.split("([\udc80-\udcff])", text.decode("utf-8", "surrogateescape")):
        if "\udc80" <= part <= "\udcff":
            ids.append([encoding.encode_single_token(part.encode("utf-8", "surrogateescape"))])
        else:
            ids.append(encoding.encode_to_numpy(part, disallowed_special=()))
    return np.concatenate(ids).astype(np.uint16)


@lru_cache
def gpt2_vocab():
    import tiktoken
    what = "GPT-2's vocabulary (TIKTOKEN_CACHE_DIR names a folder that may hold it)"
    encoding = download(what, tiktoken.get_encoding, "gpt2")
    tokens = map(encoding.decode_single_token_bytes, range(encoding.max_token_value))
    return tuple(token.decode("latin-1") for token in tokens) + ("",)


def train_bpe(n_vocab, texts):
    """A byte-level BPE vocabulary of at most n_vocab entries from texts (an iterable of bytes)."""
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
    bpe = ByteLevelBPETokenizer()
    texts = (text.decode("utf-8", "replace") for text in texts)
    bpe.train_from_iterator(texts, n_vocab - 1, min_frequency=0, show_progress=False)

    # its alphabet: the visible bytes as themselves, the others as the characters from U+0100 on
    order = sorted(range(256), key=lambda b: b == ord(" ") or not chr(b).isprintable())
    byte_of = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), order))
    tokens = sorted(bpe.get_vocab(), key=bpe.token_to_id)
    return tuple(bytes(byte_of[c] for c in token).decode("latin-1") for token in tokens) + ("",)


def separator_of(vocab):
    return SEPARATOR if vocab is None else len(vocab) - 1


def bytes_of_ids(vocab):
    """How many bytes of text each id stands for: 0 for the separator."""
    return np.array([1] * SEPARATOR + [0] if vocab is None else [len(token) for token in vocab])


# --- reading documents ----------------------------------------------------------------------------
KNOWN = {  # name: what it is and its size, said before it is read
    "stdlib": "the source of Python's standard library, about 12 MB, already on this machine",
    "shakespeare": "tiny Shakespeare, a download of 1.1 MB",
    "tinystories": "TinyStories (arXiv 2305.07759), 1.9 GB of text, a download of about 1 GB",
    "fineweb-edu": "the first file of FineWeb-Edu (arXiv 2406.17557), a download of about 2 GB",
}
SHAKESPEARE = (  # its address and SHA-256
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
HUB = {  # name: a repository of the Hugging Face hub, and which of its files
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet"),
}
NOT_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh91AY",
            b"PK\3\4", b"%PDF", b"\x89PNG", b"\xff\xd8\xff")  # how other kinds of files begin


def download(what, get, *arguments, **options):
    try:
        return get(*arguments, **options)
    except Exception as error:  # each library has its own kinds of network error
        raise BadInput(f"{what} could not be downloaded ({first_line(error)}); without a network "
                       "--dataset=stdlib works, or your own text: prepare.py FILES --name=mine")


def known_files(name, temp):
    """The files of a known dataset. The libraries keep what they download for the next time."""
    print(f"{name}: {KNOWN[name]}", flush=True)
    if name == "stdlib":
        skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
        root = Path(os.__file__).parent
        return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    if name == "shakespeare":
        from tiktoken.load import read_file_cached
        path = Path(temp, "shakespeare.txt")
        path.write_bytes(download(name, read_file_cached, *SHAKESPEARE))
        return [path]
    from huggingface_hub import snapshot_download
    repo, files = HUB[name]
    folder = download(name, snapshot_download, repo, repo_type="dataset", allow_patterns=files)
    return sorted(Path(folder).glob(files))


def text_files(folder):
    """The files in a folder and its subfolders, without hidden and binary ones."""
    def refuse(error):
        raise error  # a subfolder that cannot be read

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (Path(root, name) for name in sorted(names) if name[0] != "."):
            packed = path.suffix.lower() in (".gz", ".xz", ".parquet")
            if path.is_file() and (packed or np.fromfile(path, np.uint8, 4096).all()):
                yield path  # without a zero byte, as any UTF-8
            else:
                print(f"left out, as it is no text: {printable(str(path))}")


def find_files(inputs, temp):
    """The files of all inputs in order; "-" stands for standard input."""
    for name in inputs:
        if os.path.isdir(name):
            yield from text_files(name)
        elif name == "-" or os.path.isfile(name) or Path(name).is_fifo():
            yield Path(name)
        elif name in KNOWN:
            yield from known_files(name, temp)
        else:
            raise BadInput(f"{name}: no such file or folder; expected files, folders, - or one of "
                           + ", ".join(KNOWN))


def documents(path):
    """Yields each document of a file as an iterable of its bytes, piece by piece."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        import pyarrow.parquet
        for rows in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            for text in rows["text"].to_pylist():
                yield [b"" if text is None else text.encode()]
        return

    opener = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    with sys.stdin.buffer if path == Path("-") else opener(path, "rb") as file:
        if file.peek(16).startswith(NOT_TEXT):
            raise BadInput(f"{path} is UTF-16, compressed or no text: iconv -f UTF-16 converts it; "
                           "unpack it, or give it a name that ends in .gz or .xz")
        if regex.search(r"\.jsonl(\.gz|\.xz)?$", name):
            for line in file:
                text = json.loads(line)["text"] if line.strip() else None
                yield [b"" if text is None else text.encode("utf-8", "surrogatepass")]
        else:
            yield iter(partial(file.read, PIECE), b"")


def collect(paths, file):
    """Appends the text of all documents to a file. Returns three arrays: where in it each document
    begins and ends, and a hash of it."""
    bounds, hashes = array("q", [file.tell()]), array("q")
    for path in paths:
        n_before = len(hashes)
        try:
            for document in documents(path):
                crc = 0
                for piece in document:
                    file.write(piece)
                    crc = zlib.crc32(piece, crc)
                bounds.append(file.tell())
                hashes.append(crc)
        except Exception as error:  # each format has its own kinds
            if isinstance(error, (BadInput, ImportError)) or getattr(error, "errno", None):
                raise  # with errno by the operating system, such as a full disk
            number = len(hashes) - n_before + 1
            raise BadInput(f"{path}, document {number}: expected a whole .gz or .xz file, a JSON "
                           f'object or table with a string "text" ({first_line(error)})')
    bounds = np.array(bounds)
    if n_empty := (bounds[1:] == bounds[:-1]).sum():
        print(f"left out, as they are empty: {n_empty} files, lines or rows")
    return bounds[:-1], bounds[1:], np.array(hashes)


# --- the split into training and validation -------------------------------------------------------
def split(file, begins, ends, hashes, val_fraction):
    """Where in its file the held-out part of each document begins; at its end if it has none.
    In the order of their hashes, documents are held out until they make up val_fraction of the
    text, the last one in part. Copies of a document have one hash, so they are treated alike."""
    sizes = ends - begins
    held_out = max(1, round(val_fraction * sizes.sum()))
    _, group = np.unique(hashes, return_inverse=True)  # numbers the documents in that order
    group_sizes = np.bincount(group, sizes)
    left = held_out - group_sizes.cumsum() + group_sizes  # to hold out when a group's turn comes
    share = np.clip(left / np.maximum(1, group_sizes), 0, 1)
    middles = ends - np.ceil(sizes * share[group]).astype(np.int64)
    for i in np.flatnonzero((begins < middles) & (middles < ends)):
        n = middles[i] - begins[i]
        middles[i] = break_before(file, middles[i], min(n, 3 + n // 16, PIECE // 16))
    return middles


def break_before(file, at, reach):
    """Where to cut the text in a file, at most `reach` bytes before `at`: after the last line end
    that no patch or token straddles or, where there is none, between two characters."""
    file.seek(at - reach)
    text = file.read(reach + 1)
    line_ends = [match.end() for match in regex.finditer(rb"\S\r?\n(?=\n?\S)", text)]
    return at - reach + (line_ends[-1] if line_ends else character_start(text, reach))


def pieces(file, begins, ends, purpose):
    """Yields (bytes, last) of these parts of a file, a long one piece by piece; last ends a part.
    A bar shows the progress towards a purpose."""
    total = int((ends - begins).sum())
    with tqdm(total=total, desc=purpose, unit="B", unit_scale=True, disable=None) as bar:
        for begin, end in zip(begins.tolist(), ends.tolist()):
            while begin < end:
                last = end - begin <= PIECE
                stop = end if last else break_before(file, begin + PIECE, PIECE // 16)
                file.seek(begin)
                yield file.read(stop - begin), last
                bar.update(stop - begin)
                begin = stop


# --- writing --------------------------------------------------------------------------------------
def folder_name(dataset, patcher="words", tokenizer="bytes"):
    """The folder of one way to cut a dataset: stdlib, stdlib-fixed4, stdlib-tokens-bpe4096."""
    kind = patcher if tokenizer == "bytes" else f"tokens-{tokenizer}"
    return dataset if kind == "words" else f"{dataset}-{kind}".replace(":", "")


def write_ids(path, pieces, patcher, vocab, sha256):
    """Writes a data file, updates sha256 with it and returns its counts for meta.json."""
    separator, counts = np.uint16(separator_of(vocab)), Counter()
    with open(path, "wb") as file:
        for text, last in pieces:
            ids = encode(text, patcher, vocab)
            ids = np.append(ids, separator) if last else ids
            file.write(ids)
            sha256.update(ids)
            counts.update(symbols=len(ids), bytes=len(text), documents=int(last))
            counts["patches"] += len(ids) if vocab else int((ids >= 256).sum())
    return dict(counts, bytes_per_patch=counts["bytes"] / counts["patches"])


def refuse_more_than_a_dataset(folder):
    ours = {"train.bin", "val.bin", "meta.json"}
    try:  # one look, as another run may be replacing the folder
        fine = all(entry.name in ours and entry.is_file() for entry in os.scandir(folder))
    except PermissionError:
        raise
    except OSError as error:  # a file or a loop of links is not fine, nothing at all is
        fine = isinstance(error, FileNotFoundError)
    if not fine:
        raise BadInput(f"{folder} holds more than a dataset; expected another --name or --data_dir")


def prepare(inputs=("stdlib",), name=None, patcher="words", tokenizer="bytes", val_fraction=0.05,
            val=None, data_dir="data"):
    """Writes a dataset and returns its folder, data_dir/folder_name(...). Raises BadInput.
    The arguments are the options of the command line. An older dataset is replaced as a whole."""
    encode(b"", patcher)  # refuses an unknown patcher before any work
    bpe = regex.fullmatch(r"bpe:(\d{1,5})", tokenizer)
    if tokenizer not in ("bytes", "gpt2") and not (bpe and 257 < int(bpe[1]) < 65536):
        raise BadInput(f"--tokenizer={tokenizer}: expected bytes, gpt2 or bpe:N, N = 258 to 65535")
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1")
    val_inputs = [] if val is None else [val]
    if [*inputs, *val_inputs].count("-") > (sys.stdin is not None):
        raise BadInput("-: standard input is closed, or given twice: expected it once")
    stem = regex.sub(r"\W+", "-", Path(inputs[0]).absolute().name.split(".")[0]).strip("-")
    if not name and stem in KNOWN and stem != inputs[0]:
        raise BadInput(f"{inputs[0]}: expected a --name, as {stem} is a known dataset's")
    folder = Path(data_dir) / folder_name(name or stem or "text", patcher, tokenizer)
    target = Path(os.path.realpath(folder))  # where it leads to, if it is a link
    refuse_more_than_a_dataset(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temp:
        new = Path(temp, "new")
        new.mkdir()
        with open(Path(temp, "text"), "w+b") as file:  # all the text, as streams are read only once
            paths, val_paths = (list(find_files(names, temp)) for names in (inputs, val_inputs))
            begins, ends, hashes = collect(paths, file)
            if val_inputs:
                *val_bounds, val_hashes = collect(val_paths, file)
                apart = ~np.isin(hashes, val_hashes)  # documents that are not held out
                parts = {"train": (begins[apart], ends[apart]), "val": val_bounds}
            else:
                middles = split(file, begins, ends, hashes, val_fraction)
                parts = {"train": (begins, middles), "val": (middles, ends)}
            for part, (begins, ends) in parts.items():
                if not (begins < ends).any():
                    raise BadInput(f"too little text in {' '.join([*inputs, *val_inputs])}: "
                                   f"nothing is left for {part}.bin")

            vocab = gpt2_vocab() if tokenizer == "gpt2" else None
            if bpe:
                training = pieces(file, *parts["train"], "the vocabulary")
                vocab = train_bpe(int(bpe[1]), (text for text, _ in training))
            meta, sha256 = {}, hashlib.sha256()
            for part, bounds in parts.items():
                path = new / f"{part}.bin"
                text = pieces(file, *bounds, path.name)
                meta[part] = write_ids(path, text, patcher, vocab, sha256)
        meta |= {"inputs": list(inputs), "val_input": val, "val_fraction": val_fraction,
                 "patcher": patcher, "tokenizer": tokenizer, "sha256": sha256.hexdigest(),
                 "vocab": vocab}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))

        refuse_more_than_a_dataset(target)
        while new.exists():  # again if another run has put its folder there meanwhile
            with suppress(FileNotFoundError):
                target.rename(mkdtemp(dir=temp))
            with suppress(OSError):
                new.rename(target)
    for part in parts:
        print(f"{folder}/{part}.bin: {meta[part]['bytes']:,} bytes of text in "
              f"{meta[part]['documents']:,} documents, {meta[part]['patches']:,} patches or tokens")
    return folder


@contextmanager
def whole_file(path):
    """A binary file to write, under a temporary name until complete: a reader finds the old file
    or the new one. Links are followed; a device or folder is refused."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path} is no regular file: expected another name to write to")
    path = os.path.realpath(path)
    temp = f"{path}.unfinished"
    try:
        with open(temp, "wb") as file:
            yield file
        os.replace(temp, path)
    finally:
        Path(temp).unlink(missing_ok=True)  # a full disk needs the room


# --- the command line -----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists the options")


def run(main):
    """Runs a script. What its user can fix ends it with one line and exit code 2."""
    for name in "stdout", "stderr":
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # None: it was closed
        getattr(sys, name).reconfigure(errors="replace")  # characters that it cannot show
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, such as head, has enough
        os._exit(1)
    except (BadInput, OSError, ModuleNotFoundError) as error:
        message = printable(str(error)).replace("\n", " ")
        if isinstance(error, ModuleNotFoundError):
            message = f"this needs the package {error.name}: pip install {error.name}"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", default=["stdlib"],
                        help=f"files, folders, - or one of {', '.join(KNOWN)}")
    parser.add_argument("--name", help="for train.py's --dataset=NAME; default: the first input's")
    parser.add_argument("--patcher", default="words", help="words, gpt2 or fixed:N")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or gpt2 or bpe:N (baseline)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="share of text held out")
    parser.add_argument("--val", metavar="PATH", help="validate on this, train on the rest")
    parser.add_argument("--data_dir", default="data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets it clean up
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
