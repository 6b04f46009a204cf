"""Annotated images on disk: `synth` writes the images, a person annotates them with any tool, `fit` reads them.

DIRECTORY/dataset.json     seeds, truncation_psi, and the digest of the generator that generated the images; for a
                           conditional generator the class_index of each seed, too
DIRECTORY/images/SEED.png  the images; `fit` generates them again and compares, so labels and features match

Masks (`read_masks`) come from the annotator, in the one format that the user names:
DIRECTORY/classes.json     [{"name": ..., "rgb": [r, g, b]}, ...], the index is the class id
  png                      DIRECTORY/masks/SEED.png: one channel or a palette, pixel values are class ids, 255 not drawn
  labelme                  DIRECTORY/images/SEED.json: labelme saves it next to the image
  coco                     DIRECTORY/annotations/instances_default.json: CVAT's export "COCO 1.0"

Keypoints (`read_keypoints`) come in the same way:
DIRECTORY/keypoints.json   [{"name": ..., "rgb": [r, g, b]}, ...], in the order of the keypoints
  csv                      DIRECTORY/keypoints.csv: seed,name,x,y and optionally visible
  coco                     DIRECTORY/annotations/person_keypoints_default.json: CVAT's "COCO Keypoints 1.0"
"""

from labelmint.models.annotations.directory import (
    UNDRAWN,
    AnnotatedDataset,
    check_new,
    image_path,
    names_path,
    read_drawn,
    write_dataset,
)
from labelmint.models.annotations.files import json_text, sha256_of, write_json, write_text
from labelmint.models.annotations.keypoints import KeypointFormat, read_keypoints, write_keypoints
from labelmint.models.annotations.marks import Unlabelled
from labelmint.models.annotations.masks import LabelClasses, MaskFormat, mask_path, read_masks, write_masks

__all__ = [
    "UNDRAWN",
    "AnnotatedDataset",
    "KeypointFormat",
    "LabelClasses",
    "MaskFormat",
    "Unlabelled",
    "check_new",
    "image_path",
    "json_text",
    "mask_path",
    "names_path",
    "read_drawn",
    "read_keypoints",
    "read_masks",
    "sha256_of",
    "write_dataset",
    "write_json",
    "write_keypoints",
    "write_masks",
    "write_text",
]
