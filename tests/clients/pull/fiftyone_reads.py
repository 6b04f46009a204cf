"""Reads pulled COCO with FiftyOne's importer and any warning an error; prints the number of labels of each file.

It runs in FiftyOne's own environment, where nothing of ours is installed.
"""

import json
import sys
import warnings
from pathlib import Path

from fiftyone.utils.coco import COCODetectionDatasetImporter

warnings.simplefilter("error")
# NumPy 2 says this of pycocotools' decode, whatever it decodes.
warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)

counts = {}
for path in sorted(Path(sys.argv[1]).glob("*/annotations/*.json")):
    kind = "keypoints" if path.name == "keypoints.json" else "segmentations"
    importer = COCODetectionDatasetImporter(
        data_path=str(path.parent.parent / "images"), labels_path=str(path), label_types=kind, extra_attrs=True
    )
    counts[path.name] = 0
    with importer:
        for _, metadata, labels in importer:
            assert metadata.width and metadata.height
            if labels is None:
                continue  # an image of background only
            found = labels.keypoints if kind == "keypoints" else labels.detections
            assert all(label.points if kind == "keypoints" else label.mask.any() for label in found)
            counts[path.name] += len(found)
print(json.dumps(counts))
