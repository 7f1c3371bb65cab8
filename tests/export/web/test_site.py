"""The exported page in a real browser, against Python."""

from __future__ import annotations

import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coalescer_fast as cf
from coalescer_fast import PhiloxGenerator
from coalescer_fast.export import cli
from coalescer_fast.export.web import runtime, site
from coalescer_fast.parity import receipt

from ...helpers.pipelines import small_pipeline

PROMPTS = (
    "octopus",
    "",
    "🐙",
    "🐙 in a 🎩",
    "👩🏽‍🚀",
    "crème brûlée",
    "Café au lait, 3d style",
    "a red apple",
    "sad robot",
    "man riding a bicycle",
    "the houses at night...",
    "zzqx frobnicate",
    "snow-covered mountain",
    "ice cream, flat style",
    "İstanbul",
    "한국어",
    "🇩🇪 flag",
    "piñata ünïcödé",
    "rainbow unicorn",
    "two dogs & a cat; blob style",
)
WEB_PAGE = Path(__file__).parents[3] / "docs" / "web.md"
IN_BROWSER = 20.0  # seconds until a small model is there, on a busy machine

pytestmark = pytest.mark.skipif(
    not all((runtime.cache() / name).is_file() for name in runtime.SHA256),
    reason=f"{runtime.cache()} has no onnxruntime-web: run coalescer-export web once",
)


