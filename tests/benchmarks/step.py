"""What rules add to a training step, against torch's own parametrization on the same layers."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

import specops
from tests.benchmarks import jax_step
from tests.benchmarks.harness import milliseconds, seconds_of

Networks = Mapping[str, Callable[[], Any]]
_ROUNDS = 12
_EVERY = 10


def run(repeats: int, quick: bool) -> None:
    """Print the tables."""
    from tests.benchmarks.networks import NETWORKS, SHORT

    networks = dict(list(NETWORKS.items())[1:2]) if quick else NETWORKS
    rounds = 4 if quick else _ROUNDS * repeats
    compared = networks if quick else {**networks, **SHORT}
    _overheads(compared, rounds)
    _forwards(compared, rounds)
    _algorithms(rounds)
    _clips(networks, rounds)
    jax_step.run(repeats, quick)


def _overheads(networks: Networks, rounds: int) -> None:
    """Plain step, torch's spectral_norm, our forward rule and our penalty in turn."""
    table = _table(
        "overhead of a training step, torch on the CPU, float32",
        "plain step",
        "torch spectral_norm",
        "SpectralNormalization",
        "of torch's",
        "SpectralNormPenalty",
        "of torch's",
    )
    normalization = specops.SpectralNormalization(norm="reshaped")
    penalty = specops.SpectralNormPenalty(0.01, norm="reshaped")
    shares: list[list[float]] = [[], []]
    for name, make in networks.items():
        steps = [
            _training(make, None),
            _training(make, _parametrize),
            _training(make, lambda o, m: specops.attach(o, m, normalization)),
            _training(make, lambda o, m: specops.attach(o, m, penalty)),
        ]
        plain, *added = _medians(steps, rounds)
        ratios = [a / added[0] for a in added[1:]]
        for kept, ratio in zip(shares, ratios, strict=True):
            kept.append(max(ratio, 1e-3))
        table.add_row(
            name,
            _ms(plain),
            _ms(added[0]),
            _ms(added[1]),
            f"{ratios[0]:.2f}",
            _ms(added[2]),
            f"{ratios[1]:.2f}",
        )
    means = [math.exp(statistics.fmean(map(math.log, s))) for s in shares]
    table.caption = f"geometric means {means[0]:.2f} and {means[1]:.2f}"
    table.caption_justify = "left"
    Console(width=150).print(table)


def _forwards(networks: Networks, rounds: int) -> None:
    """Forward passes alone, in training: torch advances its vectors there, we in the hook."""
    table = _table(
        "overhead of the forward pass alone, torch on the CPU, float32",
        "plain forward",
        "torch spectral_norm",
        "SpectralNormalization",
        "of torch's",
    )
    rule = specops.SpectralNormalization(norm="reshaped")
    for name, make in networks.items():
        passes = [
            _passing(make, None),
            _passing(make, _parametrize),
            _passing(make, lambda o, m: specops.attach(o, m, rule)),
        ]
        plain, theirs, ours = _medians(passes, rounds)
        table.add_row(name, _ms(plain), _ms(theirs), _ms(ours), f"{ours / theirs:.2f}")
    Console(width=150).print(table)


def _algorithms(rounds: int) -> None:
    """Rules of the papers beside their algorithms, each written in ten lines of torch."""
    from tests.benchmarks.algorithms import limited, penalised
    from tests.benchmarks.networks import LIMITED, PENALISED

    table = _table(
        "overhead of a training step, torch on the CPU, float32",
        "plain step",
        "the algorithm",
        "rule",
        "of the algorithm's",
    )
    limit = specops.StableRankNormalization(0.5, norm="reshaped")
    penalty = specops.SpectralNormPenalty(0.01, norm="reshaped")
    for name, make in LIMITED.items():
        steps = [
            _training(make, None),
            _training(make, limited(0.5)),
            _training(make, lambda o, m: specops.attach(o, m, limit)),
        ]
        plain, theirs, ours = _medians(steps, rounds)
        row = f"StableRankNormalization, {name}"
        table.add_row(row, _ms(plain), _ms(theirs), _ms(ours), f"{ours / theirs:.2f}")
    for name, make in PENALISED.items():
        model, x, optimizer = _model(make)
        steps = [
            _training(make, None),
            penalised(model, x, optimizer, 0.01),
            _training(make, lambda o, m: specops.attach(o, m, penalty)),
        ]
        plain, theirs, ours = _medians(steps, rounds)
        row = f"SpectralNormPenalty, {name}"
        table.add_row(row, _ms(plain), _ms(theirs), _ms(ours), f"{ours / theirs:.2f}")
    Console(width=150).print(table)


