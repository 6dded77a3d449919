"""An FGVEdit-like benchmark from any visual questions in VQAv2's format, with a model as judge.

The paper's construction (§4). ``README.md`` beside this file tells its steps, the command and what is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mscke.benchmark import pictures
from mscke.benchmark.answers import normalise_answer
from mscke.benchmark.load import load_records, split_validation
from mscke.benchmark.sample import RecordError, listed
from mscke.construction.judge import Judge, JudgeError, NoReply, Request, Task, write_json
from mscke.construction.verdicts import Judged, judge_pairs, left_out
from mscke.construction.vqa import COCO_NAME, VisualQuestion, propose, read_nq, read_vqa

TEST_SHARE = 1 / 4  # 3:1, as the paper splits
REPHRASE = Task(
    "rephrase",
    """Reword the question about a picture that you are given as JSON. It must ask for exactly the same thing,
have the same short answer, and differ in its words.""",
    {"question": {"type": "string"}},
)


def build_rows(
    judge: Judge, judged: Sequence[Judged], nq: Sequence[tuple[str, str]], seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """(FGVEdit's JSON objects, one of each edit that has a hard question on either side and can be reworded;
    the edits that got no rewording, named by :func:`left_out`). No question of ``nq`` is used twice."""
    inside, outside = {}, {}
    for j in judged:
        if j.hard:
            side = inside if j.scope == "entailed" else outside
            side.setdefault(j.pair.edited, j)  # candidates come in random order: the first will do
    edited = [question for question in inside if question in outside]
    if len(edited) > len(nq):
        raise RecordError(f"{len(edited)} edits need as many NQ-open pairs, {len(nq)} are there; give more")
    requests = [Request(REPHRASE, {"question": q.question}) for q in edited]
    locality = np.random.default_rng(seed).permutation(len(nq))
    rows, replies = [], judge.ask_all(requests, "rewording")
    for q, reply, at in zip(edited, replies, locality, strict=False):
        rephrase = reply["question"].strip() if reply else ""
        if rephrase and normalise_answer(rephrase) != normalise_answer(q.question):
            rows.append(_row(inside[q], outside[q], rephrase, nq[at]))
    return rows, left_out("rewording", [inside[q].pair for q in edited], replies)


def construct(
    questions: Sequence[VisualQuestion],
    nq: Sequence[tuple[str, str]],
    images: Path,
    judge: Judge,
    out: Path,
    repeat: int = 200,
    seed: int = 0,
    **proposal,
) -> dict:
    """Write ``train_data.json``, ``test_data.json`` (3:1, no image in both) and ``report.json`` into ``out``.

    ``proposal`` goes to :func:`propose`. Returns the report: how many of everything, the judge's agreement with itself,
    and what was left out.

    Raises :class:`RecordError` before anything is asked when an image is missing, damaged or outside ``images``, and at
    the end when too little is left. Raises :class:`JudgeError` when the judge does not answer: run again to go on.
    """
    pairs = propose(questions, seed=seed, **proposal)
    used = sorted({pair.edited.image for pair in pairs})
    _check_pictures(used, images)
    judged, kappas, missing = judge_pairs(judge, pairs, images, repeat, seed)
    rows, unworded = build_rows(judge, judged, nq, seed)
    neither, missing = len(pairs) - len(judged) - len(missing), missing + unworded
    why = {w.value: sum(one["why"] == w.value for one in missing) for w in NoReply}
    write_json(out / "records.json", rows)
    records = load_records(out / "records.json", images).records  # checks every field and image
    if len({record.edit.image for record in records}) < 2:
        raise RecordError(
            f"{len(pairs)} pairs gave {len(records)} records, too few to split ({why['refused']} questions were "
            f"refused, {why['unanswered']} unanswered); give more images"
        )
    train, test = split_validation(records, TEST_SHARE, seed)
    for split, part in (("train", train), ("test", test)):
        write_json(out / f"{split}_data.json", [rows[record.id] for record in part])
    counts = Counter(f"{j.scope}, {'hard' if j.hard else 'easy'}" for j in judged)
    report = {
        "model": judge.model, "seed": seed, "images": len(used), "edits": len({p.edited for p in pairs}),
        "pairs": len(pairs), "neither": neither, **dict(sorted(counts.items())),
        "train": len(train), "test": len(test), "agreement": kappas, **why, "left_out": missing,
    }  # fmt: skip
    write_json(out / "report.json", report)
    return report


def _check_pictures(names: Sequence[str], images: Path) -> None:
    """Raise :class:`RecordError` naming those that cannot be used: a construction of many hours does not end at one."""
    root, bad = os.path.realpath(images), []
    for name in tqdm(names, "pictures", mininterval=2):
        try:
            pictures.check_image(pictures.inside(root, name))
        except pictures.PictureError as error:
            bad.append(f"  {name}: {error}")
    if bad:
        fix = "nothing was asked yet); mend them or take their questions out:"
        raise RecordError("\n".join([f"{len(bad)} of {len(names)} images cannot be used ({fix}", *listed(bad)]))


def _row(inside: Judged, outside: Judged, rephrase: str, locality: tuple[str, str]) -> dict:
    edited, related, unrelated = inside.pair.edited, inside.pair.candidate, outside.pair.candidate
    ids = {"edit": edited.id, "in_scope": related.id, "out_of_scope": unrelated.id}
    return {
        "src": edited.question, "alt": inside.pair.answer, "rephrase": rephrase, "image": edited.image,
        "fg_gen_q": related.question, "fg_gen_a": inside.answer,
        "fg_loc_q": unrelated.question, "fg_loc_a": outside.answer,
        "loc": locality[0], "loc_ans": locality[1],
        "meta": {"original": edited.answer, "question_ids": ids},
    }  # fmt: skip


def temperature(text: str) -> float | None:
    """A number from 0 on, or "none"."""
    if text.lower() == "none":
        return None
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return int(value) if value.is_integer() else value  # 0, not 0.0: verdicts are named by what was asked


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m mscke.construction.construct", description=__doc__.split("\n")[0])
    parser.add_argument("--questions", nargs="+", required=True, help="VQAv2 questions, one file a split")
    parser.add_argument("--annotations", nargs="+", required=True, help="their annotations, in the same order")
    parser.add_argument("--images", type=Path, required=True, help="folder that holds train2014/, val2014/")
    parser.add_argument("--nq", required=True, help="NQ-open, JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-name", default=COCO_NAME, help="path of an image in --images (%(default)s)")
    parser.add_argument("--model", default=Judge.model)
    parser.add_argument("--temperature", type=temperature, default=0, help="of the model; none: its own (%(default)s)")
    parser.add_argument(
        "--leave-out", type=float, default=Judge.leave_out,
        help="share of a stage's questions that may stay unanswered; above it the run ends (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=Judge.concurrency)
    parser.add_argument("--per-minute", type=float, default=Judge.per_minute, help="requests (%(default)s)")
    parser.add_argument("--limit", type=int, help="images to draw; all without it")
    parser.add_argument("--edits-per-image", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=200, help="questions asked twice, a stage (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if len(args.questions) != len(args.annotations):
        parser.error(f"{len(args.questions)} questions files and {len(args.annotations)} of annotations")
    try:
        judge = Judge(
            args.out / "verdicts", args.model, concurrency=args.concurrency, per_minute=args.per_minute,
            options={} if args.temperature is None else {"temperature": args.temperature},
            leave_out=args.leave_out,
        )  # fmt: skip
        files = zip(args.questions, args.annotations, strict=True)
        questions = [q for asked, answered in files for q in read_vqa(asked, answered, args.image_name)]
        report = construct(
            questions, read_nq(args.nq), args.images, judge, args.out, args.repeat, args.seed,
            n_images=args.limit, edits_per_image=args.edits_per_image,
        )  # fmt: skip
    except (JudgeError, RecordError, OSError, ValueError) as error:
        sys.exit(f"construct: {error}")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
