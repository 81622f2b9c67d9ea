"""Builders of the system ``baselines``."""

FORMS = {}
