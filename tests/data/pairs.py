"""Small sets of preference pairs made on the spot."""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import noise, write_jsonl


def pair_folder(
    folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((48, 48),)
) -> Path:
    """`count` rows of `image_0`, `image_1`, whose labels are 1, 0, 1, 0, ...

    Row i has the pictures 2 i and 2 i + 1, of the (height, width) `sizes` in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        names = [f"{2 * number + k:03}.png" for k in range(2)]
        for k, name in enumerate(names):
            height, width = sizes[(2 * number + k) % len(sizes)]
            noise(height, width, 2 * number + k).save(folder / name)
        row = {"image_0": names[0], "image_1": names[1], "label_0": 1 - number % 2}
        rows.append({**row, "text": f"prompt {number}", "rater": number % 3})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder
