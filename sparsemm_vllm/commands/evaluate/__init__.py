"""Accuracy of a model under each method and budget, in the real engine."""
