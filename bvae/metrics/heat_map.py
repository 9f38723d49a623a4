"""Matrices of latents by factors, drawn side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = (64, 26)  # pixels
LEFT, TOP = 130, 52  # for the latents' and the factors' names
GAP = 24  # between two matrices
EMPTY, FULL = np.array([255, 255, 255]), np.array([8, 48, 107])  # the colours of 0 and 1


def heat_map(matrices: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw matrices [rows, columns] of 0 to 1 under their titles, white to dark blue, with their values."""
    width, height = CELL
    across = width * len(columns)
    canvas = Image.new("RGB", (LEFT + len(matrices) * (across + GAP), TOP + height * len(rows) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11)
    for i, name in enumerate(rows):
        draw.text((LEFT - 8, TOP + i * height + height / 2), name, "black", font, "rm")
    for number, (title, matrix) in enumerate(matrices.items()):
        left = LEFT + number * (across + GAP)
        draw.text((left, 14), title, "black", ImageFont.load_default(13), "lm")
        for j, name in enumerate(columns):
            draw.text((left + (j + 0.5) * width, TOP - 12), name[:11], "black", font, "mm")
            for i, value in enumerate(matrix[:, j]):
                x, y = left + j * width, TOP + i * height
                colour = (EMPTY + (FULL - EMPTY) * value).round().astype(int)
                draw.rectangle((x, y, x + width - 2, y + height - 2), tuple(colour))
                text = "white" if value > 0.5 else "black"
                draw.text((x + width / 2, y + height / 2), f"{value:.2f}", text, font, "mm")
    return canvas
