"""Running statistics that are of other weights than rules have left: who says so, and when."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

import specops
from specops import ClipSpectralNorm, SpectralNormalization
from specops.errors import CautionWarning

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim.swa_utils import update_bn  # noqa: E402

CLIP = ClipSpectralNorm(0.25)


def network(batch_norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        batch_norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        batch_norm(4),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def batches(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 2, 6, 6, generator=generator) for _ in range(count)]


def seen(model: nn.Module, count: int = 8) -> nn.Module:
    """After passes in training mode."""
    model.train()
    with torch.no_grad():
        for x in batches(count):
            model(x)
    return model


def trained(model: nn.Module, rule: Any = None, every: int = 3, steps: int = 8) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attachment = rule and specops.attach(optimizer, model, rule, every=every)
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return attachment


def stale(attachment: Any) -> set[str]:
    return {row.name for row in attachment.report().rows if row.stale}


def caution(call: Any) -> warnings.WarningMessage:
    """The one warning of a call, which points to the line that made it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [w.category for w in caught] == [CautionWarning]
    assert caught[0].filename == __file__
    return caught[0]


def test_project_warns_and_its_remedy_is_right() -> None:
    model = network()
    trained(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    warned = str(caution(lambda: specops.project(model, CLIP)).message)
    assert "project()" in warned
    assert "(1, 4)" in warned
    assert "torch.optim.swa_utils.update_bn(loader, model)" in warned
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].running_var, before["1.running_var"])
    x = batches(9)[-1]
    plain = copy.deepcopy(model).eval()(x)
    update_bn(batches(), model)
    expected = by_hand(model, x)
    found = model.eval()(x)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).norm() > 0.5 * expected.norm()
    # Nothing is left to say.
    specops.project(model, CLIP)


