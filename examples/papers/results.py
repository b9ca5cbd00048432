"""Write RESULTS.md: each claim beside what was run, from the JSON lines.

python examples/papers/results.py
python examples/papers/results.py --readme README.md    # its five lines as well
python examples/papers/results.py --summary             # these lines alone
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from claims import CLAIMS, Claim
from harness import records, statistics
from harness.program import RESULTS

FOUR = {
    "sedghi": ("Sedghi, Gupta & Long 2019", "The Singular Values of Convolutional Layers"),
    "sanyal": ("Sanyal, Torr & Dokania 2020", "Stable Rank Normalization"),
    "yoshida": ("Yoshida & Miyato 2017", "Spectral Norm Regularization"),
    "lin": ("Lin, Sekar & Fanti 2021", "Why Spectral Normalization Stabilizes GANs"),
}
BEYOND = {
    "averages": "Averages of weights under spectral normalisation (NCAR/miles-credit, pull "
    "requests 394 and 409)",
    "early_warning": "Stable rank before the loss rises (Ren et al. 2026, *MSign*, "
    "arXiv 2602.01734)",
    "plasticity": "Plasticity over a sequence of tasks (Lewandowski et al. 2025, *Learning "
    "Continually by Spectral Regularization*, ICLR)",
    "certified": "Accuracy against a certified Lipschitz bound (Newhouse et al. 2025, *Training "
    "Transformers with Enforced Lipschitz Constants*, arXiv 2507.13338)",
}


def settings_of(claim: Claim) -> list[tuple[str, str]]:
    """The settings and figures that a claim compares, each once."""
    return list(dict.fromkeys(side for c in claim.comparisons for side in c.sides()))


def ours(claim: Claim, runs: Mapping[str, Sequence[records.Record]]) -> str:
    """Mean ± standard error of each."""
    by_metric: dict[str, list[str]] = {}
    for label, metric in settings_of(claim):
        values = [r["results"].get(metric) for r in runs.get(label, ())]
        values = [v for v in values if v is not None]
        if values:
            text = f"{label} {statistics.rounded(statistics.mean(values), 3)}"
            if len(values) > 1:
                text += f" ± {statistics.rounded(statistics.standard_error(values), 1)}"
            by_metric.setdefault(metric, []).append(text)
    return "; ".join(f"{metric}: {', '.join(texts)}" for metric, texts in by_metric.items())


def rows(claim: Claim, found: Sequence[records.Record]) -> list[tuple[str, ...]]:
    """One for each preset and data set that the experiment was run with; or why it was not."""
    of_claim = [r for r in found if r["experiment"] == claim.experiment]
    said = f"{claim.text} ({claim.source})" if claim.source else claim.text
    criterion = "; ".join(c.text() for c in claim.comparisons)
    groups = dict.fromkeys((r["preset"], r["data"]) for r in of_claim)
    result = []
    for group in groups:
        chosen = [r for r in of_claim if (r["preset"], r["data"]) == group]
        runs = records.by_label(chosen, claim.experiment)
        labels = {label for label, _ in settings_of(claim)}
        used = [r for label in labels for r in runs.get(label, ())]
        if not used:
            continue
        verdicts = [statistics.verdict(c.differences(runs)) for c in claim.comparisons]
        fewest = min(len({r["seed"] for r in runs.get(label, ())}) for label in labels)
        seeds = f"{fewest} seed" + "s" * (fewest != 1)
        ran = (
            f"`{used[0]['command']}`; {group[1]}; {seeds} of each setting; "
            f"{', '.join(sorted({r['hardware'] for r in used}))}; "
            f"{sum(r['seconds'] for r in used) / 60:.1f} min"
        )
        verdict = statistics.weakest(verdicts)
        parts = f" ({', '.join(verdicts)})" if len(verdicts) > 1 else ""
        result.append((said, criterion, ran, ours(claim, runs),
                       f"**{verdict}**{parts}"))  # fmt: skip
    if not result:
        why = claim.not_run or "no records yet: the programs run it, these files do not hold it"
        result.append((said, criterion, why, "", "**not run**"))
    return result


def judged(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """All rows by program."""
    found = {paper: records.read(folder / f"{paper}.jsonl") for paper in (FOUR | BEYOND)}
    return {
        paper: [row for claim in CLAIMS if claim.paper == paper for row in rows(claim, runs)]
        for paper, runs in found.items()
    }


def counted(table: Iterable[tuple[str, ...]]) -> str:
    """How many rows have which verdict."""
    counts = Counter(row[-1].split("**")[1] for row in table)
    order = [*reversed(statistics.VERDICTS), "not run"]
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def summary(folder: Path) -> list[str]:
    """Five lines: what became of the claims of each paper, and of what goes beyond the four."""
    table = judged(folder)
    lines = [f"- {who}: {counted(table[paper])}" for paper, (who, _) in FOUR.items()]
    beyond = [row for paper in BEYOND for row in table[paper]]
    return [*lines, f"- Beyond the four: {counted(beyond)}"]


def renewed(text: str, lines: Sequence[str]) -> str:
    """A text in which the lines that begin as these do are these."""
    for line in lines:
        begin = re.escape(line.rpartition(": ")[0])
        text = re.sub(rf"^{begin}: .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
    return text


def document(folder: Path) -> str:
    """The whole file."""
    lines = []
    table = judged(folder)
    titles = {paper: f"{who}, *{title}*" for paper, (who, title) in FOUR.items()} | BEYOND
    for paper, title in titles.items():
        lines += ["", f"## {title}", ""]
        lines += ["| claim | shown by | run | ours: mean ± standard error | verdict |"]
        lines += ["|---|---|---|---|---|"]
        for row in table[paper]:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        for figure in sorted(folder.glob(f"{paper}_*.png")):
            lines += ["", f"![{figure.stem}](results/{figure.name})"]
    head = [
        "# What is claimed, and what was found",
        "",
        "Generated by `python examples/papers/results.py` from `results/*.jsonl`; do not edit.",
        "",
        f"Rows: {counted(row for of_paper in table.values() for row in of_paper)}.",
        "",
        *summary(folder),
        "",
        statistics.CRITERION,
        "",
        "These are small networks on few, small images, or a short text: they can show a direction "
        "where the effect is large, and a claim that is not seen is not refuted by them. Inception "
        "score and FID are those of a classifier trained on the same images, not of Inception-v3.",
        "",
        "In the figures bars and lines are means over seeds, dots are single runs, whiskers and "
        "bands 95 % t intervals; spectra are of the first run, histograms of all.",
    ]
    return "\n".join([*head, *lines]) + "\n"


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Write it, or print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON lines")
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "RESULTS.md")
    parser.add_argument("--summary", action="store_true", help="print five lines, write nothing")
    parser.add_argument("--readme", type=Path, help="a file whose five lines are renewed as well")
    options = parser.parse_args(arguments)
    if options.summary:
        print("\n".join(summary(options.results)))
        return None
    options.out.write_text(document(options.results), encoding="utf-8")
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(renewed(text, summary(options.results)), encoding="utf-8")
    return options.out


if __name__ == "__main__":
    main()
