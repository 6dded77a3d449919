"""FGVEdit's JSON, read and checked as a whole. FGVEdit and our FGVEdit-Scenes share one schema (ours adds ``meta``)::

records = load_records("test_data.json", image_root="coco").records
records[0].queries["in_scope"], records[0].answers["in_scope"]
"""

from __future__ import annotations

import json
import os
import random
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mscke.benchmark.answers import UNSEEN, is_text
from mscke.benchmark.pictures import PictureError, check_image, inside
from mscke.benchmark.sample import ANSWERS, FIELDS, Edit, EditRecord, Query, RecordError, listed


@dataclass(frozen=True)
class LoadedRecords:
    """What a file holds, in its order."""

    records: list[EditRecord]  # the usable ones
    skipped: int  # records with an empty ``alt``
    stripped: int = 0  # fields of usable records whose blanks were put in order
    left_out: dict[int, RecordError] = field(default_factory=dict)  # place in the file -> what is wrong

    @property
    def notes(self) -> list[str]:
        """What does not stand here as it stands in the file, a line each."""
        counted = [
            (self.skipped, "records without an answer are left out"),
            (self.stripped, "questions and answers had blanks to put in order"),
            (len(self.left_out), "records with a bad field are left out (counted from 0):"),
        ]
        return [f"{count:,} {what}" for count, what in counted if count] + _listed(self.left_out)


