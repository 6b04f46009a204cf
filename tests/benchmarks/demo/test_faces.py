"""The renderer: exact, pure, continuous, and separable into geometry and appearance."""

import math

import pytest
import torch
import torch.nn.functional as F
from demo import faces
from demo.annotate import compiled_renderer, render_seed
from demo.faces import scene, shapes
from demo.faces.renderer import owners

pytestmark = pytest.mark.torch

COUNT = 24
GLASSES, MASCULINE, HAT, EARRING, FRINGE, TIED, BALD, CURL, LONG, LIDS = 26, 6, 27, 28, 12, 14, 11, 9, 8, 16
LIGHT_X = 32 + 21


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, faces.Z_DIM, generator=torch.Generator().manual_seed(seed))


def set_(z: torch.Tensor, values: dict[int, float]) -> torch.Tensor:
    """Set coordinates of the geometry. The last coordinate of the appearance keeps the mean square, so the other
    coordinates of the geometry keep their meaning."""
    z = z * z.square().mean(dim=1, keepdim=True).rsqrt()
    z[:, faces.GEOMETRY_DIMS :] = 0.0
    for index, value in values.items():
        z[:, index] = value
    left = faces.Z_DIM - z.square().sum(dim=1)
    assert float(left.min()) > 0.0
    z[:, -1] = left.sqrt()
    return z


PLAIN = {
    GLASSES: 0.0,
    MASCULINE: -0.3,
    HAT: 0.0,
    EARRING: 0.0,
    FRINGE: -1.0,
    TIED: 0.0,
    BALD: 0.0,
    LONG: -1.0,
    LIDS: 0.5,
}


def is_(label: torch.Tensor, *names: str) -> torch.Tensor:
    return torch.stack([label == faces.CLASS_NAMES.index(name) for name in names]).any(dim=0)


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return drawn(COUNT)


@pytest.fixture(scope="module")
def batch(z: torch.Tensor) -> faces.Faces:
    return faces.render(z)


def test_shapes_and_ranges(batch: faces.Faces) -> None:
    assert batch.image.shape == (COUNT, 3, 128, 128) and batch.image.dtype == torch.float32
    assert float(batch.image.min()) >= -1.0 and float(batch.image.max()) <= 1.0
    assert batch.label.shape == (COUNT, 128, 128) and batch.label.dtype == torch.uint8
    assert batch.keypoints.shape == (COUNT, len(faces.KEYPOINT_NAMES), 2)
    assert len(faces.CLASS_NAMES) == len(faces.PALETTE) == len(set(faces.PALETTE))


def test_a_face_does_not_depend_on_its_batch(z: torch.Tensor, batch: faces.Faces) -> None:
    alone = faces.render(z[5:6])
    assert torch.equal(alone.label[0], batch.label[5])
    torch.testing.assert_close(alone.image[0], batch.image[5], atol=1e-5, rtol=0)


def test_the_same_latent_gives_the_same_bytes(z: torch.Tensor, batch: faces.Faces) -> None:
    again = faces.render(z)
    assert all(torch.equal(getattr(again, name), getattr(batch, name)) for name in ("image", "label", "keypoints"))


def test_scale_of_the_latent_does_not_matter(z: torch.Tensor, batch: faces.Faces) -> None:
    scaled = faces.render(z * 3.0)
    assert float((scaled.label == batch.label).float().mean()) > 0.9999


def test_a_mask_is_the_majority_and_an_image_the_mean_of_a_drawing_four_times_as_large(
    z: torch.Tensor, batch: faces.Faces
) -> None:
    large = faces.render(z[:8], resolution=512, supersampling=1)
    votes = F.avg_pool2d(F.one_hot(large.label.long(), len(faces.CLASS_NAMES)).permute(0, 3, 1, 2).float(), 4)
    assert torch.equal(votes.argmax(dim=1).to(torch.uint8), batch.label[:8])  # argmax takes the first of equals
    error = (F.avg_pool2d(large.image, 4) - batch.image[:8]).abs()
    assert float(error.mean()) < 1 / 255 and float(error.flatten().quantile(0.999)) < 16 / 255
    torch.testing.assert_close((large.keypoints + 0.5) / 4 - 0.5, batch.keypoints[:8], atol=1e-4, rtol=0)


def test_fewer_subsamples_change_edges_only(z: torch.Tensor, batch: faces.Faces) -> None:
    coarse = faces.render(z, supersampling=2)
    assert float((coarse.label == batch.label).float().mean()) > 0.985
    assert float((coarse.image - batch.image).abs().mean()) < 1.5 / 255


