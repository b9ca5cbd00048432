"""What the papers claim, as comparisons of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.records import Record


@dataclass(frozen=True)
class Comparison:
    """`larger` exceeds `factor` · `smaller`, of one figure of two settings or of one."""

    larger: str
    smaller: str
    metric: str
    smaller_metric: str = ""
    factor: float = 1.0

    def text(self) -> str:
        times = "" if self.factor == 1.0 else f"{self.factor:g} × "
        if self.larger == self.smaller:
            return f"{self.larger}: {self.metric} > {times}{self.smaller_metric}"
        return f"{self.metric}: {self.larger} > {times}{self.smaller}"

    def differences(self, runs: Mapping[str, Sequence[Record]]) -> list[float]:
        """Of runs with the same seed; those that are missing or not finite are left out."""
        sides = []
        for label, metric in (
            (self.larger, self.metric),
            (self.smaller, self.smaller_metric or self.metric),
        ):
            found = {r["seed"]: r["results"].get(metric) for r in runs.get(label, ())}
            sides.append({seed: v for seed, v in found.items() if v is not None})
        large, small = sides
        return [large[s] - self.factor * small[s] for s in sorted(large.keys() & small.keys())]


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, where it stands, and what would show it."""

    paper: str
    source: str
    text: str
    experiment: str = ""
    comparisons: tuple[Comparison, ...] = ()
    not_run: str = ""


def chain(metric: str, *labels: str) -> tuple[Comparison, ...]:
    """Each exceeds the next."""
    return tuple(Comparison(a, b, metric) for a, b in pairwise(labels))


_BIG = "a ResNet-32 takes 250 epochs of CIFAR-10 on a GPU: `--preset full`"
_GAN = "10⁵ steps and more on a GPU: `--preset full`"