def _clips(networks: Networks, rounds: int) -> None:
    """The clip's own time in its hook, screened and certified, over that of ten steps."""
    import torch

    table = _table(
        f"ClipSpectralNorm(every={_EVERY}) inside the ball, torch on the CPU, float32",
        "plain step",
        "screened firing",
        "per step",
        "of the step",
        "certified firing",
        "per step, one in a hundred",
    )
    for name, make in networks.items():
        model, x, optimizer = _model(make)
        step = _stepper(model, x, optimizer)
        step()
        step()
        geometry = specops.attach(None, model, specops.Monitor())
        step()
        geometry.step()
        figures = (
            v for r in geometry.history for k, v in r.items() if k.startswith(("spec", "norm"))
        )
        largest = max(max(v) if isinstance(v, list) else v for v in figures)
        geometry.detach()
        attachment = specops.attach(None, model, specops.ClipSpectralNorm(1.5 * largest))
        step()
        first = seconds_of(attachment.step)
        plains, screens = [], []
        for _ in range(rounds):
            plains.append(seconds_of(step))
            screens.append(seconds_of(attachment.step))
        certified = [seconds_of(attachment.enforce) for _ in range(3)]
        assert all(torch.isfinite(p).all() for p in model.parameters())
        plain, screened = statistics.median(plains), statistics.median(screens)
        last = statistics.median(certified)
        share = screened / _EVERY / plain
        amortised = (0.99 * screened + 0.01 * last) / _EVERY
        table.add_row(
            name,
            _ms(plain),
            _ms(screened),
            _ms(screened / _EVERY),
            f"{share:.2%}",
            f"{_ms(last)} (first {_ms(first)})",
            f"{amortised / plain:.2%}",
        )
    Console(width=150).print(table)


def _model(make: Callable[[], Any]) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    model, x = make()
    return model, x, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _stepper(model: Any, x: Any, optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _training(make: Callable[[], Any], prepare: Any) -> Callable[[], None]:
    model, x, optimizer = _model(make)
    if prepare is not None:
        prepare(optimizer, model)
    return _stepper(model, x, optimizer)


def _passing(make: Callable[[], Any], prepare: Any) -> Callable[[], None]:
    model, x, optimizer = _model(make)
    if prepare is not None:
        prepare(optimizer, model)
    _stepper(model, x, optimizer)()
    return lambda: model(x)


def _parametrize(optimizer: Any, model: Any) -> None:
    from torch import nn
    from torch.nn.utils.parametrizations import spectral_norm

    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            spectral_norm(module)
        elif isinstance(module, nn.MultiheadAttention):
            spectral_norm(module, "in_proj_weight")


def _medians(steps: list[Callable[[], None]], rounds: int) -> tuple[float, ...]:
    """(median of the first, medians of what the others take longer in the same round)."""
    for step in steps:
        step()
    times: list[list[float]] = [[] for _ in steps]
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(range(len(steps)))
        shuffle(order)
        for i in order:
            steps[i]()  # brings its own weights into the caches
            times[i].append(seconds_of(steps[i]))
    added = (
        statistics.median(b - a for a, b in zip(times[0], own, strict=True)) for own in times[1:]
    )
    return (statistics.median(times[0]), *added)


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("network")
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _ms(seconds: float) -> str:
    return milliseconds(seconds, 2)
