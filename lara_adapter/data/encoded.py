"""Pictures as they lie on the disk: the files of a folder, or a column of a parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import FrameError
from .episodes import require_parquet
from .sources import Source, pictures_of

__all__ = ["encoded_pictures"]


def encoded_pictures(source: Source, wanted: Sequence[int] | None = None) -> Iterator[bytes]:
    """The pictures of a folder or a parquet column as files' contents; all, or those of some rising numbers."""
    if source.kind == "pictures":
        paths = pictures_of(source.path)
        for number in range(len(paths)) if wanted is None else wanted:
            try:
                yield paths[number].read_bytes()
            except (OSError, IndexError):
                yield b""
        return
    yield from _parquet_pictures(source, wanted)


def _parquet_pictures(source: Source, wanted: Sequence[int] | None) -> Iterator[bytes]:
    pq = require_parquet()
    import pyarrow as pa

    try:
        file = pq.ParquetFile(source.path)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            mine = (
                range(rows) if wanted is None else [number - first for number in wanted if 0 <= number - first < rows]
            )
            first += rows
            if not mine:
                continue
            column = file.read_row_group(group, columns=[source.column]).column(0)
            for row in mine:
                value = column[row].as_py() or {}
                content = value.get("bytes")
                if not content and value.get("path"):
                    beside = source.path.parent / Path(value["path"]).name
                    content = beside.read_bytes() if beside.is_file() else b""
                yield content or b""
    except (pa.ArrowException, OSError, KeyError) as error:
        raise FrameError(f"{source.path} cannot be read ({type(error).__name__}: {error})") from error
