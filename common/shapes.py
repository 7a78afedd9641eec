"""The built-in data set, drawn from an index alone: 12 fine classes = 3 shapes x 4 textures, the coarse one is the
shape. Colours, place, size, rotation, background and clutter are random, hence a linear classifier on pixels fails,
while labels survive greyscale, solarisation, jitter, flips and mild blur. The object's mask is known."""

import math
import random

import numpy as np

SHAPES = ("disc", "ring", "cross")
TEXTURES = ("plain", "horizontal", "vertical", "dotted")
CLASSES = [f"{shape}_{texture}" for shape in SHAPES for texture in TEXTURES]
SIZE = 64  # pixels, both sides
TRAIN_IMAGES, VAL_IMAGES = 12_000, 1_200
ROWS, COLUMNS = (axis.astype(np.float32) for axis in np.ogrid[0:SIZE, 0:SIZE])  # (64, 1) and (1, 64)


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(image uint8 (64, 64, 3), object mask bool (64, 64), fine label): a pure function of its arguments."""
    label = index % len(CLASSES)
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    rng, y, x = random.Random(f"shapes-{split}-{index}"), ROWS, COLUMNS
    colours = [np.array([rng.uniform(0, 255) for _ in range(3)], dtype=np.float32) for _ in range(4)]
    # Background: a smooth ramp between two colours, with clutter bars in front of it.
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * (x / SIZE - 0.5) + math.sin(angle) * (y / SIZE - 0.5) + 0.71) / 1.42
    image = 85 + (colours[0] + (colours[1] - colours[0]) * ramp[..., None]) / 3  # mid-tones: the object stands out
    for _ in range(2):
        angle, offset = rng.uniform(0, math.pi), rng.uniform(-28, 28)
        bar = np.abs(math.cos(angle) * (x - 32) + math.sin(angle) * (y - 32) - offset) < rng.uniform(0.6, 1.6)
        image[bar] = [rng.uniform(0, 255) for _ in range(3)]
    # The object, in its own rotated frame (u, v) with unit = its radius.
    radius = rng.uniform(20, 26)
    cy, cx, turn = rng.uniform(29, SIZE - 29), rng.uniform(29, SIZE - 29), rng.uniform(-0.25, 0.25)
    u = (math.cos(turn) * (x - cx) + math.sin(turn) * (y - cy)) / radius
    v = (-math.sin(turn) * (x - cx) + math.cos(turn) * (y - cy)) / radius
    square, near, far = u * u + v * v, np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    masks = {"disc": square < 0.9, "ring": (square < 1.0) & (square > 0.3), "cross": (near < 0.36) & (far < 1.0)}
    mask = masks[shape]
    # Two object colours far enough apart in brightness that the texture can be seen.
    light, dark = 180 + colours[2] * 0.3, colours[3] * 0.3
    if rng.random() < 0.5:
        light, dark = dark, light
    period, phase = rng.uniform(5.0, 8.0), rng.uniform(0, 6)
    across, down = (x + phase) % period - period / 2, (y + phase) % period - period / 2
    dots = across**2 + down**2 < (0.33 * period) ** 2
    ink = {"plain": np.zeros_like(mask), "horizontal": down < 0, "vertical": across < 0, "dotted": dots}[texture]
    image[mask] = np.where(np.broadcast_to(ink, mask.shape)[mask][:, None], dark, light)
    noise = np.frombuffer(rng.randbytes(image.size), dtype=np.uint8).reshape(image.shape)
    return np.clip(image + (noise * np.float32(0.1) - np.float32(12.8)), 0, 255).astype(np.uint8), mask, label