def export(*words: object) -> None:
    assert cli.main(["--quiet", "web", *map(str, words)]) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model with weights that float16 holds, as the embedded model has."""
    pipe = small_pipeline(anchor="mlp", anchor_hidden_dim=16)
    last = [module for module in pipe.vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    torch.nn.init.normal_(last.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(last.bias, 0.5)  # so that colours are within their range
    for network in (pipe.unet, pipe.vae):
        network.half().float().requires_grad_(False)
    folder = tmp_path_factory.mktemp("small")
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="module")
def small_site(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "site"
    export("--model", small[1], "-o", folder)
    return folder


@pytest.fixture(scope="module")
def small_file(small_site):
    """The same as one file, packed from the same files."""
    found = {path.name: path.read_bytes() for path in small_site.iterdir()}
    path = small_site.parent / "page.html"
    path.write_bytes(site.one_file(found))
    return path


def start(page, url: str, seconds: float = IN_BROWSER) -> None:
    page.requests.clear()
    page.problems.clear()
    page.open(url)
    page.wait("!document.getElementById('save').disabled || !document.getElementById('error').hidden", seconds)
    assert page.evaluate("document.getElementById('error').textContent") == ""
    settled(page)


@pytest.fixture
def opened(page, small_file):
    """The page with the small model, opened once for the tests that follow each other."""
    if page.evaluate("location.href") != small_file.as_uri():
        start(page, small_file.as_uri())
    return page


def settled(page) -> None:
    """Wait until nothing is left to be drawn."""
    page.wait("!isDrawing && !isStale", 60)
    page.evaluate("drawer.draw({prompt: '', seed: '0', first: 0, n: 1, steps: false}, () => 0)")  # after all others


def type_prompt(page, text: str, seed: int = 0) -> np.ndarray:
    """Type a prompt as a user does, and return what the canvas then holds, (H, W, 3)."""
    page.fill("seed", str(seed))
    page.fill("prompt", text)
    page.wait(f"main.prompt === {json.dumps(text)} && main.seed === '{seed}' && !isDrawing && !isStale", 60)
    return canvas(page, "picture")


def canvas(page, name: str) -> np.ndarray:
    (found,) = page.canvases(f"#{name}")
    return found


def expected(pipe, text: str, seed: int, picture: int = 0):
    out = pipe(text, generator=PhiloxGenerator(seed, picture=picture), output_type="pil")
    return np.asarray(out.images[0]), out


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_one_file_from_disk_draws_what_python_draws(page, small, small_file):
    pipe, _ = small
    start(page, small_file.as_uri())
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.type("cat")  # in the place of the example
    page.wait("main.prompt === 'cat'")
    assert expected(pipe, "cat", 0)[0].std() > 10
    for i, text in enumerate(PROMPTS):
        seed = (0, 7, 2**40, 2**64 - 1)[i % 4]
        drawn = type_prompt(page, text, seed)
        wanted, out = expected(pipe, text, seed)
        assert difference(drawn, wanted) <= 1, text
        assert page.evaluate("main.quality") == pytest.approx(out.quality[0], abs=1e-4), text
        matched = page.evaluate("main.matched")
        assert (matched and matched["name"]) == (out.matched[0] and out.matched[0].name), text
        assert bool(page.evaluate("main.warnings.length")) == bool(out.warnings), text
    asked = [url for url in page.requests if not url.startswith("blob:")]
    assert asked == [small_file.as_uri()]
    assert not page.problems


def test_variations_steps_and_styles(opened, small):
    page, (pipe, _) = opened, small
    type_prompt(page, "a cat", 3)
    page.evaluate("new Promise((resume) => setTimeout(resume, 400))")
    settled(page)
    for k, drawn in enumerate(page.canvases("#cells canvas")):
        assert difference(drawn, expected(pipe, "a cat", 3, k)[0]) <= 1, k
    assert k == 7
    trace = pipe("a cat", generator=PhiloxGenerator(3), return_trace=True).trace
    steps = page.canvases("#steps canvas")
    for k in range(2):
        decoded = pipe.image_processor.postprocess(pipe.decode(trace[k].sample), output_type="pil")[0]
        assert difference(steps[k], np.asarray(decoded)) <= 1, k
    assert difference(steps[2], expected(pipe, "a cat", 3)[0]) <= 1
    page.evaluate("document.querySelector('input[value=styles]').click()")
    page.evaluate("new Promise((resume) => setTimeout(resume, 400))")
    settled(page)
    for word, drawn in zip(pipe.description_encoder.config.styles, page.canvases("#cells canvas"), strict=True):
        assert difference(drawn, expected(pipe, f"a cat, {word} style", 3)[0]) <= 1, word
    page.evaluate("document.querySelector('input[value=seeds]').click()")


def test_a_saved_png_says_what_it_is(opened, small):
    page, (pipe, folder) = opened, small
    drawn = type_prompt(page, "🐙, flat style", 2**40)
    data = page.evaluate("(async () => [...new Uint8Array(await (await asPNG(main)).arrayBuffer())])()")
    with Image.open(io.BytesIO(bytes(data))) as picture:
        assert np.array_equal(np.asarray(picture), drawn)
        text = dict(picture.text)
    said = json.loads(text.pop("receipt"))
    assert text == {"prompt": "🐙, flat style", "drawn": "🐙, flat style", "seed": str(2**40), "picture": "0"}
    latents = pipe.initial_noise(1, PhiloxGenerator(2**40))
    full = receipt(pipe, ["🐙, flat style"], latents, [Image.fromarray(drawn)])
    for name in ("weights", "prompts", "schedule", "pixels"):
        assert said[name] == full[name], name
    assert said["model"] == folder.name
    assert said["runtime"] == f"onnxruntime-web {runtime.VERSION}"


def test_what_is_no_character_is_drawn_and_saved_as_one(opened):
    page = opened
    page.evaluate(r"document.getElementById('prompt').value = 'cat \ud83d dog'; change()")
    page.wait("main.prompt === 'cat \ufffd dog'")
    said = page.evaluate("(async () => new TextDecoder().decode(await (await asPNG(main)).arrayBuffer()))()")
    assert '"prompts":["cat \ufffd dog"]' in said


def test_a_file_name_is_cut_between_characters(opened):
    page = opened
    page.evaluate("HTMLAnchorElement.prototype.click = function () { globalThis.named = this.download; }")
    type_prompt(page, "a" + "𝐀" * 70)
    page.evaluate("save()")
    assert page.evaluate("named") == "a" + "𝐀" * 59 + "-0-0.png"


def test_it_is_used_by_keyboard(opened):
    page = opened
    type_prompt(page, "cat", 3)
    page.press("Enter", 13)  # another seed
    page.wait("main.seed !== '3' && main.seed === document.getElementById('seed').value")
    found = []
    for _ in range(5):
        page.press("Tab", 9)
        found.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert found == ["save", "seed", "new", "seeds", "on"]
    page.press("ArrowRight", 39)
    page.wait("cells[1].input.checked && main.picture === 1 && !isDrawing")
    page.press("ArrowLeft", 37)
    page.wait("cells[0].input.checked && main.picture === 0 && !isDrawing")


def test_a_screen_reader_finds_names_and_hears_what_was_drawn(opened):
    page = opened
    type_prompt(page, "octopus")
    page.wait("document.getElementById('announcement').textContent.startsWith('Drawn: octopus')")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")}
    roles = {name for role, name in found if role == "radio"}
    assert {"variations", "styles", "nothing", "variation 1", "variation 8"} <= roles
    assert {("textbox", "What to draw"), ("textbox", "Seed"), ("button", "New seed"), ("button", "Save PNG")} <= found
    assert ("group", "Variations") in found
    assert any(role in ("image", "img") and name.startswith("Picture of octopus") for role, name in found)
    assert not {role for role, name in found if not name} & {"textbox", "button", "radio", "image", "img", "meter"}


def test_a_wrong_seed_is_told(opened):
    page = opened
    said = "[document.getElementById('seed-error').hidden, document.getElementById('seed').ariaInvalid]"
    for wrong in ("-1", "1.5", "18446744073709551616", "x", ""):
        page.evaluate(f"document.getElementById('seed').value = '{wrong}'; change()")
        assert page.evaluate(said) == [False, "true"], wrong
    # a seed that becomes wrong while a picture is in work
    page.evaluate(
        "document.getElementById('seed').value = '123'; change(); document.getElementById('seed').value = ''; change()"
    )
    page.evaluate("new Promise((resume) => setTimeout(resume, 600))")
    assert page.evaluate("main.seed") == "123"
    assert page.evaluate("document.getElementById('error').hidden")
    page.evaluate("document.getElementById('seed').value = '5'; change()")
    page.wait("main.seed === '5'")
    assert page.evaluate("document.getElementById('seed-error').hidden")


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    page = opened
    page.resize(width, 800)
    type_prompt(page, "x" * 300)
    page.evaluate("document.querySelector('input[value=styles]').click()")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelector('input[value=seeds]').click()")


@contextmanager
def serving(folder, **headers: str) -> Iterator[str]:
    """A server of a folder that sends these headers: its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def end_headers(self):
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            super().end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def server(small_site):
    with serving(small_site) as address:
        yield address


