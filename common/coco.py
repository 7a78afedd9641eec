"""COCO's instances: masks from polygons and run lengths, and what results found; pycocotools' values, without it."""

import numpy as np


def mask_of(segmentation: dict | list, size: tuple[int, int]) -> np.ndarray:
    """COCO's polygons, run lengths or compressed run lengths as a mask, bool (H, W), pixel for pixel COCO's own."""
    if isinstance(segmentation, dict):
        (height, width), runs = segmentation["size"], segmentation["counts"]
        if not isinstance(runs, list):
            codes, runs = np.frombuffer(runs.encode() if isinstance(runs, str) else runs, np.uint8).astype(int) - 48, []
            for part in np.split(codes, np.flatnonzero(codes & 32 == 0) + 1)[:-1]:  # 5 bits each; the last has the sign
                value = ((part & 31) << 5 * np.arange(len(part))).sum() - ((part[-1] & 16) << 5 * len(part) - 4)
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))  # differences from the third on
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    # Edges are followed in steps of a fifth of a pixel; what lies between two crossings of a column's middle is inside.
    (height, width), crossings = size, np.zeros((len(segmentation), size[0] * size[1] + 1), int)
    for polygon, counts in zip(segmentation, crossings):
        corners = np.trunc(5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(int)
        for ends in zip(corners, np.roll(corners, -1, axis=0)):
            length = np.abs(ends[1] - ends[0])
            low, high = sorted(ends, key=lambda corner: corner[length.argmax()])  # along the longer axis
            path = np.trunc(np.linspace(low, high, length.max() + 1) + 0.5).T
            x, y = (np.minimum(path[:, 1:], path[:, :-1])[:, np.diff(path[0]) != 0] + 0.5) / 5 - 0.5
            crossed = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
            np.add.at(counts, (x * height + np.ceil(y.clip(0, height)))[crossed].astype(int), 1)
    return (crossings[:, :-1].cumsum(1) % 2 == 1).any(0).reshape(width, height).T


def matched(truth: list[dict], found: list[dict], kind: str) -> tuple[np.ndarray, ...]:
    """One category in one image: (scores (D,), answers (10, D) at IoUs 0.5 to 0.95: 1 right, 0 wrong, -1 ignored, which
    truths count (G,)). By falling score each takes the free truth of largest IoU, or is ignored if as much is crowd."""
    truth, found = truth[::-1], sorted(found, key=lambda row: -row["score"])[:100]  # of equal IoUs the last counts
    scores, crowd = np.array([row["score"] for row in found]), np.array([row.get("iscrowd", 0) for row in truth]) > 0
    answers, taken = (np.zeros((10, len(rows)), int) for rows in (found, truth))
    if not truth or not found:
        return scores, answers, ~crowd
    if kind == "bbox":
        a, b = (np.array([row["bbox"] for row in rows], float) for rows in (found, truth))  # x, y, w, h
        a = a[:, None]
        sides = np.minimum(a[..., :2] + a[..., 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[..., :2], b[:, :2])
        both, area, areas = sides.clip(0).prod(-1), a[..., 2:].prod(-1), b[:, 2:].prod(-1)
    else:
        size = found[0]["segmentation"]["size"]  # results are run lengths
        a, b = (np.float32([mask_of(row["segmentation"], size).ravel() for row in rows]) for rows in (found, truth))
        both, area, areas = (a @ b.T).astype(float), a.sum(1, float, keepdims=True), b.sum(1, float)
    ious = both / np.maximum(np.where(crowd, area, area + areas - both), np.spacing(1))
    for d, shares in enumerate(ious):
        fits = (shares >= np.linspace(0.5, 0.95, 10)[:, None].clip(max=1 - 1e-10)) & (crowd | (taken == 0))
        best = np.where(fits, shares - 2 * crowd, -9).argmax(1)  # crowds are for what nothing else fits
        new = np.flatnonzero(fits.any(1))
        answers[new, d], taken[new, best[new]] = 1 - 2 * crowd[best[new]], 1
    return scores, answers, ~crowd
