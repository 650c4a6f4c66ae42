"""Judging a model: perplexity, divergence, tasks."""
