"""Annotated images on disk: `synth` writes them, a person annotates them with the tool of choice, `fit` reads them.

DIRECTORY/dataset.json     seeds and truncation, and the digest of the generator that drew the images
DIRECTORY/images/SEED.png  the images; fit draws them again and compares, so that label and features belong together

Masks (`read_masks`), by the annotator, in the one format that the user names:
DIRECTORY/classes.json     [{"name": ..., "rgb": [r, g, b]}, ...], the index is the class id
  png                      DIRECTORY/masks/SEED.png: one channel or palette, pixel values are class ids
  labelme                  DIRECTORY/images/SEED.json: what labelme saves beside the image
  coco                     DIRECTORY/annotations/instances_default.json: what CVAT exports as "COCO 1.0"

Keypoints (`read_keypoints`), likewise:
DIRECTORY/keypoints.json   [{"name": ..., "rgb": [r, g, b]}, ...], the order of the keypoints
  csv                      DIRECTORY/keypoints.csv: seed,name,x,y and, if wanted, visible
  coco                     DIRECTORY/annotations/person_keypoints_default.json: CVAT's "COCO Keypoints 1.0"
"""

from labelmint.models.annotations.dataset import AnnotatedDataset
from labelmint.models.annotations.directory import check_new, image_path, write_dataset
from labelmint.models.annotations.files import sha256_of, write_json
from labelmint.models.annotations.keypoints import (
    KeypointFormat,
    read_keypoints,
    write_keypoints,
)
from labelmint.models.annotations.masks import (
    LabelClasses,
    MaskFormat,
    mask_path,
    read_masks,
    write_masks,
)

__all__ = [
    "AnnotatedDataset",
    "KeypointFormat",
    "LabelClasses",
    "MaskFormat",
    "check_new",
    "image_path",
    "mask_path",
    "read_keypoints",
    "read_masks",
    "sha256_of",
    "write_dataset",
    "write_json",
    "write_keypoints",
    "write_masks",
]
