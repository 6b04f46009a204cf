"""The vocabulary of the domain `faces`: sizes, part classes, keypoints and the colours that show them.

Rules of this file:
- A class keeps its id, because masks, checkpoints and figures store ids.
"""

from __future__ import annotations

Z_DIM = 64
RESOLUTION = 128
GEOMETRY_DIMS = 32  # z[:32] places the parts, z[32:] colours and lights them
VIEW = 0.8  # half the width of the image in scene units

CLASS_NAMES = (
    "background",
    "hair",
    "neck",
    "clothes",
    "skin",
    "ear",
    "brow",
    "eye",
    "iris",
    "nose",
    "mouth",
    "lip",
    "glasses",
    "beard",
    "hat",
    "earring",
)  # fmt: skip

RARE_PARTS = ("glasses", "beard", "hat", "earring")  # 4 % to 12 % of the seeds have each

# RGB in 0..255, one row per class, easy to distinguish by eye, also with the common forms of colour blindness.
PALETTE = (
    (32, 36, 44),
    (136, 51, 17),
    (238, 170, 85),
    (46, 110, 180),
    (250, 204, 160),
    (170, 119, 85),
    (70, 40, 90),
    (255, 255, 255),
    (51, 187, 187),
    (240, 228, 66),
    (68, 17, 0),
    (204, 51, 119),
    (68, 0, 187),
    (170, 187, 255),
    (153, 102, 255),
    (238, 51, 0),
)

KEYPOINT_NAMES = (
    "left_eye",
    "right_eye",
    "nose_tip",
    "left_mouth_corner",
    "right_mouth_corner",
    "left_ear_tip",
    "right_ear_tip",
)

# RGB in 0..255, one row per keypoint: warm colours on the left of the image, cold colours on the right.
KEYPOINT_PALETTE = (
    (230, 25, 75),
    (0, 130, 200),
    (255, 225, 25),
    (245, 130, 48),
    (70, 240, 240),
    (240, 50, 230),
    (60, 180, 75),
)
