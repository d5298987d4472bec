"""Tasks that score files: captions as COCO does, answers as VQA does. No model is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from git_model.errors import UserError

if TYPE_CHECKING:
    from git_model.metrics.caption import CaptionScores
    from git_model.metrics.vqa import VqaScores

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
Metric = Literal["Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]


def evaluate_on_coco_caption(
    *,
    res_file: str,
    label_file: str,
    outfile: str | None = None,
    metrics: list[Metric] | None = None,
    image_tsv: str | None = None,
    subset: bool = False,
) -> dict[str, Any]:
    """Score captions with Bleu, METEOR, ROUGE_L, CIDEr and SPICE, offline; figures by image, and a page to look at.

    Both files are TSVs or COCO's JSON. `image_tsv` puts pictures on the page. `subset` scores only the images that
    have a result, where the label file has more. METEOR needs Java, SPICE its models: else they say why they are
    missing.
    """
    from git_model.datasets.annotations import coco_results, read_references, read_results
    from git_model.datasets.files import write_all
    from git_model.datasets.kept import cache_folder
    from git_model.datasets.records import json_cell, write_tsv
    from git_model.metrics.caption import caption_scores
    from git_model.tasks.report import write_caption_page

    results, references = read_results(res_file), read_references(label_file)
    if subset:
        known = {str(key) for key in results}
        references = {key: texts for key, texts in references.items() if str(key) in known}
    found = caption_scores(results, references, metrics or METRICS, cache=cache_folder() / "ptb")
    out = out_file(outfile, res_file, label_file, image_tsv)
    stem = out.with_suffix("")
    if res_file.endswith(".tsv"):
        coco = Path(res_file).with_name(Path(res_file).stem + "_coco_format.json")
        write_all([(coco, [coco_results(results).encode()])])
    per_image = stem.with_name(stem.name + ".per_image.tsv")
    write_tsv(per_image, ((str(key), json_cell(figures)) for key, figures in found.per_image.items()))
    page = write_caption_page(stem.with_name(stem.name + ".html"), found, results, references, image_tsv)
    written: dict[str, Any] = {
        **found.overall,
        "num_images": len(references),
        "tokenizer": found.tokenizer,
        "not_computed": found.not_computed,
    }
    write_all([(out, [json.dumps(written, indent=4).encode()])])
    _show_captions(found)
    return {**written, "outfile": str(out), "per_image": str(per_image), "page": str(page)}


def evaluate_on_vqa(
    *,
    res_file: str,
    label_file: str,
    outfile: str | None = None,
    variant: Literal["head", "pre2021", "always"] = "head",
) -> dict[str, Any]:
    """Score answers with the official VQA accuracy, overall, by answer type and by question type.

    `res_file` is a prediction TSV or EvalAI's JSON, `label_file` VQA's annotations or a question TSV with answers.
    The variants differ in when they normalise: 'head' is the official repository's, 'pre2021' LAVIS's, 'always'
    lmms-eval's and OpenFlamingo's.
    """
    from git_model.datasets.annotations import read_answers, read_vqa_annotations
    from git_model.datasets.files import write_all
    from git_model.metrics.vqa import vqa_accuracy

    answers, failed = read_answers(res_file)
    by_id = dict(answers)
    if len(by_id) < len(answers):
        raise UserError(f"'{res_file}' answers {len(answers) - len(by_id)} questions more than once")
    found = vqa_accuracy(by_id, read_vqa_annotations(label_file), variant)
    out = out_file(outfile, res_file, label_file)
    accuracy = {
        "overall": found.overall,
        "perAnswerType": found.per_answer_type,
        "perQuestionType": found.per_question_type,
    }
    written = {"accuracy": accuracy, "evalQA": found.per_question, "variant": found.variant}
    write_all([(out, [json.dumps(written, indent=1).encode()])])
    _show_answers(found)
    counts = {"questions": len(found.per_question), "failed": len(failed)}
    return {"accuracy": accuracy, "variant": found.variant, **counts, "outfile": str(out)}


def out_file(outfile: str | None, res_file: str, *inputs: str | None, ending: str = ".eval.json") -> Path:
    """Return where the scores go, beside the results unless told otherwise; raises UserError for an input's name."""
    from git_model.datasets.files import refuse_overwriting

    out = Path(outfile) if outfile else Path(res_file).with_suffix(ending)
    refuse_overwriting(out, res_file, *inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _table(rows: list[tuple[str, str]]) -> None:
    """Print a table on stderr: stdout holds the result alone."""
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        print(f"{name:<{width}}  {figure}", file=sys.stderr)


def _show_captions(found: CaptionScores) -> None:
    rows = [(name, f"{100 * figure:6.2f}") for name, figure in found.overall.items()]
    rows += [(name, f"not computed: {why}") for name, why in found.not_computed.items()]
    _table([*rows, ("tokenizer", found.tokenizer), ("images", str(len(found.per_image)))])


def _show_answers(found: VqaScores) -> None:
    rows = [("all", f"{found.overall:6.2f}")]
    rows += [(f"answer type: {name}", f"{figure:6.2f}") for name, figure in sorted(found.per_answer_type.items())]
    rows += [(f"question type: {name}", f"{figure:6.2f}") for name, figure in sorted(found.per_question_type.items())]
    _table([*rows, ("variant", found.variant), ("questions", str(len(found.per_question)))])
