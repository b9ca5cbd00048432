"""Figures hold what their definitions say, name it, and leave nothing open."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from specops import plots
from specops.errors import NonFiniteError
from specops.spectra import NormBounds
from specops.training.history import History


def spectra(count: int, length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {f"block{i}.conv": rng.uniform(0.5, 2.0, length) for i in range(count)}


def records(count: int, figure: str = "norm_after") -> list[dict[str, Any]]:
    return [
        {"step": s, "name": f"block{i}.conv", figure: 1.0 + i / s}
        for s in (1, 5, 9)
        for i in range(count)
    ]


DRAW = {
    "singular_values": lambda n, ax: plots.singular_values(spectra(n), ax=ax),
    "normalized": lambda n, ax: plots.singular_values(spectra(n), scale="normalized", ax=ax),
    "relative": lambda n, ax: plots.singular_values(spectra(n), scale="relative", ax=ax),
    "spectra_over_training": lambda n, ax: plots.spectra_over_training(records(n), ax=ax),
    "histogram": lambda n, ax: plots.histogram(spectra(n, 40), kind="lipschitz", ax=ax),
}
ALL = DRAW | {
    "spectrum_over_training": lambda n, ax: plots.spectrum_over_training(
        dict(enumerate(spectra(n).values())), ax=ax
    ),
    "norms": lambda n, ax: plots.norms({f"conv{i}": 1.0 + i for i in range(n)}, ax=ax),
    "compare": lambda n, ax: plots.norms({"a": 1}, compare={"b": (0.5, 2)}, ax=ax),
}


def legend_of(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def colourbar_of(ax: Axes) -> str:
    others = [other for other in ax.figure.axes if other is not ax]
    return others[0].get_ylabel() if others else ""


def rendered(ax: Axes) -> Any:
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return canvas.get_renderer()


@pytest.mark.parametrize("count", [1, 8, 100])
@pytest.mark.parametrize("name", ALL)
def test_every_plot_has_words_and_pyplot_knows_nothing(name: str, count: int) -> None:
    before = pyplot.get_fignums()
    ax = ALL[name](count, None)
    assert isinstance(ax, Axes)
    assert ax.get_title(loc="left")
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    rendered(ax)
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("name", ALL)
def test_given_axes_are_drawn_on(name: str) -> None:
    axes = Figure().subplots(1, 2)
    assert ALL[name](3, axes[0]) is axes[0]
    assert not axes[1].has_data()
    with pytest.raises(TypeError, match=r"got ndarray: pass one of"):
        ALL[name](3, axes)


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("name", DRAW)
def test_few_layers_are_named(name: str, count: int) -> None:
    ax = DRAW[name](count, None)
    words = legend_of(ax)
    for i in range(count):
        assert any(word.startswith(f"block{i}.conv") for word in words), words
    assert not colourbar_of(ax)
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in ax.lines[:count]}
    assert name == "histogram" or len(looks) == count


@pytest.mark.parametrize("count", [11, 100])
@pytest.mark.parametrize("name", DRAW)
def test_many_layers_are_coloured_by_depth(name: str, count: int) -> None:
    ax = DRAW[name](count, None)
    what = "sample" if name == "histogram" else "layer"
    assert colourbar_of(ax) == f"{what}\nfirst: block0.conv\nlast: block{count - 1}.conv"
    assert not legend_of(ax)
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_yticks()[[0, -1]].tolist() == [1, count]
    assert len({to_hex(line.get_color()) for line in ax.lines[:count]}) > count * 0.9


@pytest.mark.parametrize("name", DRAW)
def test_nothing_overlaps(name: str) -> None:
    for count in (8, 100):
        ax = DRAW[name](count, None)
        figure = ax.figure
        renderer = rendered(ax)
        beside = ax.get_legend() or next(other for other in figure.axes if other is not ax)
        assert not ax.bbox.overlaps(beside.get_window_extent(renderer))
        assert figure.bbox.x1 >= beside.get_tightbbox(renderer).x1


def test_singular_values_are_sorted_by_rank() -> None:
    ax = plots.singular_values({"a": [1.0, 3.0, 2.0], "b": (5,)})
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert ax.lines[1].get_xydata().tolist() == [[1, 5]]
    assert ax.lines[1].get_marker() == "o"
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0
    assert ax.get_xlim()[0] > 0


def test_normalized_is_the_papers_definition() -> None:
    ax = plots.singular_values({"a": [1.0, 4.0, 2.0, 0.0]}, scale="normalized")
    assert ax.lines[0].get_xydata().tolist() == [[0.25, 1], [0.5, 0.5], [0.75, 0.25], [1, 0]]
    assert ax.get_xlim() == (0, 1.02)


def test_relative_is_the_papers_other_definition() -> None:
    values = {"a": [1.0, 4.0, 2.0, 0.0], "b": [1e-9, 3.0]}
    ax = plots.singular_values(values, scale="relative")
    assert ax.lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5], [3, 0.25], [4, 0]]
    assert (ax.get_yscale(), ax.get_ylim()) == ("linear", (0, 1.03))
    assert ax.get_ylabel() == r"$\sigma_i / \sigma_1$"
    assert "Relative singular values by rank" in ax.get_title(loc="left")
    uneven = {"a": np.ones(2), "b": np.ones(100)}
    assert plots.singular_values(uneven, scale="relative").get_xscale() == "log"
    steps = plots.spectrum_over_training({1: [4, 2], 2: [5, 5]}, scale="relative")
    assert [line.get_ydata().tolist() for line in steps.lines] == [[1, 0.5], [1, 1]]


def test_zeros_drop_out_of_a_logarithmic_axis_and_are_counted() -> None:
    s = [10.0, 1.0, 1e-3, 1e-14, 0.0, 0.0]
    ax = plots.singular_values({"a": s})
    assert ax.get_yscale() == "log"
    assert ax.lines[0].get_ydata().tolist() == s
    assert 1e-4 < ax.get_ylim()[0] * 10**8 < 1e-2
    assert "3 of 6 values" in ax.get_title(loc="left")
    rendered(ax)
    zero = plots.singular_values({"a": [0.0, 0.0]})
    assert zero.get_yscale() == "linear"
    assert zero.get_ylim() == (0, 1)
    some = plots.singular_values({"a": [1.0, 0.0]})
    assert some.get_yscale() == "linear"
    assert "0 or nearly" not in some.get_title(loc="left")


def test_lengths_that_differ_much_get_logarithmic_ranks() -> None:
    uneven = {"a": np.ones(2), "b": np.ones(100)}
    assert plots.singular_values(uneven).get_xscale() == "log"
    assert plots.singular_values({"a": np.ones(50), "b": np.ones(100)}).get_xscale() == "linear"


def test_history_gives_a_line_to_each_layer() -> None:
    given = [
        {"step": 4, "name": "b", "norm_after": [[1.0, 3.0], [2.0]]},
        {"step": 2, "name": "b", "norm_after": np.float32(5.0)},
        {"step": 2, "name": "a", "norm_after": (0.5, 0.25), "norm_before": 9.0},
        {"step": 3, "name": "a", "skipped": "no gradient"},
        {"step": 3, "name": "c", "stable_rank": 2.0},
    ]
    history = History(10)
    for record in given:
        history.add(record)
    for source in (given, history, history.records(), iter(given)):
        ax = plots.spectra_over_training(source)
        assert legend_of(ax) == ["b", "a"]
        assert ax.lines[0].get_xydata().tolist() == [[2, 5], [4, 3]]
        assert ax.lines[1].get_xydata().tolist() == [[2, 0.5]]
    assert legend_of(plots.spectra_over_training(given, figure="stable_rank")) == ["c"]
    found = "'norm_after', 'norm_before', 'stable_rank'$"
    with pytest.raises(ValueError, match=f"no record has the figure 'sigma'; these exist: {found}"):
        plots.spectra_over_training(given, figure="sigma")


def test_history_with_nan_has_gaps() -> None:
    values = [1.0, np.nan, [2.0, np.nan], np.inf, 3.0]
    given = [{"step": i, "name": "a", "norm_after": v} for i, v in enumerate(values)]
    ax = plots.spectra_over_training(given)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, np.nan, np.nan, np.nan, 3])
    assert "3 of 5 values, NaN or infinite" in ax.get_title(loc="left")
    with pytest.raises(ValueError, match=r"none of the 3 .* diverged at step 1 or before"):
        plots.spectra_over_training(given[1:4])
    with pytest.raises(ValueError, match="the history is empty"):
        plots.spectra_over_training([])
    with pytest.raises(ValueError, match=r"record 0 has no step or no name, only norm_after"):
        plots.spectra_over_training([{"norm_after": 1.0}])


def test_snapshots_are_drawn_in_the_order_of_their_steps() -> None:
    ax = plots.spectrum_over_training({30: [1, 2], 0: [4, 3], 10: [3, 2]}, name="$a$")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[4, 3], [3, 2], [2, 1]]
    assert colourbar_of(ax) == "training step"
    assert ax.get_title(loc="left") == r"Singular values of \$a\$ over training"
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylim() == (0, 30)
    first, _, last = (to_hex(line.get_color()) for line in ax.lines)
    assert first != last
    half = plots.spectrum_over_training({1: [4, 2]}, scale="normalized")
    assert half.lines[0].get_xydata().tolist() == [[0.5, 1], [1, 0.5]]
    assert legend_of(half) == ["step 1"]
    with pytest.raises(ValueError, match=r"steps as keys, got 'conv1'; .* plots\.singular_values"):
        plots.spectrum_over_training({"conv1": [1.0]})


def test_histogram_heights_are_fractions_and_percentiles_are_named() -> None:
    sample = {"train": np.arange(101.0), "test": np.arange(11.0)}
    ax = plots.histogram(sample, kind="lipschitz")
    for stairs, values in zip(ax.patches[1::2], sample.values(), strict=True):
        heights, edges, _ = stairs.get_data()
        np.testing.assert_allclose(heights, np.histogram(values, edges)[0] / len(values))
        assert heights.sum() == pytest.approx(1)
        assert (edges[0], edges[-1]) == (0, 100)
    assert [line.get_xdata()[0] for line in ax.lines] == [50, 95, 5, 9.5]
    assert legend_of(ax) == [
        *("train", "50th percentile: 50", "95th percentile: 95"),
        *("test", "50th percentile: 5", "95th percentile: 9.5"),
    ]
    assert "lower bounds" in ax.get_xlabel()


def test_histogram_of_several_samples() -> None:
    ax = plots.histogram({f"s{i}": [i, i + 1.0] for i in range(4)}, kind="margin", percentiles=[1])
    assert ax.lines[0].get_ydata().sum() == pytest.approx(1)
    assert legend_of(ax) == ["s0: 0.01", "s1: 1.01", "s2: 2.01", "s3: 3.01", "1st percentile"]
    assert "margin" in ax.get_xlabel()


def test_histogram_leaves_out_what_is_not_finite_and_says_so() -> None:
    ax = plots.histogram([np.inf, -1.0, 2.0, np.nan], kind="complexity", percentiles=())
    assert legend_of(ax) == ["2 values"]
    assert "2 of 4 values, NaN or infinite, left out" in ax.get_title(loc="left")
    assert "log" in ax.get_xlabel()
    with pytest.raises(ValueError, match=r"sample 'test': none of 1 values is finite"):
        plots.histogram({"test": [np.nan]}, kind="margin")


@pytest.mark.parametrize("value", [0.0, 1e-8, -3e20])
def test_histogram_of_one_value(value: float) -> None:
    kind = "margin" if value < 0 else "lipschitz"
    heights, edges, _ = plots.histogram([value] * 3, kind=kind).patches[1].get_data()
    assert heights.sum() == pytest.approx(1)
    assert (np.diff(edges) > 0).all()


def test_histogram_refuses() -> None:
    with pytest.raises(ValueError, match=r"sample 'a': got -2, .* kind=\"complexity\""):
        plots.histogram({"a": [1.0, -2.0]}, kind="lipschitz")
    with pytest.raises(ValueError, match=r"kind must be one of 'lipschitz', .*, got 'norm'"):
        plots.histogram([1.0], kind="norm")
    for wrong in ([101], [-1], [np.nan], [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="percentiles must be at most 4 numbers"):
            plots.histogram([1.0], kind="margin", percentiles=wrong)


def test_norms_are_dots_and_brackets_intervals() -> None:
    ax = plots.norms({"a": 2, "b": (1.0, 3.0), "c": NormBounds(np.float32(0.5), np.float32(0.5))})
    assert ax.lines[0].get_xydata().tolist() == [[2, 0], [0.5, 2]]
    (bar,) = ax.collections
    assert bar.get_segments()[0].tolist() == [[1, 1], [3, 1]]
    assert ax.yaxis.get_inverted()
    assert ax.get_xlim()[0] == 0
    assert not legend_of(ax)


def test_norms_beside_others() -> None:
    ax = plots.norms({"a": 2.0, "b": 1.0}, compare={"b": 0.5, "c": 0.25}, labels=("plain", "_cut"))
    rows, compare = (line.get_xydata() for line in ax.lines)
    assert rows[:, 0].tolist() == [2, 1]
    assert compare[:, 0].tolist() == [0.5, 0.25]
    assert (np.round(rows[:, 1]) == [0, 1]).all()
    assert (np.round(compare[:, 1]) == [1, 2]).all()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]
    assert legend_of(ax) == ["plain", " _cut"]


def test_norms_grow_with_the_layers_and_thin_names_where_they_cannot() -> None:
    many = {f"layer{i}": 10.0 ** (i % 5) for i in range(100)}
    ax = plots.norms(many)
    assert len(ax.get_yticks()) == 100
    assert ax.get_xscale() == "log"
    assert ax.figure.get_figheight() > 15
    small = plots.norms(many, ax=Figure(figsize=(4, 3)).add_subplot())
    assert 5 < len(small.get_yticks()) < 25
    assert "th named" in small.get_ylabel()
    rendered(ax)
    heights = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert all(a.y0 >= b.y1 for a, b in pairwise(heights))


def test_names_are_cut_in_the_middle_and_stay_apart() -> None:
    names = [f"model.encoder.{'x' * 40}.layers.{i}.{'y' * 40}.weight" for i in range(3)]
    ticks = [t.get_text() for t in plots.norms(dict.fromkeys(names, 1.0)).get_yticklabels()]
    assert len(set(ticks)) == 3
    one = plots.norms({names[0]: 1.0}).get_yticklabels()[0].get_text()
    assert len(one) <= 32
    assert re.fullmatch(r"model\..*…y*\.weight", one)


def test_names_that_matplotlib_would_misread() -> None:
    ax = plots.singular_values({"_orig_mod.fc": [1.0], "$a_{b$": [1.0], "x$": [1.0], 7: [1.0]})
    assert legend_of(ax) == [" _orig_mod.fc", r"\$a_{b\$", r"x\$", "7"]
    rendered(ax)


NO_SPECTRA: list[tuple[Any, type[Exception], str]] = [
    ({}, ValueError, "spectra is empty"),
    ([1.0], TypeError, r"spectra must be a mapping .*got list"),
    ({"fc": [1.0, np.nan]}, NonFiniteError, "layer 'fc': got nan at position 1; leave it out"),
    ({"fc": [np.inf]}, NonFiniteError, "layer 'fc': got inf; leave it out"),
    ({"fc": [1.0, -0.5]}, ValueError, "layer 'fc': got -0.5 at position 1; a singular value"),
    (
        {"fc": np.ones((2, 3))},
        ValueError,
        r"layer 'fc': expected one dimension, got shape \(2, 3\)",
    ),
    ({"fc": 1.0}, ValueError, r"layer 'fc': expected one dimension, got shape \(\)"),
    ({"fc": []}, ValueError, "layer 'fc': no values; leave it out"),
    ({"fc": [1j]}, ValueError, "layer 'fc': expected real numbers.*complex"),
    ({"fc": [[1], [1, 2]]}, ValueError, "layer 'fc': expected real numbers"),
    ({"fc": ["a"]}, ValueError, r"layer 'fc': expected real numbers.*\.detach\(\)\.cpu\(\)"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), NO_SPECTRA)
def test_bad_spectra_are_refused(wrong: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plots.singular_values(wrong)


def test_zero_layers_and_unknown_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'fc': all singular values are 0.*absolute"):
        plots.singular_values({"fc": [0.0]}, scale="relative")
    with pytest.raises(ValueError, match="step 3: all singular values are 0"):
        plots.spectrum_over_training({3: [0.0]}, scale="normalized")
    for draw in (plots.singular_values, plots.spectrum_over_training):
        with pytest.raises(ValueError, match=r"scale must be one of .*, got 'log'"):
            draw({1: [1.0]}, scale="log")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-1.0, "layer 'fc': got -1; a norm is at least 0"),
        (np.nan, "layer 'fc': got nan; leave it out"),
        ((1.0, np.inf), "layer 'fc': got inf at position 1"),
        ((2.0, 1.0), "layer 'fc': the lower end 2 is above the upper 1; swap them"),
        ([1.0, 2.0, 3.0], r"layer 'fc': expected a number or \(lower, upper\), got shape \(3,\)"),
        (None, "layer 'fc': got nan|layer 'fc': expected real numbers"),
    ],
)
def test_bad_norms_are_refused(value: Any, match: str) -> None:
    for arguments in ({"rows": {"fc": value}}, {"rows": {"fc": 1.0}, "compare": {"fc": value}}):
        with pytest.raises(ValueError, match=match):
            plots.norms(**arguments)


ENDINGS = ("png", "pdf", "svg")


@pytest.fixture(scope="module")
def drawn_twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders that do not exist before, with files of each ending by a process of its own."""
    place = tmp_path_factory.mktemp("drawn")
    script = (
        "import sys; from specops import plots\n"
        "for file in sys.argv[1:]:\n"
        "    plots.save(plots.singular_values({'fc': [2.0, 1.0]}), file)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    folders = [place / seed for seed in "12"]
    for folder in folders:
        environment = {"PYTHONHASHSEED": folder.name, "MPLCONFIGDIR": str(place)}
        files = [str(folder / f"f.{ending}") for ending in ENDINGS]
        subprocess.run([sys.executable, "-c", script, *files], env=environment, check=True)
    return folders


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_are_the_same_each_time(drawn_twice: list[Path], ending: str) -> None:
    first, second = ((folder / f"f.{ending}").read_bytes() for folder in drawn_twice)
    assert len(first) > 2000
    assert first == second
    assert not re.search(rb"Software|matplotlib\.org|CreationDate|dc:date", first)


def test_save_takes_axes_figures_and_parts_of_figures(tmp_path: Path) -> None:
    figure = Figure()
    ax = figure.subfigures(1, 2)[0].add_subplot()
    plots.norms({"fc": 1.0}, ax=ax)
    written = {plots.save(f, tmp_path / "f.png").read_bytes() for f in (ax, ax.figure, figure)}
    assert len(written) == 1
    with pytest.raises(ValueError, match=r"ends in \.png, \.pdf, \.svg, got 'f.jpg'"):
        plots.save(ax, tmp_path / "f.jpg")
    with pytest.raises(TypeError, match="Axes or Figure, got str"):
        plots.save("ax", tmp_path / "f.png")


def test_specops_does_not_import_matplotlib_and_says_when_it_is_missing() -> None:
    script = (
        "import sys, specops\n"
        "[getattr(specops, name) for name in specops.__all__]\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n    import specops.plots\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "plots need matplotlib: pip install 'specops[plot]'"


@pytest.mark.parametrize("name", plots.__all__)
def test_docstrings_document_every_argument(name: str) -> None:
    member = getattr(plots, name)
    documented = inspect.getdoc(member) or ""
    for parameter in inspect.signature(member).parameters:
        assert re.search(rf"^{parameter} : ", documented, re.M), parameter
    assert ">>> " in documented


def test_a_norm_that_is_no_interval_is_counted_once() -> None:
    ax = plots.norms({"a": 0.0, "b": 1.0, "c": 1e4, "d": (0.0, 2.0)})
    assert "2 of 5 values, 0 or nearly" in ax.get_title(loc="left")
