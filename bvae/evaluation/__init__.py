"""Measure trained models on data with known factors, and report the results."""
