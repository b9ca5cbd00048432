"""The command: what it prints, what it returns, and what it does with bad files."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specops
from specops import cli
from specops.inspection import figures
from specops.inspection.output import folded
from tests.inspection.files import model, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "m.safetensors", model(), format="pt")


def call(*arguments: Any) -> int:
    return cli.main(["inspect", *map(str, arguments)])


def test_a_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(path) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["weight", "shape", "dtype"]
    row = next(line for line in lines if line.startswith("fc.weight"))
    top = np.linalg.norm(model()["fc.weight"].astype(float), 2)
    assert f"{top:.5g}" in row
    assert "conv1.bias" in out
    assert "1-d" in out
    assert "8 of 10 tensors measured" in " ".join(lines[-2:])
    assert "supremum over all sizes" in " ".join(out.split())


def test_json_has_one_object_for_each_tensor(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    weights = {w["name"]: w for w in found["weights"]}
    assert list(weights) == list(model())
    required = {
        "name",
        "shape",
        "dtype",
        "geometry",
        "sigma_max",
        "sigma_min",
        "frobenius",
        "stable_rank",
        "effective_rank",
        "condition_number",
        "skipped",
    }
    assert all(required <= set(w) for w in weights.values())
    w = model()["fc.weight"].astype(float)
    assert weights["fc.weight"]["sigma_max"] == pytest.approx(np.linalg.norm(w, 2), rel=1e-6)
    assert weights["fc.weight"]["shape"] == [5, 12]
    assert weights["fc.weight"]["skipped"] == ""
    low, high = weights["conv1.weight"]["sigma_max"]
    assert low < high
    assert weights["zero.weight"]["condition_number"] == "inf"
    assert weights["conv1.bias"]["sigma_max"] is None
    assert weights["conv1.bias"]["skipped"]
    assert found["totals"]["measured"] == 8
    assert found["specops"] == specops.__version__


def test_csv(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(path, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == list(model())
    by_name = {row["name"]: row for row in rows}
    assert by_name["fc.weight"]["sigma_max_lower"] == by_name["fc.weight"]["sigma_max_upper"] != ""
    assert by_name["conv1.weight"]["shape"] == "6x3x3x3"
    assert by_name["conv1.bias"]["sigma_max_lower"] == ""


def test_options_reach_the_figures(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = call(
        path, "--json", "--input-size", "8x8", "--input-size", "conv2*=4x4", "--stride", "conv2*=2",
        "--boundary", "circular", "--groups", "dw*=6",
    )  # fmt: skip
    assert status == 0
    weights = {w["name"]: w for w in json.loads(capsys.readouterr().out)["weights"]}
    assert weights["conv2.weight"]["geometry"] == "conv 4×4, circular, stride 2"
    geometry = specops.Conv((4, 4), stride=2, boundary="circular")
    top = specops.spectral_norm(model()["conv2.weight"].astype(float), geometry)
    assert weights["conv2.weight"]["sigma_max"] == pytest.approx(float(top), rel=1e-9)
    assert call(path, "--json", "--method", "bounds") == 0
    weights = {w["name"]: w for w in json.loads(capsys.readouterr().out)["weights"]}
    assert isinstance(weights["fc.weight"]["sigma_max"], list)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input-size", "huge"], "'huge' is no size such as 32x32"),
        (["--input-size", "0x4"], "'0x4' is no size"),
        (["--stride", "-1"], "'-1' is no count"),
        (["--dilation", "0"], "'0' is no count"),
        (["--padding", "-1"], "'-1' is no number of zeros"),
        (["--padding", "fc*=full"], "'full' is no number of zeros, 'same' or 'valid'"),
        (["--padding", "nine*=1"], "no tensor matches 'nine*'"),
        (["--stride", "nine*=2"], "no tensor matches 'nine*'"),
        (["--html", "/nowhere/at/all.html"], "there is no such folder"),
        (["--html", "/"], "that is a folder"),
        (["--plot", "spectra.xyz"], "must end in .png"),
        (["--csv", "--compare", "other"], "--csv holds one checkpoint"),
    ],
)
def test_wrong_arguments(
    path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path, *arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.splitlines()) == 1
    assert not out


def test_files_beside_the_table(path: Path, tmp_path: Path) -> None:
    assert call(path, "--html", tmp_path / "a.html", "--plot", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "fc.<wbr>weight" in (tmp_path / "a.html").read_text(encoding="utf-8")
    other = written(tmp_path / "o.safetensors", model(1), format="pt")
    assert call(path, "--compare", other, "--plot", tmp_path / "b.png") == 0
    assert (tmp_path / "b.png").stat().st_size > 0


def test_two_checkpoints_of_one_model(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubled = {f"module.{k}": 2 * v if k != "fc.weight" else v[:, :3] for k, v in model().items()}
    other = written(tmp_path / "o.safetensors", doubled, format="pt")
    assert call(path, "--compare", other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    pairs = {pair["name"]: pair for pair in found["comparison"]}
    assert pairs["flat.weight"]["ratio"] == pytest.approx(2.0, rel=1e-5)
    assert pairs["conv1.weight"]["ratio"] == pytest.approx(2.0, rel=1e-3)
    assert pairs["zero.weight"]["ratio"] is None
    assert found["only_in_first"] == ["fc.weight"]
    assert found["only_in_second"] == ["module.fc.weight"]
    assert call(path, "--compare", other) == 0
    out = capsys.readouterr().out
    assert "measured only in the first" in out
    assert "other σ_max" in out


def broken(folder: Path, kind: str) -> Path:
    """A file of which some or all cannot be measured."""
    tensors = model()
    target = folder / "m.safetensors"
    if kind == "nan":
        tensors["fc.weight"][1, 2] = np.nan
    if kind == "quantised":
        tensors["fc.weight"] = np.ones((5, 12), np.int8)
    written(target, tensors, format="pt")
    if kind == "truncated":
        target.write_bytes(target.read_bytes()[:-100])
    if kind == "header":
        target.write_bytes(b"\xff" * 8 + target.read_bytes()[8:])
    if kind == "empty":
        target.write_bytes(b"")
    if kind == "folder":
        target = folder / "nothing"
        target.mkdir()
    if kind == "missing":
        target = folder / "missing.safetensors"
    if kind == "pickle":
        target = folder / "m.pt"

        class Evil:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {folder / 'ran'}",)

        target.write_bytes(pickle.dumps({"w": Evil()}))
    return target


@pytest.mark.parametrize(
    ("kind", "said", "measured"),
    [
        ("nan", "'fc.weight': holds NaN or infinity in 1 of 60 entries", 7),
        ("quantised", "'fc.weight': int8: quantised or packed", 7),
        ("truncated", "experts.weight", 7),
        ("header", "header", None),
        ("empty", "empty", None),
        ("folder", "nothing", None),
        ("missing", "missing.safetensors", None),
        ("pickle", "m.pt", None),
    ],
)
def test_bad_files_get_a_line_and_the_rest_is_measured(
    kind: str, said: str, measured: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = broken(tmp_path, kind)
    assert call(target, "--json") == 1
    out, err = capsys.readouterr()
    assert said in err
    assert all(line.startswith("specops inspect: ") for line in err.splitlines())
    assert "Traceback" not in err
    assert not (tmp_path / "ran").exists()
    if measured is None:
        assert not out
        assert len(err.splitlines()) == 1
    else:
        found = json.loads(out)
        assert found["totals"]["measured"] == measured
        assert found["problems"]


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_done(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(900, 900)).astype(np.float32)
    target = written(tmp_path / "m.safetensors", {f"w{i}": w + i for i in range(60)})
    # After a second of processor time, however busy the machine is.
    code = (
        "import os, signal, sys; from specops.cli import main; "
        # Which a shell has its background processes ignore.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT)); "
        "signal.setitimer(signal.ITIMER_PROF, 1.0); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(target), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 130
    assert found["interrupted"]
    assert 0 < len(found["weights"]) < 60
    assert "interrupted" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tensors_are_not_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2304, 2304)).astype(np.float32)
    target = written(tmp_path / "m.safetensors", {f"w{i}": w + i for i in range(8)})
    code = (
        "import re, sys; from specops.cli import main; main(sys.argv[1:]); "
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
        "print(int(peak) / 1024, file=sys.stderr)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(target), "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert len(json.loads(done.stdout)["weights"]) == 8
    largest = w.nbytes / 2**20
    assert float(done.stderr) < 6 * largest + 150


def test_outputs_never_replace_a_checkpoint(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert call(path, "--html", path) == 2
    assert "would replace the checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_bad_second_file_is_told_before_the_work(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path, "--compare", tmp_path / "none.pt") == 1
    out, err = capsys.readouterr()
    assert not out
    assert "none.pt" in err


def test_comparisons_are_in_the_page(path: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "o.safetensors", model(1), format="pt")
    assert call(path, "--compare", other, "--html", tmp_path / "a.html", "--json") == 0
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Compared with another" in text
    assert text.count("<table>") == 2
    heading = text[text.index("Compared with another") :]
    assert heading.index("m.safetensors") < heading.index("o.safetensors")
    figure = text[text.index('<figure id="weight-fc') :].partition("</figure>")[0]
    assert [figure.count(f'"curve{kind}"') for kind in ("", " other", " between")] == [1, 1, 1]


def test_a_comparison_has_the_spectrum_of_the_difference(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = written(tmp_path / "o.safetensors", model(1), format="pt")
    assert call(path, "--compare", other, "--json") == 0
    pairs = {p["name"]: p for p in json.loads(capsys.readouterr().out)["comparison"]}
    change = model(1)["fc.weight"].astype(float) - model()["fc.weight"].astype(float)
    values = np.linalg.svd(change, compute_uv=False)
    found = pairs["fc.weight"]["difference"]
    assert found["sigma_max"] == pytest.approx(values[0], rel=1e-6)
    assert found["stable_rank"] == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-6)
    assert call(path, "--compare", other) == 0
    out = capsys.readouterr().out
    assert f"{path} compared with {other} (other):" in out
    assert "difference σ_max" in out


def test_a_comparison_without_a_common_name_says_so(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"else.weight": np.ones((3, 4), np.float32)}
    call(path, "--compare", written(tmp_path / "o.safetensors", tensors, format="pt"))
    out = capsys.readouterr().out
    assert "no weight of one name in both" in out
    assert "ratio" not in out


def test_a_comparison_says_where_it_compares_other_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.query_key_value.weight": rng.normal(size=(12, 4)).astype(np.float32),
        "w": rng.normal(size=(6, 5, 3)).astype(np.float32),
    }
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        written(folder / "model.safetensors", tensors, format="pt")
    config = {"model_type": "gpt_neox", "num_attention_heads": 2}
    (one / "config.json").write_text(json.dumps(config), encoding="utf-8")
    call(one, "--compare", other)
    out = " ".join(capsys.readouterr().out.split())
    name = "a.query_key_value.weight"
    assert f"another map in the second, of which its figures are: {name}" in out
    assert "taken for the likeliest map: w" in out
    assert "could not be measured" not in out


def test_zero_padded_layers_have_the_spectra_of_circular_ones(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(figures._EXPLICIT_UP_TO, "auto", 10)
    page, plot = tmp_path / "a.html", tmp_path / "a.png"
    assert call(path, "--exclude", "fc*", "--exclude", "conv2.bias*") == 2
    assert "no tensor matches 'conv2.bias*'" in capsys.readouterr().err
    left_out = ("fc", "flat", "zero", "half", "experts")
    kernels = [text for name in left_out for text in ("--exclude", f"{name}.*")]
    status = call(path, "--input-size", "6x6", *kernels, "--html", page, "--plot", plot)
    assert status == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("conv2.weight"))
    assert "conv 6×6, zeros, stride 1" in row
    assert row.count("ᶜ") == 4
    assert "figures marked ᶜ are of the same layer with circular padding" in " ".join(out.split())
    assert "excluded, as asked: *.weight (5)" in " ".join(out.split())
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert text.count("drawn: those of the layer with circular padding") == 3
    assert plot.stat().st_size > 0
    assert "which --method exact does" in " ".join(out.split())
    assert call(path, "--input-size", "6x6", *kernels, "--method", "exact", "--json") == 0
    weights = {w["name"]: w for w in json.loads(capsys.readouterr().out)["weights"]}
    assert weights["conv2.weight"]["method"] == "all singular values of the operator"


def test_names_are_folded_to_patterns() -> None:
    names = [f"layer{i}.{j}.bn.{k}" for i in (1, 2) for j in (0, 1) for k in ("weight", "bias")]
    assert folded([*names, "fc.bias"]) == "layer*.*.bn.weight (4), layer*.*.bn.bias (4), fc.bias"
    many = [f"{a}.{b}.{c}" for a in "abcde" for b in "xy" for c in ("weight", "bias")]
    assert folded(many) == "*.weight (10), *.bias (10)"
    assert folded([f"{a}.{a}" for a in "abcdef"]) == "a.a, b.b, c.c, d.d and 2 more kinds: -v"


def test_a_reader_that_has_seen_enough(path: Path) -> None:
    code = "import sys; from specops.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert not err


def test_terminals_that_know_no_greek(path: Path) -> None:
    code = "import sys; from specops.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(path)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert b"fc.weight" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_narrow_terminals_get_whole_names_and_norms(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    for columns, complete in ((200, True), (72, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert call(path) == 0
        text = terminal.getvalue()
        table = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if "│" in line]
        assert max(map(len, table)) <= columns
        assert "experts.weight" in text
        top = np.linalg.norm(model()["fc.weight"].astype(float), 2)
        assert f"{top:.5g}" in text
        assert ("no room for" not in text) is complete


def test_names_cannot_command_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "evil\x1b[2J\nname\u202e"
    target = written(tmp_path / "m.safetensors", {name: np.full((2, 2), np.nan, np.float32)})
    assert call(target) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
    assert len(err.splitlines()) == 1


def test_notes_say_what_was_bounded(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(path, "--method", "bounds", "--json") == 0
    (note,) = [n for n in json.loads(capsys.readouterr().out)["notes"] if "bounds of" in n]
    assert "asked for" in note
    assert "fc.weight" in note


def test_how_maps_were_decided_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(path) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4-d, torch's order: taps last, stride 1 assumed: conv*.weight (2)" in text
    assert call(path, "-v") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4-d, torch's order: taps last, stride 1 assumed: conv1.weight, conv2.weight" in text
    assert "depthwise, stride 1 assumed: dw.weight" in text


@pytest.mark.parametrize("unknown", ["other.safetensors", "--inputsize"])
def test_arguments_of_no_meaning_show_those_of_the_command(
    path: Path, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(path, unknown)
    err = capsys.readouterr().err
    assert err.startswith("usage: specops inspect ")
    assert "--compare OTHER" in err
    assert err.endswith(f"specops inspect: error: unrecognized arguments: {unknown}\n")
