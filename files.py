"""
Files as people have them: compressed ones read as if they were not, and the rows of tables, CSV and Parquet.
"""
import bz2
import contextlib
import csv
import gzip
import importlib
import io
import itertools
import lzma
import os
from pathlib import Path

from errors import UserError


def open_zst(path, mode):
    for library in ('compression.zstd', 'backports.zstd'):  # the zstandard package passes over a file's missing end
        with contextlib.suppress(ImportError):
            return importlib.import_module(library).open(path, mode)
    raise UserError(f'{path}: before Python 3.14 a .zst file needs backports.zstd: pip install backports.zstd')


OPENERS = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zst}


def format_of(path):
    """What opens a file, and its suffix, in small letters and without that of the compression."""
    stem, suffix = os.path.splitext(Path(path).name.lower())
    return OPENERS.get(suffix, open), os.path.splitext(stem)[1] if suffix in OPENERS else suffix


@contextlib.contextmanager
def opened(path):
    """A file, decompressed, to read bytes from; UserError for whatever a library finds wrong in it."""
    try:
        with format_of(path)[0](path, 'rb') as file:
            yield io.BufferedReader(file)
    except UserError:
        raise
    except Exception as e:  # each library has classes of its own
        if isinstance(e, OSError) and e.strerror:  # the system's, not a library's
            raise UserError(f'{path}: {e.strerror}') from e
        reason = (str(e).splitlines() or [''])[0]
        raise UserError(f'{path}: damaged, or not what its name says ({type(e).__name__}: {reason})') from e


def lines_of(path, file):
    """Yields the lines of a file as text; UserError for one that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode('utf-8-sig')
        except UnicodeDecodeError as e:
            raise UserError(f'{path}, line {number}: byte {e.start + 1} is not UTF-8: convert the file') from None


def csv_rows(path, file):
    """Yields (where, {column: text}) of a .csv or .tsv table, whose first line names its columns.

    Where that line has semicolons and no comma, they stand between the cells of a .csv: so spreadsheets write it where
    commas are for decimals.
    """
    csv.field_size_limit((1 << 31) - 1)
    lines = lines_of(path, file)
    first = next(lines, '')
    between = '\t' if format_of(path)[1] == '.tsv' else ';' if ';' in first and ',' not in first else ','
    table = csv.reader(itertools.chain([first], lines), delimiter=between, strict=True)
    try:
        names = next(table, [])
        for name in names:
            if names.count(name) > 1:
                raise csv.Error(f'two columns are called {name!r}')
        for cells in table:
            if cells and len(cells) != len(names):
                raise csv.Error(f'{len(cells)} cells, but {len(names)} names of columns')
            if cells:
                yield f'{path}, line {table.line_num}', dict(zip(names, cells, strict=True))
    except csv.Error as e:
        raise UserError(f'{path}, line {table.line_num}: {e}: mend the table') from None


def parquet_rows(path, file, column=''):
    """Yields (where, row) of a Parquet table: every column as JSON would have it, see `_as_json`; or one of that name
    as it is, where there is one."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{path}: a .parquet file needs pyarrow: pip install pyarrow') from None
    table, number = parquet.ParquetFile(file, page_checksum_verification=True), 1
    names, convert = table.schema_arrow.names, dict
    if not column:
        if len(set(names)) < len(names):
            raise UserError(f'{path}: two of its columns have one name: {", ".join(names)}')
        convert = _as_json(path, '', pyarrow.struct(list(table.schema_arrow)), pyarrow.types)
    for batch in table.iter_batches(1024, columns=[column] if column in names else None):
        yield from ((f'{path}, row {i}', convert(row)) for i, row in enumerate(batch.to_pylist(), number))
        number += batch.num_rows


def _as_json(path, name, kind, types):
    """A function that makes of a value of this Arrow type what JSON would have: a table gives every struct all keys,
    and those that it does not have are null, so they go; of a map they stay.

    UserError names the column whose type JSON has not.
    """
    kind = getattr(kind, 'storage_type', kind)  # of an extension
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        parts = {field.name: _as_json(path, f'{name}.{field.name}'.lstrip('.'), field.type, types) for field in kind}
        return lambda row: {key: parts[key](value) for key, value in row.items() if value is not None}
    if types.is_map(kind) and types.is_string(kind.key_type):
        part = _as_json(path, name, kind.item_type, types)
        return lambda pairs: {key: value if value is None else part(value) for key, value in pairs}
    if types.is_nested(kind) and not types.is_map(kind) and hasattr(kind, 'value_type'):
        part = _as_json(path, name, kind.value_type, types)
        return lambda values: [value if value is None else part(value) for value in values]
    if not any(fits(kind) for fits in (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean,
                                       types.is_integer, types.is_floating, types.is_null)):
        raise UserError(f'{path}: its column {name!r} is of type {kind}, which is none of text, numbers, lists and '
                        'objects: leave it out, or make it text')
    return lambda value: value