def test_a_policy_that_the_page_lists_is_enough(page, small, small_site):
    (policy,) = re.findall(r"^Content-Security-Policy: (.*)$", WEB_PAGE.read_text("utf-8"), re.MULTILINE)
    with serving(small_site, Content_Security_Policy=policy) as address:
        start(page, address)
        assert difference(type_prompt(page, "top hat", 1), expected(small[0], "top hat", 1)[0]) <= 1
    assert not page.problems


def test_a_policy_that_refuses_the_worker_is_told(page, small_site):
    with serving(small_site, Content_Security_Policy="default-src 'self'") as address:
        page.open(address)
        page.wait("!document.getElementById('error').hidden", IN_BROWSER)
        assert "Content-Security-Policy" in page.evaluate("document.getElementById('error').textContent")


@pytest.mark.parametrize("name", ["Worker", "DecompressionStream"])
def test_a_browser_without_what_it_takes_is_told(page, small_file, tmp_path, name):
    text = small_file.read_text("utf-8")
    (tmp_path / "page.html").write_text(
        text.replace("<head>", f"<head><script>delete globalThis.{name}</script>", 1), "utf-8"
    )
    page.open((tmp_path / "page.html").as_uri())
    page.wait("!document.getElementById('error').hidden", IN_BROWSER)
    said = page.evaluate("document.getElementById('error').textContent")
    assert said == f"This browser cannot run the model (it has no {name}): use a current Chromium, Firefox or Safari."


