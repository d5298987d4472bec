"""Tasks that turn TSVs into the files of COCO and EvalAI, and back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from git_model.errors import EXIT_TOO_MANY_BAD, UserError


def convert_tsv_to_vqa_json(
    *,
    predict_file: str,
    out_json: str,
    question_file: str | None = None,
    fill_missing: bool = False,
    normalise: bool = False,
) -> dict[str, Any]:
    """Write EvalAI's VQA file: one JSON array; with the question file every id exactly once, in its order.

    `fill_missing` answers the questions that have no prediction with ""; `normalise` writes answers as the official
    scoring compares them.
    """
    from git_model.datasets.annotations import read_answers, read_questions
    from git_model.datasets.files import refuse_overwriting, write_all
    from git_model.datasets.records import json_cell
    from git_model.metrics.vqa import normalise_answer

    refuse_overwriting(out_json, predict_file, question_file)
    answers, failed = read_answers(predict_file)
    by_id = dict(answers)
    if len(by_id) < len(answers):
        repeated = sorted(key for key, times in Counter(key for key, _ in answers).items() if times > 1)
        raise UserError(f"'{predict_file}' answers {len(repeated)} questions more than once (e.g. {repeated[:5]})")
    ids, filled = [key for key, _ in answers], 0
    if question_file is not None:
        wanted = [question["question_id"] for question in read_questions(question_file)]
        if len(set(wanted)) < len(wanted):
            raise UserError(f"'{question_file}' repeats {len(wanted) - len(set(wanted))} question ids")
        foreign = sorted(by_id.keys() - set(wanted))
        if foreign:
            raise UserError(
                f"{len(foreign)} answers in '{predict_file}' are to questions that '{question_file}' "
                f"does not have (e.g. {foreign[:5]})"
            )
        missing = [key for key in wanted if key not in by_id or key in failed]  # an error record is no answer
        if missing and not fill_missing:
            raise UserError(
                f"{len(missing)} of {len(wanted)} questions have no answer (e.g. {missing[:5]}); "
                "fill_missing: true answers them with ''",
                EXIT_TOO_MANY_BAD,
            )
        ids, filled = wanted, len(missing)
    elif fill_missing:
        raise UserError("fill_missing needs question_file: which ids are missing?")
    said = {key: normalise_answer(text) if normalise else text for key, text in by_id.items()}
    rows = [{"question_id": key, "answer": said.get(key, "")} for key in ids]
    Path(out_json).parent.mkdir(parents=True, exist_ok=True)
    write_all([(Path(out_json), [json_cell(rows).encode()])])
    return {"out_json": out_json, "questions": len(rows), "filled": filled, "failed": len(failed)}


def convert_tsv_to_coco_format(
    *, res_file: str, outfile: str | None = None, kind: Literal["auto", "results", "ground_truth"] = "auto"
) -> dict[str, Any]:
    """Write COCO's JSON of a caption TSV; 'auto' takes one caption a key for results, several for ground truth."""
    from git_model.datasets.annotations import coco_ground_truth, coco_results, read_references, read_results
    from git_model.datasets.files import refuse_overwriting, write_all

    references = read_references(_tsv(res_file))
    single = kind == "results" or (kind == "auto" and all(len(captions) == 1 for captions in references.values()))
    if single:
        references = {key: [caption] for key, caption in read_results(res_file).items()}  # refuses several
    text = coco_results({k: c[0] for k, c in references.items()}) if single else coco_ground_truth(references)
    out = Path(outfile) if outfile else Path(res_file).with_name(Path(res_file).stem + "_coco_format.json")
    refuse_overwriting(out, res_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_all([(out, [text.encode()])])
    return {"outfile": str(out), "kind": "results" if single else "ground_truth", "images": len(references)}


def convert_coco_to_tsv_format(*, coco_file: str, outfile: str) -> dict[str, Any]:
    """Write a caption TSV of COCO's JSON, results or ground truth; the inverse of convert_tsv_to_coco_format."""
    from git_model.datasets.annotations import read_json, read_references, read_results
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.records import json_cell, write_tsv

    refuse_overwriting(_tsv(outfile), coco_file)
    results = isinstance(read_json(coco_file), list)
    references = {k: [c] for k, c in read_results(coco_file).items()} if results else read_references(coco_file)
    Path(outfile).parent.mkdir(parents=True, exist_ok=True)
    rows = ((str(key), json_cell([{"caption": c} for c in captions])) for key, captions in references.items())
    return {"outfile": outfile, "kind": "results" if results else "ground_truth", "images": write_tsv(outfile, rows)}


def _tsv(path: str) -> str:
    if not path.endswith(".tsv"):
        raise UserError(f"'{path}' is no TSV; its name must end in .tsv")
    return path
