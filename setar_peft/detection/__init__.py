"""Scores, metrics, and how well a model detects."""
