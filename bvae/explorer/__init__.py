"""A model's decoder as one HTML page with sliders."""
