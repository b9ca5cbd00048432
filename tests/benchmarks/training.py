"""What clipping costs where training moves the weights: time in the hook over time in steps."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

import specops
from tests.benchmarks.harness import milliseconds, seconds_of

_BATCH, _LITTLE = 128, 8
_EVERY = 10
_STEPS = 50
_BOUNDS = (0.5, 1.0)


def run(repeats: int, quick: bool) -> None:
    """Print the table; more steps with more repeats."""
    batch = _LITTLE if quick else _BATCH
    table = Table(
        title=f"ClipSpectralNorm, ResNet-20 from its initialisation, batch {batch}, lr 0.1, "
        "momentum, torch on the CPU, float32",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("c")
    for header in (
        "step",
        "first firing",
        "later, median",
        "most",
        "every=10",
        "every=100, at most",
        "enforce just after",
        "certify",
    ):
        table.add_column(header, justify="right")
    for bound in _BOUNDS[:1] if quick else _BOUNDS:
        _row(table, bound, batch, 2 * _EVERY if quick else max(_STEPS, _STEPS * repeats // 7))
    table.caption = (
        "every=10: of all steps and firings, the first included. every=100: if each firing cost "
        "what the dearest of them did. certify: project_spectral_ball of each weight, inside"
    )
    table.caption_justify = "left"
    Console(width=150).print(table)


def _row(table: Table, bound: float, batch: int, steps: int) -> None:
    import torch

    from tests.benchmarks.networks import resnet20

    torch.manual_seed(0)
    model, _ = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = specops.ClipSpectralNorm(bound)
    attachment = specops.attach(None, model, rule, every=_EVERY)

    def step() -> None:
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    plains, hooks = [], []
    for _ in range(steps):
        plains.append(seconds_of(step))
        hooks.append(seconds_of(attachment.step))
    firings = hooks[_EVERY - 1 :: _EVERY]
    assert sum(firings) > 0.9 * sum(hooks), "firings are not where they are looked for"
    enforced = seconds_of(attachment.enforce)
    certified = seconds_of(lambda: _certify(model, attachment, bound))
    plain = statistics.fmean(plains)
    later = firings[1:] or firings
    table.add_row(
        str(bound),
        _ms(plain),
        _ms(firings[0]),
        _ms(statistics.median(later)),
        _ms(max(later)),
        f"{sum(hooks) / sum(plains):.1%}",
        f"{max(firings) / (100 * plain):.1%}",
        _ms(enforced),
        _ms(certified),
    )


def _certify(model: Any, attachment: Any, bound: float) -> None:
    import torch

    with torch.no_grad():
        for name, geometry in attachment.geometries().items():
            weight = model.get_parameter(name)
            assert specops.project_spectral_ball(weight, bound, geometry) is weight, name


def _ms(seconds: float) -> str:
    return milliseconds(seconds, 0)