CLAIMS = (
    Claim(
        "sedghi", "figure 1", "All singular values by transforms take less time than by the "
        "explicit matrix",
        "time", (Comparison("8×8", "8×8", "explicit", "specops_numpy"),
                 Comparison("8×8", "8×8", "explicit", "specops_torch")),
    ),
    Claim(
        "sedghi", "section 4.2, figure 2", "Clipping at 0.5 and at 1.0 lowers the test error "
        "(ResNet-32, CIFAR-10: 6.2 % to 5.3 % and 5.5 %)",
        "clipping", (Comparison("none", "operator 0.5", "test_error"),
                     Comparison("none", "operator 1.0", "test_error")),
    ),
    Claim(
        "sedghi", "section 4.2", "Clipping at 0.1 raises it (to 6.7 %)",
        "clipping", chain("test_error", "operator 0.1", "none"),
    ),
    Claim(
        "sedghi", "section 3", "One round of the paper's exceeds its bound of 0.5, the "
        "projection does not",
        "clipping", (Comparison("one round 0.5", "operator 0.5", "largest_norm"),),
    ),
    Claim(
        "sedghi", "section 4.2, figure 4", "Training is barely slower: below 1.25 times as long",
        "clipping", (Comparison("none", "operator 0.5", "training_seconds", factor=0.8),
                     Comparison("none", "one round 0.5", "training_seconds", factor=0.8)),
    ),
    Claim(
        "sedghi", "section 4.4", "Clipping reshaped kernels, at its best bound (0.2), is as good: "
        "test error within a twentieth of that of the operator's at 0.5",
        "clipping", (Comparison("operator 0.5", "reshaped 0.2", "test_error", factor=0.95),
                     Comparison("reshaped 0.2", "operator 0.5", "test_error", factor=0.95)),
    ),
    Claim(
        "sedghi", "figure 3a", "Without batch norm, too, clipping at 1.0 lowers the test error",
        "rates, no batch norm", chain("test_error", "none, rate 0.1", "operator 1.0, rate 0.1"),
    ),
    Claim("sedghi", "figure 2", "The figures themselves: 5.3 % test error at 0.5", not_run=_BIG),
    Claim(
        "sanyal", "figure 2", "SRN-30 classifies better than SN and vanilla "
        "(ResNet-110, CIFAR-100: 73.2 % against 71.5 % and 72.4 %)",
        "clean labels", (Comparison("SRN-30", "SN", "test_accuracy"),
                         Comparison("SRN-30", "vanilla", "test_accuracy")),
    ),
    Claim(
        "sanyal", "table 1", "SRN fits random labels less than SN and vanilla, without decay",
        "random labels, no weight decay", (Comparison("SRN-30", "SN", "train_error"),
                                           Comparison("SRN-30", "vanilla", "train_error")),
    ),
    Claim(
        "sanyal", "table 1", "The same with weight decay",
        "random labels, weight decay", (Comparison("SRN-30", "SN", "train_error"),
                                        Comparison("SRN-30", "vanilla", "train_error")),
    ),
    Claim(
        "sanyal", "figure 4, table 5", "The 90th percentiles of spec-fro and jac-norm are smaller "
        "with SRN-30 than SN than vanilla",
        "clean labels", (*chain("spec_fro_90", "vanilla", "SN", "SRN-30"),
                         *chain("jac_norm_90", "vanilla", "SN", "SRN-30")),
    ),
    Claim(
        "sanyal", "figure 1", "SRN-30 lowers the noise sensitivity",
        "clean labels", chain("noise_sensitivity", "vanilla", "SRN-30"),
    ),
    Claim(
        "sanyal", "figure 5a", "Empirical Lipschitz constants of a GAN's discriminator fall with c",
        "GAN", chain("lipschitz_95", "SRN-70", "SRN-30", "SRN-10"),
    ),
    Claim(
        "sanyal", "table 2", "SRN-70 has a lower FID than SN (CIFAR-10: 19.83 against 20.67)",
        "GAN", chain("fid", "SN", "SRN-70"),
    ),
    Claim(
        "sanyal", "table 4", "SRN-70's images are harder to tell from real ones (divergence)",
        "GAN", chain("neural_divergence", "SN", "SRN-70"),
    ),
    Claim("sanyal", "table 2", "The figures themselves", not_run=_GAN),
    Claim(
        "yoshida", "table 1, left", "At a large batch spectral is the most accurate "
        "(VGG, B = 4096: 0.885 against 0.858 vanilla and 0.863 decay)",
        "large batch", (Comparison("spectral", "vanilla", "test_accuracy"),
                        Comparison("spectral", "decay", "test_accuracy")),
    ),
    Claim(
        "yoshida", "table 1, right", "Spectral has the smallest gap at the end (in the paper at α: "
        "0.045 against 0.092)",
        "large batch", chain("gap", "vanilla", "spectral"),
    ),
    Claim(
        "yoshida", "table 1, left", "At a small batch spectral is better than vanilla",
        "small batch", chain("test_accuracy", "spectral", "vanilla"),
    ),
    Claim(
        "yoshida", "figure 2", "Spectral lowers ‖∇x loss‖ on test images",
        "large batch", chain("gradient_test", "vanilla", "spectral"),
    ),
    Claim(
        "yoshida", "figure 3", "Regularised models have larger top eigenvalues of the Hessian",
        "large batch", chain("sharpness_train", "spectral", "vanilla"),
    ),
    Claim(
        "yoshida", "figure 4", "Spectral lowers the largest singular values, decay hardly",
        "large batch", chain("largest_norm", "decay", "spectral"),
    ),
    Claim(
        "lin", "table 1", "BSN has a better Inception score and FID than SN "
        "(CIFAR-10: 7.54 and 26.94 against 7.12 and 31.43)",
        "variants", (Comparison("BSN", "SN_w", "inception_score"),
                     Comparison("SN_w", "BSN", "fid")),
    ),
    Claim(
        "lin", "figure 4", "SN_conv has a worse Inception score than SN_w",
        "variants", chain("inception_score", "SN_w", "SN_conv"),
    ),
    Claim(
        "lin", "figure 5", "SN_conv's gradients by the weights in use are smaller (they vanish)",
        "variants", chain("log_gradient", "SN_w", "SN_conv"),
    ),
    Claim(
        "lin", "figures 16, 17", "Without SN parameter variances are larger than with it",
        "variants", chain("log_variances", "none", "SN_w"),
    ),
    Claim("lin", "figure 9", "SN drops late in training, BSN does not", not_run=_GAN),
    Claim("lin", "table 1", "SSN and BSSN at their best scales improve on SN and BSN",
          not_run="27 scales at 400 000 steps: `--preset full`"),
)  # fmt: skip
