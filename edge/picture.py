"""Pictures for people: the part as the networks saw it, beside its heat map."""

import cv2
import numpy as np

from stpm.edge.preprocess import Image
from stpm.edge.score import Array

CAPTION_HEIGHT = 22


def heat_map(resized: Image, anomaly: Array, threshold: float) -> Image:
    """The anomaly map over the part, uint8 height×width×3: blue is 0, dark red the threshold and above."""
    level = np.clip(anomaly / threshold, 0, 1)
    colours = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_JET)
    return cv2.addWeighted(resized, 0.5, colours, 0.5, 0).astype(np.uint8)


def defect_picture(resized: Image, anomaly: Array, threshold: float, caption: str) -> Image:
    """Part with the defect outlined | heat map, under a caption: uint8 (height+22)×(2·width)×3."""
    outlined = resized.copy()
    above = (anomaly > threshold).astype(np.uint8)
    contours, _ = cv2.findContours(
        cv2.dilate(above, np.ones((5, 5), np.uint8)), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    cv2.drawContours(outlined, contours, -1, (0, 0, 255), 1)
    pair = np.hstack([outlined, heat_map(resized, anomaly, threshold)])
    strip = np.full((CAPTION_HEIGHT, pair.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, caption, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, pair])


def sheet(pictures: list[Image], columns: int) -> Image:
    """Pictures of one size in rows, the last row filled with white."""
    blank = np.full_like(pictures[0], 255)
    padded = pictures + [blank] * (-len(pictures) % columns)
    rows = [np.hstack(padded[start : start + columns]) for start in range(0, len(padded), columns)]
    return np.vstack(rows)
