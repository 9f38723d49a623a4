"""Trained models on data with known factors: measured, tabulated and compared."""