def load_records(
    path: str | Path, image_root: str | Path, limit: int | None = None, check_images: bool = True,
    pass_over: bool = False,
) -> LoadedRecords:  # fmt: skip
    """Read an FGVEdit JSON file, checking all of it before anything is returned.

    ``image`` fields are relative to ``image_root`` and may not leave it. ``limit`` keeps the first so many usable
    records. Every record's fields are checked all the same, but only the images of records that are kept, and none
    with ``check_images=False``. Blanks and line breaks around questions and answers are taken off. Within an answer
    any run of them becomes one blank. With ``pass_over`` records with a bad field are left out, unless they are most
    of the file.

    Raises :class:`RecordError` for whatever is wrong inside the file or with an image, and
    :class:`OSError` when the file itself cannot be opened.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; give 0 or more, or None for every record")
    rows, root = _read_rows(path), os.path.realpath(image_root)
    if check_images and not os.path.isdir(root):
        raise RecordError(f"image root {root} is not a folder; give the one that image paths start from")

    records, skipped, stripped, complaints = [], 0, 0, {}
    for number, row in enumerate(rows):
        alt = row.get("alt") if isinstance(row, dict) else None
        if isinstance(alt, str) and not alt.strip():
            skipped += 1
            continue
        try:
            records.append(_record(number, row, root))
            stripped += sum(row[name] != text for name, text in _texts(row).items())
        except RecordError as complaint:
            complaints[number] = complaint
    left_out = {}
    if pass_over and len(complaints) <= len(rows) / 2:  # else it is not the records that are wrong
        left_out, complaints = complaints, left_out
    records = records[:limit]
    if check_images:
        bad = {}
        for image in {record.edit.image for record in records}:
            try:
                check_image(image)
            except PictureError as complaint:
                bad[image] = complaint
        complaints |= {r.id: f'field "image": {bad[r.edit.image]}' for r in records if r.edit.image in bad}

    if complaints:
        head = f"{path}: {len(complaints)} of {len(rows)} records cannot be used (counted from 0):"
        raise RecordError("\n".join([head, *_listed(complaints)]))
    return LoadedRecords(records, skipped, stripped, left_out)


def split_validation(
    records: Sequence[EditRecord], fraction: float = 0.1, seed: int = 0
) -> tuple[list[EditRecord], list[EditRecord]]:
    """(train, validation), each in the order given; records that share an image stay together.

    Images drawn at random go to validation until it holds ``fraction`` of the records. The order of the records does
    not change the draw. Raises :class:`ValueError` when one side would be empty.
    """
    sizes = Counter(record.edit.image for record in records)
    if not 0 < fraction < 1 or len(sizes) < 2:
        raise ValueError(f"no split of {len(sizes)} image(s) at {fraction}; give 2 or more, 0 < fraction < 1")
    rng, held, count = random.Random(seed), set(), 0
    # random() is the one draw that Python promises to keep the same across versions
    for image in sorted(sorted(sizes), key=lambda _: rng.random())[:-1]:
        if held and count + sizes[image] / 2 > fraction * len(records):
            break
        held.add(image)
        count += sizes[image]
    train = [record for record in records if record.edit.image not in held]
    return train, [record for record in records if record.edit.image in held]


def _listed(complaints: dict[int, RecordError]) -> list[str]:
    return listed([f"  record {number}, {complaints[number]}" for number in sorted(complaints)])


def _read_rows(path: str | Path) -> list:
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        rows = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        body, near = text.strip(), max(0, text.count('"src"', 0, error.pos) - 1)
        cut = body[:1] in ("", "[") and body[-1:] != "]"
        fix = "the file is cut short: fetch or generate it again" if cut else "mend it there"
        where = f"line {error.lineno}, column {error.colno}, about record {near}"
        raise RecordError(f"{path} is not JSON: {error.msg} at {where}; {fix}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, endless nesting
        raise RecordError(f"{path} is not JSON: {error}; fetch or generate it again") from None
    if not isinstance(rows, list):
        raise RecordError(f"{path}: top level is {reprlib.repr(rows)}; make it a list of records")
    return rows


class _Twice(dict):
    """An object of the JSON that gives one name two values; ``name`` says which."""

    name = ""


def _object(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) == len(pairs):
        return found
    found, names = _Twice(found), [name for name, _ in pairs]
    found.name = next(name for name in names if names.count(name) > 1)
    return found


def _record(number: int, row: object, root: str) -> EditRecord:
    """One object of the JSON, checked but for its image file; :class:`RecordError` names field and fix."""
    if not isinstance(row, dict):
        raise RecordError(f"all fields: found {reprlib.repr(row)}; make it an object with {', '.join(FIELDS)}")
    if isinstance(row, _Twice):
        raise RecordError(f'field "{row.name}": given twice; leave one')
    if missing := [f'"{name}"' for name in FIELDS if name not in row]:
        raise RecordError(f"field {', '.join(missing)}: missing; add it as text")
    for name in FIELDS:
        value, found = row[name], f'field "{name}": found {reprlib.repr(row[name])}'
        if not isinstance(value, str):
            raise RecordError(f"{found} where text is expected; write text in quotes")
        if not value.strip():
            raise RecordError(f'{found}, which is empty; fill it in, or empty "alt" to skip the record')
        if not UNSEEN.sub("", value).strip():
            raise RecordError(f"{found}, of which nobody sees anything; write text")
        if not is_text(value):
            raise RecordError(f"{found}, with half a character (lone surrogate); write it anew in UTF-8")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise RecordError(f'field "meta": found {reprlib.repr(meta)}; make it an object or leave it out')
    try:
        image = inside(root, row["image"])
    except PictureError as complaint:
        raise RecordError(f'field "image": {complaint}') from None
    text = _texts(row)
    return EditRecord(
        id=number,
        edit=Edit(image, text["src"], text["alt"]),
        rephrase=Query(text["rephrase"], image),
        in_scope=Query(text["fg_gen_q"], image),
        in_scope_answer=text["fg_gen_a"],
        out_of_scope=Query(text["fg_loc_q"], image),
        out_of_scope_answer=text["fg_loc_a"],
        locality=Query(text["loc"]),
        locality_answer=text["loc_ans"],
        meta=meta,
    )


def _texts(row: dict) -> dict[str, str]:
    """A record's questions and answers, their blanks in order."""
    texts = {name: row[name].strip() for name in FIELDS if name != "image"}
    return texts | {name: " ".join(row[name].split()) for name in ANSWERS}
