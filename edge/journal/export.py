"""The parts of a journal as one file for other programs: CSV, or Parquet through pyarrow."""

import csv
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from stpm.edge.errors import StorageError
from stpm.edge.journal.query import PART_COLUMNS, Row
from stpm.edge.storage import new_file

Pages = Iterator[list[Row]]


def write_csv(target: Path, pages: Pages) -> None:
    """A header and one line per part; UTC text, empty where there is no value."""
    with new_file(target) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PART_COLUMNS)
        for page in pages:
            writer.writerows(page)


def write_parquet(target: Path, pages: Pages) -> None:
    """`at` is a timestamp in microseconds, UTC. StorageError without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StorageError("wanted pyarrow to write Parquet, found none: pip install 'stpm-edge[parquet]'") from error
    of_type = {
        pyarrow.int64(): "run record part box_x box_y box_width box_height area",
        pyarrow.float64(): "score threshold latency_ms",
        pyarrow.timestamp("us", "UTC"): "at",
        pyarrow.string(): "frame verdict bundle reason outcome",
    }
    types = {name: kind for kind, names in of_type.items() for name in names.split()}
    schema = pyarrow.schema([(name, types[name]) for name in PART_COLUMNS])
    with new_file(target) as partial, pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        for page in pages:
            columns = dict(zip(PART_COLUMNS, map(list, zip(*page, strict=True)), strict=True))
            columns["at"] = [datetime.fromisoformat(at) for at in columns["at"]]
            writer.write_table(pyarrow.table(columns, schema))


FORMATS: dict[str, Callable[[Path, Pages], None]] = {"csv": write_csv, "parquet": write_parquet}
