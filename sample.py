"""
Writes text with a trained model, or shows how much each byte of a text surprises it.

    python sample.py --out_dir=out/quick --prompt="def " --temperature=0.7 --top_p=0.95
    python sample.py --out_dir=out/quick                       # asks for prompts
    python sample.py --out_dir=out/quick --score="import os"   # painted in the terminal
    python sample.py --out_dir=out/quick --score=FILE:model.py --html=surprise.html
    python sample.py --out_dir=out/quick --page=quick.html     # the model itself, for a browser

In a notebook: model = load("out/quick"); write(model, "def "); score(model, "import os")
"""
import argparse
import codecs
import html
import io
import json
import sys
import unicodedata
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

import numpy as np
import regex
import torch

from model import GPT, STLM, from_pretrained, pick, stream_ids
from prepare import (BadInput, Parser, bytes_of_ids, decode, encode, first_line, printable, run,
                     separator_of, whole_file)
from train import Config, choose_device, load_checkpoint, parse

NUMBERS = {  # option: the least and the most that it may be, its default, what it means
    "max_new_bytes": (0, 10**9, 300, "length of a sample"),
    "num_samples": (1, 10**6, 1, "how many to write"),
    "temperature": (0.0, 100.0, 0.8, "0 always takes the likeliest"),
    "top_k": (1, 10**6, None, "choose among the k likeliest only"),
    "top_p": (0.001, 1.0, None, "choose among the likeliest that together have this probability"),
    "seed": (0, 10**18, None, "the same seed writes the same text"),
    "block_size": (1, 2**20 - 1, None, "symbols (tokens) to look back; default: as in training"),
}


def check(**options):
    """Raises BadInput for a number outside of its range. None stands for one not given."""
    for name, value in options.items():
        least, most, *_ = NUMBERS[name]
        if value is not None and not least <= value <= most:  # so that nan is refused too
            raise BadInput(f"{name}={value}: expected {least} to {most:,}")


def folder_and_edit(name):
    """The folder of a run, and edit() of its config file or None. The name is that of the folder,
    or of the config file, which an edited model needs."""
    if not str(name).endswith(".py"):
        return Path(name), None
    given, hooks = parse([str(name)])
    return Path(given.get("out_dir", Config.out_dir)), hooks.get("edit")


def load(name, device="", block_size=None):
    """The model in a folder: best.pt or else ckpt.pt of a training run, or what save_pretrained()
    wrote. The name may also be of a checkpoint file, or of the config file of a run. With
    block_size the model looks further back."""
    check(block_size=block_size)
    out_dir, edit = folder_and_edit(name)
    paths = [out_dir, out_dir / "best.pt", out_dir / "config.json", out_dir / "ckpt.pt"]
    path = next((path for path in paths if path.is_file()), paths[-1])
    if path.name == "config.json":
        try:
            model = from_pretrained(out_dir)
        except Exception as error:  # of either file's format
            raise BadInput(f"{out_dir} holds no model of save_pretrained() ({first_line(error)})")
    else:
        model, _ = load_checkpoint(path, edit)
    if block_size is not None:
        model.set_block_size(block_size)
    return model.to(choose_device(device)).eval()


# --- writing --------------------------------------------------------------------------------------
def document(model, text):
    """text (str or bytes) cut as in training, after the separator of documents: (N,) int64."""
    text = text.encode() if isinstance(text, str) else text
    patcher, vocab = model.text["patcher"], model.text["vocab"]
    ids = np.concatenate([[separator_of(vocab)], encode(text, patcher, vocab)]).astype(np.int64)
    return torch.from_numpy(ids).to(model.rope.device)


@torch.no_grad()
def decide_last_flag(model, ids, **options):
    """Lets the model decide whether the last byte of a prompt ends its patch: the rule that cut the
    training text may depend on what follows, and here nothing does yet."""
    byte = int(ids[-1]) % 256
    if isinstance(model, GPT) or byte == 0xFF:  # tokens have no flag, and 0xFF never has it
        return ids
    open_or_closed = torch.tensor([byte, byte + 256], device=ids.device)
    logits = model(ids[None, -1 - model.config.block_size : -1])[:, -1, open_or_closed]  # (1, 2)
    return torch.cat([ids[:-1], open_or_closed[pick(logits, **options)]])


