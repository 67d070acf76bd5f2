"""What a run came to: the held-out check on both sides of training, the final model, the record."""

import logging
from dataclasses import asdict

from accelerate import PartialState
from transformers import Trainer

from medistill_trl import run_record
from medistill_trl.hub.card import write_model_card
from medistill_trl.inputs import Loaded
from medistill_trl.out_of_memory import Changes
from medistill_trl.recipe import Recipe
from medistill_trl.run_directory import HELDOUT, RECORD, RunDirectory
from medistill_trl.setting import Setting
from medistill_trl.untrained import untrained_answers

logger = logging.getLogger(__name__)


def measure_before(setting: Setting, directory: RunDirectory, loaded: Loaded) -> dict:
    """The held-out check of the untrained student; measured once and kept over resumes."""
    name = "heldout_before.json"
    if not (directory.results / name).exists():
        sums = setting.heldout.compare(setting.student)
        before = {
            "measured": setting.heldout.summary(sums),
            "records": setting.heldout.records(sums),
            "answers": untrained_answers(setting, loaded.student),
        }
        if PartialState().is_main_process:
            directory.write_result(name, before)
        PartialState().wait_for_everyone()
    before = directory.read_result(name)
    logger.info("held out, before training: %s", describe(before["measured"]))
    return before


def describe(measured: dict) -> str:
    """A held-out measurement in one line."""
    if measured["kl_nats"] is None:
        top1 = "" if measured["top1"] is None else f", top-1 agreement {measured['top1']:.1%}"
        bits = f"{measured['bits_per_byte']:.3f} bits per byte"
        return f"CE {measured['ce_nats']:.3f} nats, {bits}{top1}"
    return (
        f"KL(T‖S) {measured['kl_nats']:.3f} nats, CE {measured['ce_nats']:.3f} nats, "
        f"top-1 agreement {measured['top1']:.1%}"
    )


def write_results(
    trainer: Trainer,
    setting: Setting,
    directory: RunDirectory,
    recipe: Recipe,
    loaded: Loaded,
    before: dict,
) -> None:
    """Final model, model card, run.json, and of the held-out check the examples and the records per prompt."""
    sums = setting.heldout.compare(setting.student)
    after = setting.heldout.summary(sums)
    answers = setting.heldout.examples(
        setting.student, setting.arguments.teacher.teacher_max_new_tokens
    )
    trainer.save_model(str(directory.final_model))
    record = run_record.build(
        recipe=recipe.resolved(),
        steps=trainer.state.global_step,
        totals=setting.totals.summed(),
        stored=setting.used.values(),
        heldout={"before": before["measured"], "after": after},
        data={"files": [asdict(report) for report in loaded.reports]},
        models={"teacher": setting.teacher.identity, "student": loaded.student.fingerprint},
        log_history=trainer.state.log_history,
        out_of_memory=Changes.of(directory).history,
    )
    logger.info("held out, after training:  %s", describe(after))
    if not PartialState().is_main_process:
        return
    # It pickles every training argument, and unpickling it would run code.
    (directory.final_model / "training_args.bin").unlink(missing_ok=True)
    directory.write_result("heldout_examples.json", _examples(setting, before["answers"], answers))
    stages = {"before": before["records"], "after": setting.heldout.records(sums)}
    rows = [{"stage": stage, **row} for stage, rows in stages.items() for row in rows]
    record["items"] = {HELDOUT: directory.write_items(HELDOUT, rows)}
    directory.write_result(RECORD, record)
    write_model_card(directory, record)


def _examples(setting: Setting, before: list[str], after: list[str]) -> dict:
    check = setting.heldout
    columns = zip(check.prompts, check.completions, before, after, strict=False)
    return {
        "examples": [
            {"id": p.id, "question": p.question, "teacher": c.text, "before": b, "after": a}
            for p, c, b, a in columns
        ]
    }
