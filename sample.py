"""
Writes text with a trained model, or shows how much each byte of a text surprises it.

    python sample.py --out_dir=out/quick --prompt="def " --max_new_bytes=300
    python sample.py --out_dir=out/quick --prompt=FILE:start.txt --temperature=0.8 --top_p=0.95 --num_samples=3
    python sample.py --out_dir=out/quick                                    # asks for prompts until an empty line
    python sample.py --out_dir=out/quick --prompt="def " --max_new_bytes=50000 --compile
    python sample.py --out_dir=out/quick --score="for i in range(10):"      # bits per byte, painted in the terminal
    python sample.py --out_dir=out/quick --score=FILE:model.py --html=surprise.html

In a notebook: model = load("out/quick"); write(model, "def "); score(model, "import os")
"""
import argparse
import codecs
import html
import math
import os

import numpy as np
import torch

from model import GPT, LanguageModel, pick
from prepare import BadInput, Parser, bytes_of_ids, printable, run, separator_of, to_ids, to_text, whole_file
from train import build_model, choose_device, load_checkpoint, why_no_compile


def load(out_dir, device="", block_size=None):
    """The model of a training run, ready to use: out_dir/best.pt, or ckpt.pt, or a checkpoint file itself; or one that
    model.save_pretrained() wrote into out_dir. block_size: of its rows, when not that of training."""
    device = choose_device(device)
    if os.path.isfile(os.path.join(out_dir, "config.json")):
        model = LanguageModel.from_pretrained(out_dir).to(device)
    else:
        paths = [out_dir, os.path.join(out_dir, "best.pt"), os.path.join(out_dir, "ckpt.pt")]
        path = next((p for p in paths if os.path.isfile(p)), paths[-1])
        checkpoint = load_checkpoint(path, device)
        model = build_model(checkpoint["config"], checkpoint["meta"]["vocab"]).to(device)
        model.load_state_dict(checkpoint["model"])
        model.text = checkpoint["meta"]  # how its training text was cut
    if block_size is not None:
        if not 1 <= block_size < 2**20:
            raise BadInput(f"block_size={block_size}: expected 1 to {2**20 - 1:,}")
        model.set_block_size(block_size)
    return model.eval()


def document(model, text):
    """A separator, which begins every document, and then text (bytes) cut as the training data was: (N,) int64."""
    meta = model.text
    ids = to_ids(text, meta["patcher"], meta["vocab"])
    ids = np.concatenate([[separator_of(meta["vocab"])], ids]).astype(np.int64)
    return torch.from_numpy(ids).to(model.wte.weight.device)


@torch.no_grad()
def settle(model, ids, generator):
    """Lets the model decide whether the last byte of a prompt ends its patch: the rule that cuts text may depend on
    what follows, and here nothing does yet."""
    if isinstance(model, GPT):
        return ids
    before, byte = model.fit(ids[:-1]), int(ids[-1]) % 256
    pair = torch.tensor([byte, byte + 256], device=ids.device)
    logits = model(before[None])[0][:, -1, pair]  # (1, 2)
    return torch.cat([ids[:-1], pair[pick(logits, generator=generator)]])


def stream(model, prompt, max_new_bytes=300, temperature=0.8, top_k=None, top_p=None, seed=None):
    """Yields the text that follows prompt (str or bytes), in pieces of whole characters, until the document ends.

    Raises BadInput for an empty prompt. Bytes that are no UTF-8 become U+FFFD.
    """
    prompt = prompt.encode() if isinstance(prompt, str) else prompt
    if not prompt:
        raise BadInput("the prompt has zero bytes: expected at least one")
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**63 if seed is None else seed)
    ids = settle(model, document(model, prompt), generator)
    decoder, n = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for new in model.stream([ids], max_new_bytes, temperature, top_k, top_p, generator):
        piece = to_text(new.cpu().numpy(), model.text["vocab"])
        n += len(piece)
        if not piece or n > max_new_bytes:  # a separator: the model ends its document
            break
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def write(model, prompt, **options):
    """The text that follows prompt, as one string. Options as in stream()."""
    return "".join(stream(model, prompt, **options))


@torch.no_grad()
def score(model, text):
    """How surprising text (str or bytes) is: bits (a float a byte) and ends (does this byte end its patch?).

    bits.sum() / len(bits) are the bits per byte. Longer texts are scored in windows of block_size.
    """
    text = text.encode() if isinstance(text, str) else text
    if not text:
        raise BadInput("the text to score has zero bytes: expected at least one")
    ids, N = document(model, text), model.config.block_size
    nats = torch.cat([
        model(x[None], y[None], reduction="none")[1] for x, y in zip(ids[:-1].split(N), ids[1:].split(N))
    ]).cpu().numpy()
    lengths = bytes_of_ids(model.text["vocab"])[ids[1:].cpu().numpy()]
    bits = np.repeat(nats / math.log(2) / lengths, lengths)  # a token's bits are shared among its bytes
    ends = np.zeros(len(bits), bool)
    ends[lengths.cumsum() - 1] = True if isinstance(model, GPT) else (ids[1:] >= 256).cpu().numpy()
    return bits, ends


# ----------------------------------------------------------------------------------------------------------------------
# showing


def characters(text, bits, ends):
    """Yields (character, bits, ends a patch) for text (bytes); what is no UTF-8 or no character comes out escaped."""
    i = 0
    for c in text.decode("utf-8", "surrogateescape"):
        n = len(c.encode("utf-8", "surrogateescape"))
        shown = "\ufffd" if "\udc80" <= c <= "\udcff" else printable(c)
        yield shown, float(bits[i : i + n].sum()), bool(ends[i + n - 1])
        i += n