def stream(model, prompt, max_new_bytes=300, temperature=0.8, top_k=None, top_p=None, seed=None):
    """Yields the text that follows prompt (str or bytes), in pieces of whole characters, until the
    model ends the document; bytes that are not UTF-8 as U+FFFD. Raises BadInput."""
    check(max_new_bytes=max_new_bytes, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if not prompt:
        raise BadInput("the prompt has zero bytes: expected at least one")
    generator = torch.Generator(model.rope.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    options = dict(temperature=round(temperature, 3), generator=generator)  # 1e-40 would overflow

    ids = decide_last_flag(model, document(model, prompt), **options)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder = io.IncrementalNewlineDecoder(decoder, translate=False)  # keeps \r\n in one piece
    for new in stream_ids(model, ids[None], max_new_bytes, top_k=top_k, top_p=top_p, **options):
        piece = decode(new.cpu().numpy(), model.text["vocab"])
        max_new_bytes -= len(piece)
        if not piece or max_new_bytes < 0:  # no bytes: a separator
            break
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def write(model, prompt, **options):
    """The text that follows prompt, as one string. The options are those of stream()."""
    return "".join(stream(model, prompt, **options))


# --- scoring --------------------------------------------------------------------------------------
@torch.no_grad()
def score(model, text):
    """How surprising text (str or bytes) is. For each byte, bits: its surprise, and ends: does it
    end its patch (for GPT: its token, whose bits its bytes share)? bits.mean() is bits per byte.
    Text longer than block_size is scored in windows. Raises BadInput for empty text."""
    if not text:
        raise BadInput("the text to score has zero bytes: expected at least one")
    ids, block_size = document(model, text), model.config.block_size
    windows = zip(ids[:-1].split(block_size), ids[1:].split(block_size))
    logp = [model(x[None])[0].float().log_softmax(1).gather(1, y[:, None]) for x, y in windows]
    nats, ids = -torch.cat(logp)[:, 0].cpu().numpy(), ids[1:].cpu().numpy()

    lengths = bytes_of_ids(model.text["vocab"])[ids]
    bits = np.repeat(nats / np.log(2) / lengths, lengths)
    ends = np.zeros(len(bits), bool)
    ends[lengths.cumsum() - 1] = isinstance(model, GPT) or ids >= 256
    return bits, ends


def characters(text, bits, ends):
    """Yields for each character of text (bytes): how it is shown, its bits, how light it is
    painted (255 for none, 0 from 8 bits on), and whether a patch ends in it."""
    i = 0
    for character in regex.findall(r"\X", text.decode("utf-8", "surrogateescape")):  # with accents
        raw = character.encode("utf-8", "surrogateescape")
        shown = raw.decode("utf-8", "backslashreplace").replace("\r\n", "\n").replace("\r", r"\r")
        surprise, end = bits[i : i + len(raw)].sum(), bool(ends[i : i + len(raw)].any())
        yield printable(shown).expandtabs(4), surprise, round(255 * (1 - min(surprise, 8) / 8)), end
        i += len(raw)


def paint_terminal(text, bits, ends):
    return "".join(
        f"\x1b[48;2;255;{light};{light}m\x1b[30m{c.replace(chr(10), ' ')}\x1b[0m"
        + "\x1b[36m|\x1b[0m" * end + "\n" * (c == "\n")
        for c, _, light, end in characters(text, bits, ends))


def paint_svg(text, bits, ends):
    """A picture, for a browser also a page to hover over. Red is surprise; blue ends a patch."""
    left, top, cells = 10, 40, []
    for c, surprise, light, end in characters(text, bits, ends):
        width = 8 * (len(c) if c.isascii() else 1 + (unicodedata.east_asian_width(c[0]) in "WF"))
        if left + width > 810 and c != "\n":
            left, top = 10, top + 20
        cells.append(f'<g transform="translate({left} {top})"><title>{surprise:.2f} bits</title>'
                     f'<rect width="{width}" height="18" fill="rgb(255,{light},{light})"/>'
                     f'<text y="14">{html.escape(c)}</text>'
                     f'<path d="M{width - 0.5} 0v{18 * end}" stroke="#08c"/></g>')
        left, top = (10, top + 20) if c == "\n" else (left + width, top)
    cells = "".join(cells).translate({0xFFFE: "?", 0xFFFF: "?"})  # which XML does not have
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="828" height="{top + 28}" '
            'font-family="monospace" font-size="13" xml:space="preserve">'
            '<rect width="100%" height="100%" fill="white"/>'
            f'<text x="10" y="25">{bits.mean():.3f} bits per byte</text>{cells}</svg>\n')


# --- a page that holds the model ------------------------------------------------------------------
def round_rows(p):
    """A parameter (..., n) as int8 (..., n) and the scale of each row (..., 1)."""
    scale = p.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return (p / scale).round().to(torch.int8), scale


def save_page(model, path):
    """Writes images/page.html with a model that a browser computes. Raises BadInput."""
    weights, tensors = model.state_dict(), {}
    if weights.keys() != STLM(model.config).state_dict().keys() or model.text["patcher"] != "words":
        raise BadInput("--page: expected an STLM with --patcher=words and without edit()")
    for name, p in weights.items():
        integers, scales = (b64encode(part.cpu().numpy()).decode() for part in round_rows(p))
        tensors[name] = {"columns": p.size(-1), "integers": integers, "scales": scales}
    data = json.dumps({"config": vars(model.config), "tensors": tensors})
    page = Path(__file__).with_name("images").joinpath("page.html").read_text("utf-8")
    with whole_file(path) as file:
        file.write(page.replace(">MODEL<", f">{data}<").encode())


# --- the command line -----------------------------------------------------------------------------
def text_or_file(value):
    """The bytes that a user gives as --prompt or --score: the text itself, or FILE:path."""
    if value.startswith("FILE:"):
        return Path(value[5:]).read_bytes()
    return value.encode("utf-8", "surrogateescape")


def write_aloud(model, prompt, num_samples, seed, **options):
    for i in range(num_samples):
        print("-" * 80 + "\n" if i else "", end="")
        print(printable(prompt.decode("utf-8", "replace")), end="", flush=True)
        for piece in stream(model, prompt, seed=None if seed is None else seed + i, **options):
            print(printable(piece), end="", flush=True)
        print()


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--out_dir", default="out/quick", help="of a run; or its config file")
    task = parser.add_mutually_exclusive_group(required=sys.stdin is None)  # it is closed
    task.add_argument("--prompt", type=text_or_file, help="text, or FILE:path, to go on from")
    task.add_argument("--score", type=text_or_file, help="text, or FILE:path, to score instead")
    task.add_argument("--page", metavar="PATH", help="write a page that holds the model, .html")
    parser.add_argument("--html", metavar="PATH", help="paint the scored text here; also PATH.svg")
    parser.add_argument("--device", default="", help="cuda, mps or cpu")
    for name, (_, most, default, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(most), default=default, help=meaning)
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in NUMBERS}
    check(**options)
    if args.html and args.score is None:
        raise BadInput("--html shows a scored text: expected --score too")
    if args.html and not args.html.endswith((".html", ".svg")):  # it may be the text by mistake
        raise BadInput(f"--html={args.html}: expected a name that ends in .html or .svg")
    model = load(args.out_dir, args.device, options.pop("block_size"))

    if args.page:
        save_page(model, args.page)
    elif args.score is not None:
        bits, ends = score(model, args.score)
        if args.html:
            with whole_file(args.html) as file:  # in ASCII, which .html and .svg both understand
                file.write(paint_svg(args.score, bits, ends).encode("ascii", "xmlcharrefreplace"))
        else:
            print(paint_terminal(args.score, bits, ends))
        print(f"{bits.mean():.4f} bits per byte over {len(bits):,} bytes")
    elif args.prompt is not None:
        write_aloud(model, args.prompt, **options)
    else:
        sys.stdin.reconfigure(errors="surrogateescape")
        with suppress(EOFError):
            while prompt := input("prompt> "):  # until an empty line
                write_aloud(model, text_or_file(prompt), **options)


if __name__ == "__main__":
    run(main)