def test_appearance_moves_nothing_and_geometry_colours_nothing(z: torch.Tensor) -> None:
    """A change of sign keeps the mean square of a latent."""
    g, a = z[:8], z[8:16]
    half = torch.ones(faces.Z_DIM)
    half[: faces.GEOMETRY_DIMS] = -1.0
    mixed = faces.render(g, a)
    other_colours = faces.render(-half * g, -a)
    assert torch.equal(other_colours.label, mixed.label) and torch.equal(other_colours.keypoints, mixed.keypoints)
    assert float((other_colours.image - mixed.image).abs().mean()) > 0.1
    assert torch.equal(faces.render(-half * g, half * a).image, mixed.image)


def test_every_coordinate_of_the_latent_is_used() -> None:
    """A coordinate without effect would be a parameter that nobody reads. Four of the faces wear all rare parts."""
    bare, style = drawn(8, seed=81), drawn(8, seed=82)
    worn = {HAT: 2.0, GLASSES: 2.0, MASCULINE: 2.0, EARRING: 2.0}
    z = torch.cat([set_(bare[:4], {}), set_(bare[4:], worn)])

    def images(index: int, value: float) -> torch.Tensor:
        changed, colours = z.clone(), style.clone()
        (changed if index < faces.GEOMETRY_DIMS else colours)[:, index] = value  # the sign keeps the mean square
        return faces.render(changed, colours, resolution=64, supersampling=2).image

    unused = [index for index in range(faces.Z_DIM) if torch.equal(images(index, -1.8), images(index, 1.8))]
    assert unused == []


def test_rare_parts_are_as_rare_as_promised() -> None:
    """A part counts where at least four of the 64x64 pixels show it."""
    count = 4000
    seen = torch.zeros(len(faces.CLASS_NAMES))
    for z in drawn(count, seed=3).split(100):
        label = faces.render(z, resolution=64, supersampling=1).label
        areas = F.one_hot(label.flatten(1).long(), len(faces.CLASS_NAMES)).sum(dim=1)  # [b,K]
        seen += (areas >= 4).sum(dim=0)
    rate = dict(zip(faces.CLASS_NAMES, (seen / count).tolist(), strict=True))
    for name, promised in {"glasses": 0.10, "beard": 0.12, "hat": 0.06, "earring": 0.04}.items():
        # Three standard errors of a proportion, and as much again for the parts' own narrow bands.
        assert abs(rate[name] - promised) < 6.0 * math.sqrt(promised * (1 - promised) / count), rate
    for name in ("background", "neck", "clothes", "skin", "nose", "lip", "eye"):
        assert rate[name] > 0.95, rate
    for name in ("hair", "ear", "brow", "iris"):
        assert rate[name] > 0.5, rate
    assert 0.2 < rate["mouth"] < 0.9, rate


@pytest.mark.parametrize("index", range(faces.Z_DIM))
def test_a_small_step_along_a_coordinate_changes_an_image_a_little(index: int) -> None:
    """From -3 to 3 standard deviations, so across the thresholds of all rare parts."""
    values = torch.linspace(-3.0, 3.0, 161)
    z = set_(drawn(1, seed=index), {}).repeat(len(values), 1)
    style = drawn(1, seed=100 + index).repeat(len(values), 1)
    if index < faces.GEOMETRY_DIMS:
        left = z[:, -1].square() + z[:, index].square() - values.square()
        z[:, index], z[:, -1] = values, left.clamp(min=0.0).sqrt()
    else:
        style[:, index] = values
    step = faces.render(z, style, resolution=32, supersampling=2).image.diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert float(step.max()) < LARGEST_STEP, float(step.max())


LARGEST_STEP = 0.03  # a hat that appeared at once would change the mean by 0.1 and more


@pytest.mark.parametrize("index, sign", [(i, 1) for i in (GLASSES, MASCULINE, HAT, EARRING, BALD, TIED)] + [(TIED, -1)])
def test_a_part_grows_from_nothing(index: int, sign: int) -> None:
    """A part that appeared at a threshold would make its whole change in one of these 121 steps."""
    values = sign * torch.linspace(0.8, 2.0, 121)
    z = torch.cat([set_(drawn(1, seed=91), PLAIN | {index: float(value)}) for value in values])
    image = faces.render(z, drawn(1, seed=92).repeat(len(z), 1), resolution=64).image
    step = image.diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert float(step.max()) < 0.2 * float(step.sum()), (float(step.max()), float(step.sum()))


