"""Limits that end a hang, and nothing else: ten times what a quiet machine takes, or more.

No test depends on how fast a machine is. What has to happen within a time is given a time of its
own by the test: a slow step, a deadline that is set once the job has come far enough.
"""

from __future__ import annotations

JOB_SECONDS = 600.0
"""The longest that one job, or one command, may take, or an event to come."""

LONG_JOB_SECONDS = 1500.0
"""The same for what is several jobs in one command, or sets up an environment first."""

FOREVER_SECONDS = 3600.0
"""How long a rank sleeps that is to be ended by others: beyond every limit."""
