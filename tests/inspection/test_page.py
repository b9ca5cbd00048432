"""The HTML page: what it says, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import specops
from specops.inspection import as_html, compare, inspect_checkpoint
from tests.inspection.files import model, written

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    tensors = model()
    # Names and values that must not become markup or break a chart.
    tensors["<script>alert(1)</script>"] = np.ones((2, 2), np.float32)
    tensors["bad.weight"] = np.full((2, 2), np.nan, np.float32)
    tensors["decades.weight"] = np.diag(10.0 ** -np.arange(8.0))
    tensors["one.weight"] = np.ones((1, 5), np.float32)
    path = written(tmp_path / "a&b.safetensors", tensors, format="pt")
    target = tmp_path / "page.html"
    target.write_text(as_html(inspect_checkpoint(path)), encoding="utf-8")
    return target


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [f"{key}={value}" for key, value in attrs]


def test_one_file_with_everything_in_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Elements(text)
    assert found.tags.count("script") == 1
    assert "link" not in found.tags
    assert not [a for a in found.attributes if a.startswith("src=") or "http" in a]
    assert found.tags.count("tr") == 1 + 12
    assert found.tags.count("svg") == 11
    assert "a&amp;b.safetensors" in text
    assert "&lt;script&gt;" in text
    assert "holds NaN or infinity" in text
    assert "viewport" in text
    top = np.linalg.norm(model()["fc.weight"].astype(float), 2)
    assert f"{top:.5g}" in text
    # Zeros and decades.
    assert "σ, log" in text
    assert "nan" not in re.sub(r"bad\.weight|NaN", "", text)


def run_browser(page: Path, *arguments: str) -> str:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the path")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *arguments]
    done = subprocess.run(
        [*command, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_a_browser_sorts_by_a_click(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    click = """<script>
      const names = () => [...document.querySelectorAll("tbody tr")].map(r => r.cells[0].innerText);
      const buttons = document.querySelectorAll("th button");
      buttons[4].click(); const down = names(); buttons[4].click(); const up = names();
      buttons[0].click(); buttons[0].click(); const byName = names();
      const wide = document.documentElement.scrollWidth <= window.innerWidth;
      const result = document.createElement("pre"); result.id = "result";
      result.textContent = [down, up, byName].map(x => x.join("|")).join(";") + ";" + wide;
      document.body.append(result);
    </script></body>"""
    page.write_text(text.replace("</body>", click), encoding="utf-8")
    dom = run_browser(page, "--window-size=400,800", "--dump-dom")
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    assert found
    down, up, by_name, fits = (
        found[1].split(";")
        if "&" not in found[1]
        else (found[1].replace("&lt;", "<").replace("&gt;", ">").split(";"))
    )
    assert down.split("|")[0] == "conv2.weight"
    assert up.split("|")[0] == "zero.weight"
    # What has no figure stays at the end either way.
    assert down.split("|")[-1] == up.split("|")[-1] == "bad.weight"
    names = by_name.split("|")
    assert names == sorted(names, key=str.lower)
    assert fits == "true"


def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    shots = []
    for name, size in (("wide", "1400,1200"), ("phone", "500,900")):
        shot = tmp_path / f"{name}.png"
        run_browser(page, f"--window-size={size}", f"--screenshot={shot}")
        shots.append(shot)
    from matplotlib import image

    for shot, width in zip(shots, (1400, 500), strict=True):
        pixels = image.imread(shot)
        assert pixels.shape[1] == width
        # Letters, lines and a curve in its colour.
        assert pixels[..., :3].std() > 0.02
    blue = np.abs(image.imread(shots[0])[..., :3] - np.array([0.0, 0x72 / 255, 0xB2 / 255]))
    assert (blue.max(axis=-1) < 0.05).sum() > 100


def test_each_reading_of_an_ambiguous_weight_is_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "block1.weight": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "block2.weight": rng.standard_normal((4, 16, 3, 3)).astype(np.float32),
    }
    path = written(tmp_path / "m.safetensors", tensors, format="pt")
    found = specops.inspect(path, input_size={"*": (32, 32), "block2.weight": (16, 16)})
    first = found.measured[0]
    assert first.geometry.startswith("ambiguous")
    assert len(first.readings) == 2
    text = as_html(found)
    anchors = re.findall(r'<figure id="([^"]+)"', text)
    assert len(anchors) == len(set(anchors)) == 3
    assert f'href="#{anchors[0]}"' in text
    assert all(reading.geometry in text for reading in first.readings)
    (note,) = [note for note in found.notes if "ᶜ" in note]
    assert "block1.weight" in note
    assert "2 of 2 tensors measured" in repr(found)
    assert len(repr(found)) < 300


def test_a_difference_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, other = (
        specops.inspect(
            written(
                tmp_path / name,
                {"x.attn.qkv.weight": rng.standard_normal((48, 16)).astype(np.float32)},
                format="pt",
            )
        )
        for name in ("a.safetensors", "b.safetensors")
    )
    assert len(one.measured[0].readings) == 2
    text = as_html(one, compare(one, other))
    assert text.count("<figure") == 2
    assert text.split("<figure")[2].count('class="curve between"') == 0