def test_small_steps_in_random_directions_change_an_image_a_little() -> None:
    z = drawn(64, seed=9)
    step = 0.002 * drawn(64, seed=10)
    before = faces.render(z, resolution=64, supersampling=4).image
    change = (faces.render(z + step, resolution=64, supersampling=4).image - before).abs().mean(dim=(1, 2, 3))
    assert float(change.max()) < 0.01 and float(change.mean()) < 0.003


@pytest.mark.parametrize("coordinate, name", [(GLASSES, "glasses"), (EARRING, "earring")])
def test_a_part_that_is_put_on_changes_only_the_pixels_of_its_mask(coordinate: int, name: str) -> None:
    z, style = drawn(16, seed=21), drawn(16, seed=22)
    bare = faces.render(set_(z, PLAIN), style, supersampling=1)
    worn = faces.render(set_(z, PLAIN | {coordinate: 2.5}), style, supersampling=1)
    changed = bare.label != worn.label
    assert bool((changed == is_(worn.label, name)).all())
    assert bool((is_(worn.label, name).sum(dim=(1, 2)) > 8).all())
    assert not bool(is_(bare.label, name).any())


def test_glasses_lie_over_eyes_brows_and_nose_but_below_the_fringe() -> None:
    z, style = drawn(16, seed=21), drawn(16, seed=22)
    bare = faces.render(set_(z, PLAIN), style, supersampling=1).label
    worn = faces.render(set_(z, PLAIN | {GLASSES: 2.5}), style, supersampling=1).label
    covered = bare[is_(worn, "glasses")]
    assert all(bool(is_(covered, name).any()) for name in ("skin", "nose", "brow", "eye"))
    fringe = [layer.name for layer in shapes.LAYERS].index("front_hair")
    low = set_(z, PLAIN | {FRINGE: 2.5, GLASSES: 2.5})
    front = owners(scene.geometry(low), 128, 1)[:, 0] == fringe
    bare = owners(scene.geometry(set_(z, PLAIN | {FRINGE: 2.5})), 128, 1)[:, 0] == fringe
    assert bool(front.any()) and torch.equal(front, bare)
    assert bool(is_(faces.render(low, style, supersampling=1).label, "hair")[front].all())


def test_long_hair_covers_ears_and_earrings() -> None:
    z, style = drawn(16, seed=21), drawn(16, seed=22)
    short = PLAIN | {EARRING: 2.5, GLASSES: 2.5}
    long = short | {LONG: 2.2}
    before = faces.render(set_(z, short), style, supersampling=1).label
    after = faces.render(set_(z, long), style, supersampling=1).label
    for name in ("ear", "earring"):
        assert bool(is_(before, name).any()) and int(is_(after, name).sum()) < 0.1 * int(is_(before, name).sum()), name


def test_a_hat_is_in_front_of_hair_and_brow() -> None:
    z, style = drawn(16, seed=31), drawn(16, seed=32)
    for brim in (-2.0, 2.0):
        label = faces.render(
            set_(z, PLAIN | {HAT: 2.5, FRINGE: 2.0, CURL: 2.0, 30: brim}), style, supersampling=1
        ).label
        hat = is_(label, "hat")
        assert bool((hat.sum(dim=(1, 2)) > 1500).all())
        above, below = hat.cumsum(dim=1) > 0, hat.flip(1).cumsum(dim=1).flip(1) > 0
        assert bool(hat[above & below].all())  # nothing interrupts a hat from its top to its lower edge
    bare = faces.render(set_(z, PLAIN), style, supersampling=1).label
    worn = faces.render(set_(z, PLAIN | {HAT: 2.5}), style, supersampling=1).label
    assert int(is_(worn, "hair").sum()) < 0.6 * int(is_(bare, "hair").sum())


def test_a_beard_surrounds_the_mouth_and_covers_the_neck() -> None:
    z, style = drawn(16, seed=41), drawn(16, seed=42)
    bare = faces.render(set_(z, PLAIN | {MASCULINE: 1.0}), style, supersampling=1).label
    worn = faces.render(set_(z, PLAIN | {MASCULINE: 2.6}), style, supersampling=1).label
    assert not bool(is_(bare, "beard").any())
    covered = bare[is_(worn, "beard")]
    assert bool(is_(covered, "skin").any()) and bool(is_(covered, "neck").any())
    lips = is_(worn, "lip", "mouth").sum(dim=(1, 2)).float()
    assert bool((lips > 0.7 * is_(bare, "lip", "mouth").sum(dim=(1, 2))).all())


def at(label: torch.Tensor, point: torch.Tensor) -> str:
    x, y = (round(float(value)) for value in point)
    return faces.CLASS_NAMES[int(label[y, x])]


