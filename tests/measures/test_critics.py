"""What critics of their own tell of generators, and distances within classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import softplus  # noqa: E402

import specops_torch  # noqa: E402
from specops import errors  # noqa: E402


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))


def samples(count: int, shift: float, seed: int = 0) -> Any:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_discriminator_loss_is_its_definition() -> None:
    """Its training, written out."""
    real, generated = samples(60, 0.0), samples(40, 1.0, 1)
    options: dict[str, Any] = {"make_critic": critic, "batch_size": 8, "learning_rate": 1e-2}
    state = torch.get_rng_state()
    found = specops_torch.neural_discriminator_loss(real, generated, steps=5, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    f = critic()
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-2, betas=(0.0, 0.9))
    for _ in range(5):
        true = real[torch.randint(60, (8,))]
        fake = generated[torch.randint(40, (8,))]
        optimizer.zero_grad()
        (softplus(f(fake)).mean() + softplus(-f(true)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        expected = float(softplus(f(generated)).mean())
    torch.set_rng_state(state)
    assert found == pytest.approx(expected, rel=1e-6)
    assert specops_torch.neural_discriminator_loss(
        real, generated, steps=5, seed=3, betas=(0.9, 0.9), **options
    ) != pytest.approx(expected, rel=1e-6)


def test_generated_samples_of_another_precision() -> None:
    real, generated = samples(20, 0.0), samples(20, 1.0, 1)
    found = [
        specops_torch.neural_divergence(critic, real, x, steps=2)
        for x in (generated, generated.double())
    ]
    assert found[0] == found[1]


def test_the_discriminator_loss_is_higher_for_better_generators() -> None:
    options: dict[str, Any] = {"make_critic": critic, "steps": 60, "learning_rate": 1e-2}
    drawn: list[int] = []

    def generate(count: int) -> Any:
        drawn.append(count)
        return torch.randn(count, 2)

    good = specops_torch.neural_discriminator_loss(
        samples(600, 0.0), generate, samples=2500, **options
    )
    assert drawn == [128] * 60 + [1000, 1000, 500]
    bad = specops_torch.neural_discriminator_loss(
        samples(600, 0.0), samples(600, 4.0, 1), **options
    )
    assert bad < 0.3
    assert abs(good - math.log(2)) < 0.15


def test_the_papers_critic() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 20, 12)
    found = specops_torch.neural_discriminator_loss(
        images, images, steps=1, batch_size=2, learning_rate=1e-9
    )
    # Small weights: it knows nothing yet.
    assert found == pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(errors.AdapterError, match="pass make_critic"):
        specops_torch.neural_discriminator_loss(images[:, 0], images[:, 0], steps=1)
    with pytest.raises(errors.AdapterError, match="no samples"):
        specops_torch.neural_discriminator_loss(images[:0], images)
    with pytest.raises(errors.AdapterError, match="one number for each"):
        specops_torch.neural_discriminator_loss(
            samples(4, 0.0), samples(4, 0.0), make_critic=lambda: nn.Linear(2, 3), steps=1
        )
    with pytest.raises(ValueError, match="steps"):
        specops_torch.neural_discriminator_loss(images, images, steps=0)


def test_intra_class_fid_is_the_mean_over_the_classes() -> None:
    pytest.importorskip("torchmetrics")
    images = torch.randn(120, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    real = {"cat": images[:30].split(16), 5: [images[30:60]]}
    fake = {5: [0.5 * images[60:90] + 0.2], "cat": iter(images[90:].split(10))}
    expected = {
        "cat": specops_torch.frechet_inception_distance(real["cat"], [images[90:]], extractor),
        5: specops_torch.frechet_inception_distance(real[5], fake[5], extractor),
    }
    found = specops_torch.intra_class_fid(real, fake, extractor)
    assert found.classes == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(list(expected.values())))
    assert expected["cat"] != pytest.approx(expected[5])
    with pytest.raises(errors.AdapterError, match="there are no classes"):
        specops_torch.intra_class_fid({}, {}, extractor)
    with pytest.raises(errors.AdapterError, match=r"same classes of both, missing: 'cat', 5"):
        specops_torch.intra_class_fid({"cat": [images]}, {5: [images]}, extractor)
    with pytest.raises(errors.AdapterError, match=r"class 5: .*two images"):
        specops_torch.intra_class_fid({5: [images[:1]]}, {5: [images]}, extractor)