def shade(bits):
    """Background of a surprise: white for none, red from 8 bits on."""
    light = int(255 * (1 - min(bits, 8.0) / 8))
    return 255, light, light


def paint_terminal(text, bits, ends):
    out = []
    for c, b, end in characters(text, bits, ends):
        red, green, blue = shade(b)
        mark = f"\x1b[48;2;{red};{green};{blue}m\x1b[30m{c}\x1b[0m" if c != "\n" else "\n"
        out.append(mark + ("\x1b[36m|\x1b[0m" if end and c != "\n" else ""))
    return "".join(out)


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.7 monospace; margin: 2em; white-space: pre-wrap; max-width: 60em; color: #000 }}
i {{ font-style: normal; border-right: 1px solid #08c }} p {{ font-family: sans-serif }}</style>
<p>{title}. Red: bits of surprise, up to 8. Blue lines: where patches end. Hover for numbers.</p>{body}
"""


def paint_html(text, bits, ends):
    spans = []
    for c, b, end in characters(text, bits, ends):
        tag = "i" if end else "span"
        style = "background:rgb({},{},{})".format(*shade(b))
        spans.append(f'<{tag} style="{style}" title="{b:.2f} bits">{html.escape(c)}</{tag}>')
    return PAGE.format(title=f"{bits.mean():.3f} bits per byte", body="".join(spans))


def paint_svg(text, bits, ends, columns=100):
    """The same as a picture, for a README."""
    x, y, shapes = 0, 0, []
    for c, b, end in characters(text, bits, ends):
        if c == "\n" or x + len(c) > columns:
            x, y = 0, y + 1
        if c == "\n":
            continue
        left, top, width = 8 * x + 10, 20 * y + 10, 8 * len(c)
        shapes.append(f'<rect x="{left}" y="{top}" width="{width}" height="18" fill="rgb{shade(b)}"/>'
                      f'<text x="{left}" y="{top + 14}" xml:space="preserve">{html.escape(c)}</text>')
        if end:
            shapes.append(f'<rect x="{left + width - 1}" y="{top}" width="1" height="18" fill="#08c"/>')
        x += len(c)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{8 * columns + 20}" height="{20 * y + 40}" '
            'font-family="monospace" font-size="13"><rect width="100%" height="100%" fill="white"/>'
            + "".join(shapes) + "</svg>\n")


def read_argument(value):
    """The bytes of a --prompt or --score: the text itself, or FILE:path."""
    if not value.startswith("FILE:"):
        return value.encode("utf-8", "surrogateescape")
    with open(value[5:], "rb") as file:
        return file.read()


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out_dir", default="out/quick", help="a training run's folder, or a checkpoint file")
    parser.add_argument("--prompt", help="text to go on from, or FILE:path; asked for when missing")
    parser.add_argument("--max_new_bytes", type=int, default=300)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest byte")
    parser.add_argument("--top_k", type=int, help="choose among the k likeliest only")
    parser.add_argument("--top_p", type=float, help="choose among the likeliest that together have this probability")
    parser.add_argument("--seed", type=int, help="the same seed writes the same text")
    parser.add_argument("--score", help="text, or FILE:path, to score instead of writing")
    parser.add_argument("--html", help="paint the scored text into this file (.svg: as a picture) instead of the terminal")
    parser.add_argument("--block_size", type=int, help="bytes (for gpt, tokens) that the model remembers; as in training when missing")
    parser.add_argument("--compile", action="store_true", help="for long texts: slow to begin, faster from then on")
    parser.add_argument("--bf16", action="store_true", help="write in bf16: faster with --compile where train.py says bf16")
    parser.add_argument("--device", default="", help="cuda, mps or cpu")
    args = parser.parse_args()
    if args.temperature < 0 or (args.top_k or 1) < 1 or not 0 < (args.top_p or 1) <= 1:
        raise BadInput("expected --temperature of at least 0, --top_k of at least 1, --top_p above 0 and up to 1")
    if (args.compile or args.bf16) and args.score is not None or args.html and args.score is None:
        raise BadInput("expected --compile and --bf16 without --score (they are for writing), --html only with it")
    model = load(args.out_dir, args.device, args.block_size)

    if args.score is not None:
        text = read_argument(args.score)
        bits, ends = score(model, text)
        if args.html:
            with whole_file(args.html) as file:
                paint = paint_svg if args.html.endswith(".svg") else paint_html
                file.write(paint(text, bits, ends).encode())
        else:
            print(paint_terminal(text, bits, ends))
        where = f", painted in {args.html}" if args.html else ""
        print(f"{bits.mean():.4f} bits per byte over {len(bits):,} bytes{where}")
        return

    if args.bf16:
        model.bfloat16()
    if args.compile:
        why_not = why_no_compile(model.wte.weight.device.type)
        if why_not:
            raise BadInput(f"--compile does not work here ({why_not}): leave it out")
        model.compile_steps()

    def write_aloud(prompt, seed):
        print(printable(prompt.decode("utf-8", "replace")), end="", flush=True)
        for piece in stream(model, prompt, args.max_new_bytes, args.temperature, args.top_k, args.top_p, seed):
            print(printable(piece), end="", flush=True)
        print()

    if args.prompt is not None:
        prompt = read_argument(args.prompt)
        for i in range(args.num_samples):
            if i:
                print("-" * 80)
            write_aloud(prompt, args.seed if args.seed is None else args.seed + i)
        return
    while True:
        try:
            prompt = input("prompt> ")
        except EOFError:
            return
        if not prompt:
            return
        write_aloud(prompt.encode("utf-8", "surrogateescape"), args.seed)


if __name__ == "__main__":
    run(main)