def test_open_eyes_contain_their_keypoints_and_noses_theirs() -> None:
    face = faces.render(set_(drawn(16, seed=51), PLAIN))
    for label, points in zip(face.label, face.keypoints, strict=True):
        assert at(label, points[0]) in ("eye", "iris") and at(label, points[1]) in ("eye", "iris")
        assert at(label, points[2]) == "nose"


def test_closed_eyes_show_no_iris_and_keep_their_lashes() -> None:
    z = drawn(16, seed=51)
    closed = faces.render(set_(z, PLAIN | {LIDS: -2.5})).label
    opened = faces.render(set_(z, PLAIN)).label
    assert not bool(is_(closed, "iris").any()) and bool(is_(opened, "iris").any(dim=-1).any(dim=-1).all())
    assert bool(is_(closed, "eye").any(dim=-1).any(dim=-1).all())


def test_lips_end_at_the_corners_of_the_mouth() -> None:
    """Four times as large, because lips that are thinner than half a pixel have no mask at 128 x 128."""
    face = faces.render(set_(drawn(16, seed=61), PLAIN), resolution=512, supersampling=1)
    for label, points in zip(face.label, face.keypoints, strict=True):
        left, right = points[3], points[4]
        y, x = is_(label, "lip", "mouth").nonzero(as_tuple=True)
        pixels = torch.stack([x, y], dim=1).float()  # [n,2]
        along = (right - left) / (right - left).norm()
        place = (pixels - left) @ along
        assert abs(float(place.min())) < 2.5, float(place.min())
        assert abs(float(place.max() - (right - left).norm())) < 2.5
        for corner in (left, right):
            assert float((pixels - corner).norm(dim=1).min()) < 2.5


def test_ears_end_at_their_tips() -> None:
    z = set_(drawn(16, seed=61), PLAIN)
    g = scene.geometry(z)
    inside = shapes.ear(g, shapes.points(g, 128, 1))[:, 0] < 0.0  # [B,R,R], also where hair or the face covers it
    for ears, points in zip(inside, faces.render(z).keypoints, strict=True):
        y, x = ears.nonzero(as_tuple=True)
        pixels = torch.stack([x, y], dim=1).float()  # [n,2]
        middle = (points[5] + points[6])[0] / 2
        for tip, side in ((points[5], x < middle), (points[6], x > middle)):
            top = pixels[side][y[side].argmin()]
            assert float((top - tip).norm()) < 3.0, (top, tip)
            assert float(pixels[side][:, 1].min() - tip[1]) > -1.0


def test_the_side_towards_the_light_is_brighter() -> None:
    z = set_(drawn(8, seed=63), PLAIN)
    style = drawn(8, seed=64)
    towards = {}
    for light in (-2.0, 2.0):
        style[:, LIGHT_X] = light
        direction = scene.appearance(style).light_x.flatten()
        face = faces.render(z, style)
        skin, grey = is_(face.label, "skin"), face.image.mean(dim=1)
        right = torch.arange(128) > face.keypoints[:, 2, 0].view(-1, 1, 1)  # of the tip of the nose
        difference = [float(g[s & r].mean() - g[s & ~r].mean()) for g, s, r in zip(grey, skin, right, strict=True)]
        assert bool((direction.sign() == math.copysign(1.0, light)).all())
        towards[light] = sum(difference) / len(difference)
    assert towards[2.0] > 0.03 and towards[-2.0] < -0.03, towards


def test_the_compiled_renderer_draws_the_same_faces() -> None:
    """Figures are measured against the compiled renderer, and the interpreters are fitted to masks of this one."""
    for seed in range(4):
        exact, compiled = render_seed(seed), compiled_renderer()(seed)
        assert float((exact.label == compiled.label).float().mean()) > 0.9999
        torch.testing.assert_close(compiled.image, exact.image, atol=1e-3, rtol=0)


def test_pose_is_moderate(batch: faces.Faces) -> None:
    points = faces.render(drawn(500, seed=71), resolution=64, supersampling=1).keypoints
    nose = points[:, faces.KEYPOINT_NAMES.index("nose_tip")]
    assert float((nose - 31.5).abs().max()) < 0.25 * 64
    assert float(nose[:, 0].std()) > 0.05 * 64


def test_scene_parameters_are_finite_in_the_tails() -> None:
    for value in (-30.0, 30.0):
        z = torch.zeros(faces.Z_DIM, faces.Z_DIM).fill_diagonal_(value)
        for part in (scene.geometry(z), scene.appearance(z)):
            assert all(bool(torch.isfinite(field).all()) for field in vars(part).values())
        assert bool(torch.isfinite(faces.render(z, resolution=32).image).all())
