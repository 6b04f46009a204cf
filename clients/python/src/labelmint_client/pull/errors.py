"""The error of pulling and verifying that does not come from the service."""

from __future__ import annotations


class PullError(Exception):
    """A directory or an option is wrong. The message is one line: the problem, and what to do."""
