"""Data sets on disk: `pull` writes the accepted samples of a walk, `verify` checks them, and `upload` sends them to S3.

Rules of this package:
- `pulling` and `verifying` make the decisions, and `directory` writes the files. Each format has its own module, listed
  in `formats`.
- The package needs the extra `pull`. `uploading` also needs the extra `s3`, so it is imported by its own name.
"""

from labelmint_client.progress import Progress
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.pulling import PullOptions, pull
from labelmint_client.pull.verifying import Report, verify

__all__ = ["Progress", "PullError", "PullOptions", "Report", "pull", "verify"]
