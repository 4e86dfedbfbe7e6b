"""The table of INT8 settings over seeds."""

import json

import pytest

from stpm.edge.latency import Percentiles
from stpm.tools import int8_table
from stpm.tools.int8_table import Row, text_of


def row(name, seed, image, p50, pixel=0.9):
    return Row(name, seed, image, pixel, None, 1.0, 0.0, Percentiles(1, p50, p50, p50, p50))


def test_losses_are_paired_by_seed():
    """Seeds differ more than settings do, so each is compared with the FP32 engine of its own seed."""
    rows = [row("FP32", 0, 0.9, 20), row("FP32", 1, 0.7, 40), row("INT8", 0, 0.88, 10), row("INT8", 1, 0.69, 10)]
    text = text_of(rows)
    assert "| INT8 | 0.7850 ± 0.1344 | 0.9000 ± 0.0000 | not defined | 1.0000 ± 0.0000 | 10.0 ± 0.0 ms |" in text
    assert "| INT8 | 0.0150 ± 0.0071 | 0.0000 ± 0.0000 | not defined | 3.00 ± 1.41 |" in text


def test_every_way_is_measured(parts, bundles, tmp_path, capsys):
    words = (
        f"--category bushing --data {parts} --teacher builtin --seeds 0 --epochs 1 --size 128x96 --qad-epochs 1 "
        f"--runs 3 --work {tmp_path / 'work'}"
    )
    assert int8_table.main([*words.split(), "--json", str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert "--epochs 1 --size 128x96 " in table["command"]
    names = [found["name"] for found in table["rows"]]
    assert names == [
        "FP32",
        "FP32 fine-tuned",
        "INT8 ptq minmax",
        "INT8 ptq percentile",
        "INT8 ptq entropy",
        "INT8 ptq mse",
        "INT8 qad mse",
    ]
    figures = {found["name"]: found["map_correlation"] for found in table["rows"]}
    assert figures["FP32"] == pytest.approx(1)
    assert len(set(figures.values())) == 7
    assert all(found["latency_ms"]["count"] == 3 for found in table["rows"])
    assert "| INT8 qad mse |" in capsys.readouterr().out
