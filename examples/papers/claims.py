"""What is claimed, as comparisons of runs."""

from __future__ import annotations

from harness.comparisons import Claim, Comparison, Threshold, chain

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
    *(
        Claim(
            "averages", "pull request 394", "With torch's vectors averaged along, outputs of a "
            f"stack of {depth} are off by thousands (350 000 against 47)",
            depth, (Threshold("torch, vectors averaged", "log10_error", 3),),
        )
        for depth in ("16 layers", "64 layers")
    ),
    *(
        Claim(
            "averages", "pull request 409", f"So is the loss of {depth} (0.074 to 466)",
            depth, (Comparison("torch, vectors averaged", "torch, vectors averaged",
                               "average_loss", "exact_loss", factor=1000),),
        )
        for depth in ("16 layers", "64 layers")
    ),
    Claim(
        "averages", "", "With the last step's vectors, which AveragedModel keeps by default, "
        "outputs are still off by more than a hundredth",
        "64 layers", (Threshold("torch, vectors of the last step", "log10_error", -2),),
    ),
    Claim(
        "averages", "", "Averaged under specops' normalisation they are off by less than a "
        "thousandth",
        "64 layers", (Threshold("specops", "log10_error", -3, above=False),),
    ),
    Claim(
        "early_warning", "Ren et al., figure 1", "At a rate that is too high (0.2) the stable "
        "rank is below a quarter of its start before the loss rises by a tenth",
        "rates", (Threshold("rate 0.2", "rank_lead", 0),),
    ),
    Claim(
        "early_warning", "", "This alarm does not ring at rates at which the loss never rises",
        "rates", tuple(Threshold(f"rate {rate}", metric, 0.5, above=False)
                       for rate in ("0.001", "0.01", "0.03")
                       for metric in ("loss_rose", "rank_alarm")),
    ),
    Claim(
        "early_warning", "", "It rings earlier than one on the gradient's norm (three times its "
        "lowest)",
        "rates", (Comparison("rate 0.2", "rate 0.2", "rank_lead", "gradient_lead"),),
    ),
    Claim(
        "plasticity", "Lewandowski et al.", "Without a regulariser late tasks are fitted "
        "worse than early ones",
        "random labels", (Comparison("none", "none", "early", "late"),),
    ),
    Claim(
        "plasticity", "Lewandowski et al.", "With a penalty on spectral norms they are not: "
        "within a twentieth",
        "random labels", (Comparison("spectral", "spectral", "late", "early", factor=0.95),),
    ),
    Claim(
        "plasticity", "Lewandowski et al.", "Late tasks are fitted better with it than with "
        "weight decay and without either",
        "random labels", tuple(Comparison("spectral", other, "late")
                               for other in ("none", "decay 0.1", "decay 1")),
    ),
    Claim(
        "plasticity", "Lewandowski et al.", "The same where classes are renamed",
        "renamed classes", tuple(Comparison("spectral", other, "late")
                                 for other in ("none", "decay 0.1", "decay 1")),
    ),
    Claim(
        "certified", "", "The certified bound is no more than the product of the caps",
        "bounds", tuple(Comparison(f"cap {c}", f"cap {c}", "allowed", "lipschitz", factor=0.999)
                        for c in ("0.5", "1", "2", "4")),
    ),
    Claim(
        "certified", "", "A cap reaches the accuracy of no cap, within a "
        "twentieth, at a tenth of its bound",
        "bounds", (Comparison("cap 2", "none", "test_accuracy", factor=0.95),
                   Comparison("none", "cap 2", "lipschitz", factor=10)),
    ),
    *(
        Claim(
            "certified", "Newhouse et al.: a better trade", f"A cap reaches the accuracy of weight "
            f"{decay}, within a twentieth, at a lower bound",
            "bounds", (Comparison("cap 2", decay, "test_accuracy", factor=0.95),
                       Comparison(decay, "cap 2", "lipschitz")),
        )
        for decay in ("decay 0.001", "decay 0.01")
    ),
    Claim(
        "certified", "", "Accuracy has a price: it falls with the cap",
        "bounds", chain("test_accuracy", "cap 2", "cap 1", "cap 0.5"),
    ),
    Claim(
        "certified", "", "More images are right within 36/255 for certain at cap 1 than without a "
        "cap",
        "bounds", chain("certified_accuracy", "cap 1", "none"),
    ),
)  # fmt: skip