def by_hand(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Evaluation in double precision, with the means over batches of their own statistics."""
    parts = [batch.double() for batch in batches()]
    x = x.double()
    for layer in copy.deepcopy(model).double():
        if isinstance(layer, nn.BatchNorm2d):
            own = [(p.mean((0, 2, 3)), p.var((0, 2, 3)), p.var((0, 2, 3), False)) for p in parts]
            mean, var = (sum(s[i] for s in own) / len(own) for i in (0, 1))
            gamma, beta, eps = layer.weight, layer.bias, layer.eps

            def normal(y: Any, m: Any, v: Any, g: Any = gamma, b: Any = beta, e: Any = eps) -> Any:
                m, v, g, b = (z.reshape(-1, 1, 1) for z in (m, v, g, b))
                return (y - m) / (v + e).sqrt() * g + b

            parts = [normal(p, m, v) for p, (m, _, v) in zip(parts, own, strict=True)]
            x = normal(x, mean, var)
        else:
            parts, x = [layer(p) for p in parts], layer(x)
    return x.detach()


def test_enforce_warns_until_the_statistics_are_new() -> None:
    model = network()
    attachment = trained(model, CLIP, every=100)
    assert stale(attachment) == set()
    warned = caution(attachment.enforce)
    assert "enforce(): " in str(warned.message)
    assert stale(attachment) == {"0.weight", "3.weight"}
    text = str(attachment.report())
    assert text.count("(stale)") == 2
    assert "running statistics of other weights, to be estimated anew" in text
    assert "(stale)" in attachment.report()._repr_html_()
    # Nothing moved this time, and yet evaluation is wrong.
    caution(attachment.enforce)
    # As many batches as in training: the counter alone would not tell.
    count = int(model[1].num_batches_tracked)
    update_bn(batches(count), model)
    assert int(model[1].num_batches_tracked) == count
    assert stale(attachment) == set()
    assert "stale" not in str(attachment.report())
    attachment.enforce()


@pytest.mark.parametrize(("momentum", "needed"), [(0.9, 2), (0.1, 44), (None, 200)])
def test_batches_in_training_make_them_new(momentum: float | None, needed: int) -> None:
    """By momentum: what is left of a change of about one half falls below a hundredth."""
    model = network()
    for layer in (model[1], model[4]):
        layer.momentum = momentum
    attachment = specops.attach(None, seen(model, 2), CLIP)
    caution(attachment.enforce)
    seen(model, needed // 2)
    for x in batches(needed):
        model.eval()(x)
    assert stale(attachment) == {"0.weight", "3.weight"}
    seen(model, needed - needed // 2)
    assert stale(attachment) == set()
    attachment.enforce()


def test_a_firing_before_the_last_steps_counts() -> None:
    """`enforce` itself changes nothing, but only one batch has met what a step left."""
    model = seen(network())
    attachment = specops.attach(None, model, CLIP, every=1)
    attachment.step()
    seen(model, 1)
    weights = [p.clone() for p in model.parameters()]
    caution(attachment.enforce)
    for p, before in zip(model.parameters(), weights, strict=True):
        assert (p - before).norm() <= 1e-2 * before.norm()


def test_a_rule_after_every_step_takes_back_what_no_batch_has_seen() -> None:
    model = network()
    attachment = specops.attach(None, seen(model), CLIP)
    caution(attachment.enforce)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        seen(model, 1)
        with torch.no_grad():
            for layer in (model[0], model[3]):
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.mul_(1.05).add_(1e-4 * noise)
        attachment.step()
    norms = {record["name"]: record["norm_before"] for record in attachment.history}
    assert min(norms["0.weight"], norms["3.weight"]) > 0.26
    assert stale(attachment) == set()
    # A step like the others; a jump is not.
    attachment.enforce()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    seen(model, 1)
    caution(attachment.enforce)


def test_only_what_follows_counts() -> None:
    """A normalisation that is registered before the changed weight has not seen it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten())
    specops.project(seen(model), CLIP)
    # One further down has, although its own layer did not change.
    model = seen(network())
    plan = specops.Plan([("0.weight", CLIP), ("3.weight", specops.Monitor())])
    attachment = specops.attach(None, model, plan)
    assert "(1, 4)" in str(caution(attachment.enforce).message)
    assert stale(attachment) == {"0.weight", "3.weight"}
    attachment = specops.attach(None, seen(network()), specops.Plan([("3.weight", CLIP)]))
    assert "(4)" in str(caution(attachment.enforce).message)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        pytest.param(network(), CLIP, id="never run"),
        pytest.param(
            seen(network(lambda n: nn.BatchNorm2d(n, track_running_stats=False))), CLIP, id="none"
        ),
        pytest.param(seen(network(nn.InstanceNorm2d)), CLIP, id="another normalisation"),
        pytest.param(seen(network()), ClipSpectralNorm(100.0), id="inside"),
        pytest.param(seen(network()), specops.Monitor(), id="measured"),
    ],
)
def test_nothing_to_say(model: nn.Module, rule: Any) -> None:
    """Warnings are errors here."""
    specops.project(model, rule)


def test_what_changed_little_is_not_worth_a_word() -> None:
    model = seen(network())
    attachment = specops.attach(None, model, CLIP)
    with pytest.warns(CautionWarning):
        attachment.enforce()
    update_bn(batches(), model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.004)
    attachment.enforce()
    assert 0.2505 < attachment.history[-1]["norm_before"] < 0.2515
    assert stale(attachment) == set()


def test_normalisation_that_training_leaves_alone_is_a_fixed_map() -> None:
    model = seen(network())
    model[1].eval()
    attachment = specops.attach(None, model, CLIP)
    assert "(4)" in str(caution(attachment.enforce).message)
    assert stale(attachment) == {"3.weight"}


def test_forward_rules_that_are_folded_change_weights() -> None:
    rule = SpectralNormalization(norm="reshaped", scale=0.25)
    model = seen(network())
    assert "(1, 4)" in str(caution(lambda: specops.project(model, rule)).message)
    # In training batches meet the weights in use, which folding leaves.
    model = network()
    attachment = trained(model, rule, steps=60)
    attachment.enforce()
    assert stale(attachment) == set()
    attachment.detach(fold=True)


def test_long_lists_are_cut() -> None:
    torch.manual_seed(0)
    blocks = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    model = nn.Sequential(*blocks)
    with torch.no_grad():
        model(torch.randn(8, 4))
    warned = caution(lambda: specops.project(model, ClipSpectralNorm(0.1)))
    assert "(1, 3, 5 and 3 more)" in str(warned.message)


def test_half_precision_is_measured_in_single() -> None:
    model = seen(network()).to(torch.bfloat16)
    caution(lambda: specops.project(model, CLIP))
