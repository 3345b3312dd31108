"""Laws of tau: the same transform on latents and pixels, sizes that agree, and the distribution it is drawn from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_eqvae.equivariance import (
    ROTATIONS,
    SCALES,
    Tau,
    TauDistribution,
    apply_each,
    equivariance_error,
    rotation,
    scaling,
)

SCALE_MODES = ("isotropic", "anisotropic", "uniform", "uniform_anisotropic", "discrete", "none")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def draw_many(distribution: TauDistribution, size: tuple[int, int], count: int) -> list[Tau]:
    source = generator(7)
    return [distribution.draw(size, source) for _ in range(count)]


def chi_square(counts: Counter, outcomes: list) -> float:
    expected = sum(counts.values()) / len(outcomes)
    assert set(counts) <= set(outcomes)
    return sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 4, 5, 8)])
def test_four_quarter_turns_are_the_identity(shape):
    x = turned = images(*shape)
    for _ in range(4):
        turned = rotation(tuple(turned.shape[-2:]), 1).apply_to_latents(turned)
    assert torch.equal(turned, x)


@pytest.mark.parametrize("k", ROTATIONS)
def test_a_rotation_is_that_many_quarter_turns_counter_clockwise(k):
    x = images(1, 3, 4, 7)
    expected = x
    for _ in range(k):
        expected = expected.transpose(-2, -1).flip(-2)
    assert torch.equal(rotation((4, 7), k).apply_to_latents(x), expected)
    back = rotation(tuple(expected.shape[-2:]), 4 - k)
    assert torch.equal(back.apply_to_latents(expected), x)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    factor=st.sampled_from([1, 8, 16]),
    mode=st.sampled_from(SCALE_MODES),
    rotate=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sizes_of_latents_and_pixels_always_agree(height, width, factor, mode, rotate, seed):
    tau = TauDistribution(scale=mode, rotation=rotate).draw((height, width), generator(seed))
    latents = tau.apply_to_latents(torch.zeros(1, 1, height, width))
    pixels = tau.apply_to_pixels(torch.zeros(1, 1, height * factor, width * factor), factor)
    assert pixels.shape[-2:] == (latents.shape[-2] * factor, latents.shape[-1] * factor)
    resized = tau.resize_pixels(torch.zeros(1, 1, height * factor, width * factor), factor)
    assert tuple(resized.shape[-2:]) == (tau.latent_size[0] * factor, tau.latent_size[1] * factor)
    assert 1 <= tau.latent_size[0] <= height and 1 <= tau.latent_size[1] <= width


def test_scaling_comes_before_rotating():
    """An anisotropic scaling and a quarter turn do not commute: the swapped order has another size and content."""
    x = images(1, 4, 8, 8)
    tau = Tau((2, 6), quarter_turns=1)
    resized = F.interpolate(x, size=(2, 6), mode="bilinear", align_corners=False)
    assert torch.equal(tau.apply_to_latents(x), torch.rot90(resized, 1, (-2, -1)))
    swapped = F.interpolate(torch.rot90(x, 1, (-2, -1)), size=(2, 6), mode="bilinear", align_corners=False)
    assert tau.apply_to_latents(x).shape != swapped.shape
    half_turn = Tau((2, 6), quarter_turns=2).apply_to_latents(x)
    assert torch.equal(half_turn, torch.rot90(resized, 2, (-2, -1)))


def test_pixels_are_treated_as_latents_are():
    """tau commutes with cutting a image into equal cells when the image is constant per cell and s divides it."""
    x = images(2, 3, 4, 4)
    tau = Tau((4, 4), quarter_turns=3)
    upsampled = x.repeat_interleave(8, -1).repeat_interleave(8, -2)
    expected = tau.apply_to_latents(x).repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert torch.equal(tau.apply_to_pixels(upsampled, 8), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_is_torchs_with_corners_not_aligned(interpolation, antialias):
    x = images(2, 4, 16, 12)
    tau = Tau((7, 5), interpolation=interpolation, antialias=antialias)
    expected = F.interpolate(x, size=(7, 5), mode=interpolation, align_corners=False, antialias=antialias)
    assert torch.equal(tau.apply_to_latents(x), expected)
    assert not torch.allclose(expected, F.interpolate(x, (7, 5), mode=interpolation, align_corners=True))


def test_defaults_are_the_released_code():
    assert (Tau((2, 2)).interpolation, Tau((2, 2)).antialias) == ("bilinear", False)
    assert TauDistribution() == TauDistribution("isotropic", True, "bilinear", False)
    tau = TauDistribution(interpolation="bicubic", antialias=True).draw((8, 8), generator())
    assert (tau.interpolation, tau.antialias) == ("bicubic", True)


def test_half_size_bilinear_is_the_mean_of_two_by_two():
    x = images(1, 1, 6, 8)
    assert torch.allclose(scaling((6, 8), 0.5).apply_to_latents(x), F.avg_pool2d(x, 2), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_the_identity_is_free(dtype):
    x = images(1, 4, 8, 8, dtype=torch.float32).to(dtype)
    assert Tau((4, 4), 1).apply_to_latents(x).dtype == dtype
    assert Tau((8, 8)).apply_to_latents(x) is x
    assert Tau((8, 8)).apply_to_pixels(x, 1) is x


@pytest.mark.parametrize("side", [32, 16, 9])
def test_isotropic_scales_are_uniform_on_the_grid_of_the_latent_side(side):
    grid = list(range(side // 4, side))
    taus = draw_many(TauDistribution("isotropic"), (side, side), 6000)
    assert all(tau.latent_size[0] == tau.latent_size[1] for tau in taus)
    counts = Counter(tau.latent_size[0] for tau in taus)
    # mean n - 1 and standard deviation sqrt(2 (n - 1)) for n outcomes; five of them.
    assert chi_square(counts, grid) < len(grid) + 5 * (2 * len(grid)) ** 0.5
    turns = Counter(tau.quarter_turns for tau in taus)
    assert chi_square(turns, list(ROTATIONS)) < 14.0


def test_anisotropic_sides_are_uniform_and_independent():
    taus = draw_many(TauDistribution("anisotropic", rotation=False), (8, 8), 8000)
    pairs = [(h, w) for h in range(2, 8) for w in range(2, 8)]
    assert chi_square(Counter(tau.latent_size for tau in taus), pairs) < 36 + 5 * 72**0.5


def test_uniform_and_discrete_scales():
    sides = [tau.latent_size[0] for tau in draw_many(TauDistribution("uniform"), (1000, 1000), 4000)]
    assert 250 <= min(sides) < 260 and 990 < max(sides) <= 1000
    assert sum(sides) / len(sides) == pytest.approx(625, abs=4 * 216.5 / 4000**0.5)
    taus = draw_many(TauDistribution("discrete"), (32, 16), 3000)
    assert chi_square(Counter(tau.latent_size for tau in taus), [(8, 4), (16, 8), (24, 12)]) < 14.0


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (2, 2), (3, 5), (16, 24)], ids=str)
@pytest.mark.parametrize("scale", [mode for mode in SCALE_MODES if mode != "none"])
def test_a_scaling_is_never_the_identity(scale, size):
    for tau in draw_many(TauDistribution(scale, rotation=False), size, 600):
        assert tau.latent_size[0] < size[0] and tau.latent_size[1] < size[1]


def test_continuous_anisotropic_scales_are_uniform_and_independent():
    taus = draw_many(TauDistribution("uniform_anisotropic", rotation=False), (1000, 400), 4000)
    heights, widths = (torch.tensor([tau.latent_size[axis] for tau in taus], dtype=torch.float64) for axis in (0, 1))
    for sides, full in ((heights, 1000), (widths, 400)):
        assert full / 4 <= sides.min() < 0.26 * full and 0.99 * full < sides.max() < full
        assert sides.mean() == pytest.approx(0.625 * full, abs=4 * 0.2165 * full / 4000**0.5)
    assert abs(torch.corrcoef(torch.stack([heights, widths]))[0, 1]) < 0.06


def test_turns_and_mirrors_are_the_symmetries_of_a_square_or_a_rectangle():
    """Seven and three different ways to see one image, none of them the image itself, each as likely."""
    x = torch.arange(12.0).view(1, 1, 3, 4)
    for rotate, count in ((True, 7), (False, 3)):
        distribution = TauDistribution("none", rotation=rotate, flip=True)
        seen = Counter((tau.quarter_turns, tau.flip) for tau in draw_many(distribution, (3, 4), 1000 * count))
        assert chi_square(seen, list(distribution.turns)) < count + 5 * (2 * count) ** 0.5
        views = {str(Tau((3, 4), turns, flip=flip).apply_to_latents(x).tolist()) for turns, flip in seen}
        assert len(views) == count and str(x.tolist()) not in views
    # Mirroring comes after rotating.
    assert torch.equal(Tau((3, 4), 1, flip=True).apply_to_latents(x), torch.rot90(x, 1, (-2, -1)).flip(-1))
    assert torch.equal(Tau((3, 4), 2, flip=True).apply_to_latents(x), x.flip(-2))


def test_a_window_is_cut_at_whole_cells_before_scaling():
    x = images(2, 3, 6, 8)
    pixels = x.repeat_interleave(8, -1).repeat_interleave(8, -2)
    tau = Tau((3, 4), quarter_turns=1, window=(1, 2, 3, 4))
    cut = x[..., 1:4, 2:6]
    assert torch.equal(tau.apply_to_latents(x), torch.rot90(cut, 1, (-2, -1)))
    expected = torch.rot90(cut, 1, (-2, -1)).repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert torch.equal(tau.apply_to_pixels(pixels, 8), expected)
    half = Tau((1, 2), window=(2, 0, 2, 4)).apply_to_latents(x)
    assert torch.allclose(half, F.avg_pool2d(x[..., 2:4, :4], 2), atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(2, 40), width=st.integers(2, 40), mode=st.sampled_from(SCALE_MODES), seed=st.integers(0, 2**31)
)
def test_windows_lie_inside_and_sizes_agree(height, width, mode, seed):
    tau = TauDistribution(mode, flip=True, crop=1.0).draw((height, width), generator(seed))
    latents = tau.apply_to_latents(torch.zeros(1, 1, height, width))
    pixels = tau.apply_to_pixels(torch.zeros(1, 1, height * 4, width * 4), 4)
    assert pixels.shape[-2:] == (latents.shape[-2] * 4, latents.shape[-1] * 4)
    if tau.window is not None:
        top, left, cut_height, cut_width = tau.window
        assert 0 <= top <= height - cut_height and 0 <= left <= width - cut_width
        assert 2 <= cut_height < height and 2 <= cut_width < width
        assert cut_height >= height // 2 and cut_width >= width // 2


def test_every_place_of_a_window_is_as_likely_and_its_share_is_kept():
    taus = draw_many(TauDistribution("none", rotation=False, crop=0.25), (4, 4), 8000)
    windows = [tau.window for tau in taus if tau.window is not None]
    assert abs(len(windows) - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5
    places = Counter(window[:2] for window in windows if window[2:] == (2, 2))
    assert chi_square(places, [(top, left) for top in range(3) for left in range(3)]) < 9 + 5 * 18**0.5


def test_each_image_by_its_own_tau():
    x = images(3, 4, 6, 6)
    taus = [Tau((3, 3), turns, flip=flip, window=(0, 0, 6, 6)) for turns, flip in ((0, False), (1, True), (3, False))]
    together = apply_each(taus, x)
    for index, tau in enumerate(taus):
        assert torch.equal(together[index : index + 1], tau.apply_to_latents(x[index : index + 1]))
    big = x.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.equal(apply_each(taus, big, 4)[1:2], taus[1].apply_to_pixels(big[1:2], 4))


def test_rectangular_scaling_keeps_the_shape_up_to_whole_cells():
    for tau in draw_many(TauDistribution("isotropic"), (16, 24), 200):
        height, width = tau.latent_size
        assert abs(width - 1.5 * height) <= 0.5


@pytest.mark.parametrize("scale", SCALE_MODES)
@pytest.mark.parametrize("rotate", [True, False])
def test_every_combination_is_expressible_alone(scale, rotate):
    taus = draw_many(TauDistribution(scale, rotation=rotate), (16, 16), 60)
    assert {tau.quarter_turns for tau in taus} == ({1, 2, 3} if rotate else {0})
    assert ({tau.latent_size for tau in taus} == {(16, 16)}) == (scale == "none")


@pytest.mark.parametrize("scale", SCALE_MODES)
def test_the_same_seed_gives_the_same_tau_and_takes_as_many_numbers_in_every_mode(scale):
    first, second = generator(3), generator(3)
    assert TauDistribution(scale).draw((32, 32), first) == TauDistribution(scale).draw((32, 32), second)
    reference = generator(3)
    TauDistribution("none", rotation=False).draw((32, 32), reference)
    assert torch.equal(first.get_state(), reference.get_state())


def test_measuring_transforms():
    assert [rotation((4, 6), k).quarter_turns for k in ROTATIONS] == [1, 2, 3]
    assert [scaling((32, 16), s).latent_size for s in SCALES] == [(8, 4), (16, 8), (24, 12)]


def test_equivariance_error_is_relative_and_per_image():
    reference = images(3, 4, 5, 5)
    assert torch.equal(equivariance_error(reference, reference), torch.zeros(3, dtype=torch.float64))
    factors = torch.tensor([1.1, 2.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    error = equivariance_error(reference, factors * reference)
    assert torch.allclose(error, torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64))
    assert equivariance_error(reference.bfloat16(), reference.bfloat16()).dtype == torch.float32


def test_the_centred_error_does_not_see_an_offset_of_the_latents():
    reference, transformed = images(2, 4, 5, 5), images(2, 4, 5, 5, seed=1)
    offset = torch.tensor([10.0, -3.0, 0.5, 7.0], dtype=torch.float64).view(1, 4, 1, 1)
    plain = equivariance_error(reference, transformed)
    centred = equivariance_error(reference, transformed, centred=True)
    assert torch.allclose(equivariance_error(reference + offset, transformed + offset, centred=True), centred)
    assert (equivariance_error(reference + offset, transformed + offset) < 0.2 * plain).all()
    assert (centred >= plain).all()


def test_a_constant_image_has_a_finite_error():
    constant = torch.ones(1, 2, 3, 3)
    assert equivariance_error(constant, constant, centred=True).item() == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TauDistribution("diagonal"), "scale must be one of isotropic"),
        (lambda: TauDistribution(interpolation="nearest"), "interpolation must be one of bilinear, bicubic"),
        (lambda: Tau((4, 4), interpolation="area"), "interpolation must be one of"),
        (lambda: Tau((4, 4), quarter_turns=4), "quarter_turns must be 0, 1, 2 or 3; got 4"),
        (lambda: Tau((0, 4)), "at least one cell"),
        (lambda: TauDistribution().draw((1, 8), generator()), "at least 2 cells"),
        (lambda: scaling((4, 4), 1.5), r"scale must lie in \(0, 1\]"),
        (lambda: Tau((2, 2)).apply_to_latents(torch.zeros(4, 8, 8)), "height, width"),
        (lambda: Tau((2, 2)).apply_to_pixels(torch.zeros(1, 3, 8, 8), 0), "downsampling_factor"),
        (lambda: equivariance_error(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3)), "one shape"),
    ],
)
def test_bad_arguments_are_one_readable_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
