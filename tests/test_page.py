"""The page of sample.py --page, tried in a real browser: Chromium, spoken to through a pipe."""
import base64
import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

import sample
from conftest import random_model
from model import GPT, STLM
from prepare import BadInput, encode

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt install chromium")
MIXED = """def add(a, b):  # adds two numbers; and again, def add(a, b)
    return a + b\t\x07\x1b[31m \x00
Émile a dit : « çà et là » – “so it goes” … naïve ﬁn
日本語のテキスト、カタカナー。中文小说里的一句话。ภาษาไทย ខ្មែរ Привет, мир! مرحبا \u202eabc
🙂👩‍👩‍👧 A𝒜 e\u0301 \u3000\u00a0\u200b """ + "x" * 40 + "é" * 20 + " " * 40 + "_"


class Browser:
    """A page in headless Chromium. Its DevTools protocol: JSON, each message ended by a NUL."""

    def __init__(self, path, home):
        to_read, self.to = os.pipe()
        self.came, to_write = os.pipe()
        command = (f"exec {CHROMIUM} --headless --no-sandbox --remote-debugging-pipe "
                   f"--user-data-dir={home} 3<&{to_read} 4>&{to_write}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_read, to_write),
                                        stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.session, self.n, self.rest, self.errors = {}, 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.call("Runtime.enable")
        self.call("Page.navigate", url=f"file://{path}")
        self.wait_for("typeof update === 'function' && document.readyState === 'complete'")

    def call(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.came, 1 << 20) or pytest.fail("the browser has gone")
            answer, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"])
            if answer.get("id") == self.n:
                return answer["result"]

    def run(self, code):
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition):
        for _ in range(600):
            if self.run(condition):
                return
            time.sleep(0.1)
        pytest.fail(f"after a minute still not: {condition}")

    def type(self, text):
        self.run("$('text').focus(), $('text').select(), $('summary').textContent = ''")
        self.call("Input.insertText", text=text)
        self.wait_for("$('summary').textContent")

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model with rounded weights, and its page in a browser."""
    folder = tmp_path_factory.mktemp("page")
    model = random_model(block_size=2048, max_patches=1024, attend_twice=True, window=8)
    model.text = {"patcher": "words", "vocab": None}
    sample.save_page(model, folder / "model.html")
    for p in model.parameters():
        integers, scale = sample.round_rows(p.data)
        assert ((integers * scale - p.data).abs() <= scale / 2 + 1e-6).all()
        p.data = integers * scale
    browser = Browser(folder / "model.html", folder / "home")
    yield model, browser
    errors = browser.errors
    browser.close()
    assert not errors


@needs_browser
def test_the_page_computes_what_the_model_computes(opened):
    model, browser = opened
    text = (MIXED * 5).encode()[:2000].decode("utf-8", "ignore")
    assert browser.run(f"encode({json.dumps(text)})") == encode(text.encode()).tolist()

    logits = browser.run(f"""(() => {{
        const cache = new Cache(), ids = [SEPARATOR].concat(encode({json.dumps(text)}));
        const bytes = ids.map(x => new Uint8Array(step(x, cache).logits.buffer));
        return btoa(bytes.map(part => String.fromCharCode(...part)).join(""));
    }})()""")
    logits = np.frombuffer(base64.b64decode(logits), np.float32).reshape(-1, 512)
    with torch.no_grad():
        expected = model(sample.document(model, text)[None])[0].numpy()
    # of nearly equal logits the two may count the n-gram's row for different ones
    wrong = (abs(logits - expected) > 1e-3).sum()
    assert wrong <= 4 and logits.shape == expected.shape and logits.std() > 0.1


@needs_browser
def test_the_page_writes_what_the_model_writes(opened):
    model, browser = opened
    ids = sample.document(model, "def add(a")
    written = model.generate(ids[None], 40, temperature=0)[0].tolist()
    stream = f"""(() => {{
        const stream = streamIds({ids.tolist()}, 0, Math.random), written = [];
        while (written.length < 40) written.push(...[stream.next().value].filter(id => id >= 0));
        return written;
    }})()"""
    assert browser.run(stream) == written
    browser.run("config.block_size = 15")  # goes on from the last half
    model.set_block_size(15)
    assert browser.run(stream) == model.generate(ids[None], 40, temperature=0)[0].tolist()
    browser.run("config.block_size = 2048")
    model.set_block_size(2048)


@needs_browser
def test_typing_editing_choosing_and_going_on(opened):
    model, browser = opened
    texts = [MIXED.replace("\x00", ""), MIXED[:150].replace("\x00", ""), "abc <b>def</b>",
             "</script><script>document.title = 'hostile'</script> \u202e مرحبا \x01"]
    for text in texts:
        browser.type(text)
        assert browser.run("$('text').value") == text
        expected = sample.score(model, text)[0]
        n_patches = sum(symbol >= 256 for symbol in encode(text.encode()))
        summary = browser.run("$('summary').textContent")
        assert abs(float(summary.split()[0]) - expected.mean()) < 2e-4
        assert f"{len(text.encode())} bytes, {n_patches} complete patches" in summary
        bits = browser.run("readers[0].scores.map(score => score.bits)")
        np.testing.assert_allclose(bits, expected, atol=1e-3)
        assert browser.run("spans.map(span => span.character).join('')") == text
    assert browser.run("document.title") != "hostile"
    assert r"\u202e" in browser.run("$('painted').textContent")

    browser.type("so it goes, so it goes")
    for _ in range(2):  # to before the e of the second "goes"
        browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowLeft",
                     windowsVirtualKeyCode=37)
    browser.wait_for("chosen === 20")
    details = browser.run("$('details').textContent")
    assert details.startswith("“e”, byte 20") and "“e” of byte 8" in details
    for off in "n-grams", "matches", "transformer":
        assert f"without {off}" in details and "…" not in details
    assert details.count("%") == 5 and browser.run("$('arrows').children.length") == 1

    browser.run("$('temperature').value = 0, $('length').value = 30, $('write').click()")
    browser.wait_for("!writing && $('status').textContent")
    assert browser.run("$('text').value").startswith("so it goes, so it goes")
    assert int(browser.run("$('status').textContent").split()[0]) <= 30


@pytest.mark.parametrize("kind, patcher", [(GPT, "words"), (STLM, "fixed:4")])
def test_only_a_model_that_the_page_can_compute_is_written(kind, patcher, tmp_path):
    model = random_model(kind=kind)
    model.text = {"patcher": patcher, "vocab": None}
    with pytest.raises(BadInput, match="--page: expected an STLM"):
        sample.save_page(model, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
