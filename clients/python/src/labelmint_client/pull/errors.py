"""The one error of pulling and verifying that is not the service's."""

from __future__ import annotations


class PullError(Exception):
    """What is wrong with a directory or an option, and what to do; its message is one line."""