def test_a_folder_on_a_server_asks_for_its_own_files_alone(page, small, small_site, server):
    pipe, _ = small
    start(page, server)
    assert difference(type_prompt(page, "top hat", 1), expected(pipe, "top hat", 1)[0]) <= 1
    asked = {url for url in page.requests if not url.startswith(("blob:", "data:"))}
    assert {path.name for path in small_site.iterdir()} == set(site.NAMES)
    assert "Twemoji" in (small_site / site.NOTICE).read_text("utf-8")
    assert asked == {server} | {server + name for name in site.NAMES if name not in ("index.html", site.NOTICE)}
    assert not page.problems


def test_a_folder_opened_from_disk_says_what_to_do(page, small_site):
    page.open((small_site / "index.html").as_uri())
    page.wait("!document.getElementById('error').hidden")
    said = page.evaluate("document.getElementById('error').textContent")
    assert "python -m http.server" in said
    assert "--single-file" in said


def test_a_damaged_model_is_told(page, small_site, tmp_path):
    found = {path.name: path.read_bytes() for path in small_site.iterdir()}
    (tmp_path / "page.html").write_bytes(site.one_file({**found, "unet.onnx": b"no model"}))
    page.open((tmp_path / "page.html").as_uri())
    page.wait("!document.getElementById('error').hidden", IN_BROWSER)
    assert "cannot run the model" in page.evaluate("document.getElementById('error').textContent")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["half", "int8"])
def test_the_embedded_model_from_disk(page, tmp_path, precision):
    pipe = cf.CoalescerPipeline.from_pretrained("emoji-64")
    export("-o", tmp_path / "web", "--single-file", "--precision", precision)
    file = tmp_path / "web" / "index.html"
    assert [path.name for path in file.parent.iterdir()] == ["index.html"]
    assert file.stat().st_size <= 40_000_000
    start(page, file.as_uri(), 120)
    for seed, text in enumerate(PROMPTS):
        drawn, (wanted, out) = type_prompt(page, text, seed), expected(pipe, text, seed)
        assert page.evaluate("main.quality") == pytest.approx(out.quality[0], abs=0.1 if precision == "int8" else 1e-4)
        if precision == "half":
            assert difference(drawn, wanted) <= 1, text
        else:
            assert psnr(drawn, wanted) >= 38, text
    # a key that comes in the middle of a picture waits for at most one more
    page.evaluate("document.querySelector('input[value=one]').click()")
    settled(page)
    one, last, alone = page.evaluate(
        """(async () => {
          const time = async (work) => {
            const from = performance.now();
            await work();
            return performance.now() - from;
          };
          const drawn = () => drawer.draw({prompt: 'cat', seed: '1', first: 0, n: 1, steps: false}, () => 0);
          const times = [];
          for (let i = 0; i < 10; i++) times.push(await time(drawn));
          for (const text of ['h', 'ho', 'hor', 'hors']) {
            document.getElementById('prompt').value = text;
            change();
            await new Promise((resume) => setTimeout(resume, 30));
          }
          const typed = async (text) => {
            document.getElementById('prompt').value = text;
            change();
            while (main.prompt !== text) await new Promise((resume) => setTimeout(resume, 1));
          };
          const last = await time(() => typed('horse'));
          const alone = [];
          for (const text of ['owl', 'pizza', 'robot', 'moon', 'ghost']) alone.push(await time(() => typed(text)));
          return [times.sort((a, b) => a - b)[5], last, Math.min(...alone)];
        })()"""
    )
    assert last <= 3 * one, (one, last)
    assert alone <= 150, alone  # ms; the best of five, for other programs may use the machine
