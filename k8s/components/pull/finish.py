"""Writes the manifest of a data set that many pods pulled, once all parts are verified.

Rules of this file:
- It needs only Python. Every pod runs it after it verified its own part; the last pod finds the marks of all parts.
- The manifest depends only on the parts, because two pods may finish last at the same time: both write the same bytes.
- The manifest is written under a temporary name and renamed.
"""

import hashlib
import json
import os
import sys
from pathlib import Path


def finish(directory: Path, shard_index: int, shard_count: int) -> str:
    """Mark part `shard_index` as verified and, if all parts are, write `manifest.json`. Returns a message.

    Raises SystemExit if the parts do not belong together.
    """
    (directory / f"part-{shard_index}.verified").touch()
    missing = [k for k in range(shard_count) if not (directory / f"part-{k}.verified").exists()]
    if missing:
        return f"part {shard_index} is verified, {len(missing)} of {shard_count} are not: a later pod completes it"
    counted = ("sample_count", "accepted_count", "rejected_count", "filtered_count")
    parts, heads = [], []
    for index in range(shard_count):
        name = f"part-{index}/manifest.json"
        content = (directory / name).read_bytes()
        manifest = json.loads(content)
        request = manifest["request"]
        if (request.pop("shard_index"), request["shard_count"]) != (index, shard_count):
            raise SystemExit(f"{name} is not shard {index} of {shard_count}: name another DATA_SET")
        heads.append({"model": manifest["model"], "request": request})
        counts = {key: manifest.get(key, 0) for key in counted}  # earlier clients filtered nothing
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
