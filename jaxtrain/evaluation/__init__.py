"""Evaluation of a model: scores, the report, and pictures of the worst predictions."""
