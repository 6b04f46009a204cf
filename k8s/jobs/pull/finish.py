"""Writes the manifest of a data set that many pods pulled, once all their parts are there.

Rules of this file:
- It needs Python and nothing else. Every pod runs it after its own part was verified; the last one finds all marks.
- What is written depends on the parts alone: two pods that are last at once write the same bytes.
- Files are written aside and renamed.
"""

import hashlib
import json
import os
import sys
from pathlib import Path


def finish(directory: Path, shard_index: int, shard_count: int) -> str:
    """Mark part `shard_index` as verified and, if all are, write `manifest.json`; returns what was done.

    Raises SystemExit where the parts do not belong together.
    """
    (directory / f"part-{shard_index}.verified").touch()
    missing = [k for k in range(shard_count) if not (directory / f"part-{k}.verified").exists()]
    if missing:
        return f"part {shard_index} is verified, {len(missing)} of {shard_count} are not: a later pod ends the data set"
    counted = ("sample_count", "accepted_count", "rejected_count")
    parts, heads = [], []
    for index in range(shard_count):
        name = f"part-{index}/manifest.json"
        content = (directory / name).read_bytes()
        manifest = json.loads(content)
        request = manifest["request"]
        if (request.pop("shard_index"), request["shard_count"]) != (index, shard_count):
            raise SystemExit(f"{name} is not shard {index} of {shard_count}: pull into an empty volume")
        heads.append({"model": manifest["model"], "request": request})
        counts = {key: manifest[key] for key in counted}
        parts.append({"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **counts})
        if heads[index] != heads[0]:
            raise SystemExit(f"{name} was pulled from another model or with other options than part 0: pull it again")
    whole = {**heads[0], **{key: sum(part[key] for part in parts) for key in counted}, "parts": parts}
    aside = directory / f"manifest.json.{shard_index}"
    aside.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    os.replace(aside, directory / "manifest.json")
    return f"the data set is complete: {whole['sample_count']} samples in {shard_count} parts"


if __name__ == "__main__":
    print(finish(Path(sys.argv[1]), int(os.environ["SHARD_INDEX"]), int(os.environ["SHARD_COUNT"])))
