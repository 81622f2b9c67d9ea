"""The command line: ``torchgraft VERB``, one file per verb.

Nothing heavy is imported before a verb runs, so ``torchgraft --help`` answers at once.
"""

from .verbs import app, main

__all__ = ["app", "main"]
