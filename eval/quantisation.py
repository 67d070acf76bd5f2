"""What quantising costs the teacher: its quantised copy against itself in full precision.

The quantised copy stands where the student stands elsewhere: the same questions, the same answers, the
same benchmarks. Full precision is the dtype the teacher is loaded in, without quantisation.

Memory: one of the two is often the pair's own teacher, and then only the other is loaded besides. What
was measured before comes from the store and loads nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval import benchmarks
from eval.fidelity import Measure
from eval.footprint import footprint
from eval.item_store import ItemStore
from eval.options import Options
from eval.prefixes import FILE, new_tokens, prefix_set, read_questions
from eval.statistics import bootstrap_difference, mcnemar, wilson
from eval.subjects import Pair, Subject
from eval.token_agreement import TOP_K
from medistill_trl.teacher import Sampling

FILES = [FILE, *benchmarks.FILES]
SETS = ("gold", "teacher")
# What the comparison calls it → what it is here.
TERMS = {
    "kl_teacher_student_nats": "kl_full_quantised_nats",
    "kl_student_teacher_nats": "kl_quantised_full_nats",
    "js_nats": "js_nats",
    **{f"overlap_at_{k}": f"overlap_at_{k}" for k in TOP_K},
    "teacher_nats": "full_nats",
    "student_nats": "quantised_nats",
}


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`."""
    if options.teacher_quantisation is not None and pair.teacher is not None:
        read_questions(pair, data, options)
        benchmarks.check(pair, data, options)


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """See `docs/evaluation.md` for the result's keys."""
    if options.teacher_quantisation is None:
        return {"skipped": "not asked for; give --teacher_quantisation nf4 or int8"}
    if pair.teacher is None:
        return {"skipped": "there is no teacher; name one with --teacher"}
    compared = copies(pair, options.teacher_quantisation)
    result = {
        "quantisation": options.teacher_quantisation,
        # Before the models are used: on some CPUs bitsandbytes repacks 4-bit weights at the first forward.
        "full": _describe(compared.teacher, store),
        "quantised": _describe(compared.student, store),
        "prefixes": prefix_costs(compared, data, options, store),
    }
    scores, items = benchmark_costs(compared, data, options, store)
    return {**result, "benchmarks": scores, "items": items}


def copies(pair: Pair, kind: str) -> Pair:
    """The teacher in full precision as the teacher, quantised as the student."""
    copy = {
        wanted: pair.teacher
        if pair.teacher.quantisation == wanted
        else pair.teacher.requantise(wanted)
        for wanted in (None, kind)
    }
    # Through the copy, so that a model that is loaded already is not loaded again.
    quantised = replace(copy[kind], name="student", load=lambda: copy[kind].model)
    return Pair(quantised, copy[None], pair.recipe)


def _describe(subject: Subject, store: ItemStore) -> dict:
    return {"fingerprint": subject.fingerprint, **footprint(subject, store)}


def prefix_costs(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """KL, agreement and likelihood on gold answers and on those of the full-precision teacher."""
    prompts = read_questions(pair, data, options).prompts
    sampling = Sampling(new_tokens(pair, options), options.prefix_temperature)
    measure = Measure.of(pair, options, store)
    found = {}
    for name in SETS:
        texts = prefix_set(name, pair, prompts, sampling, options, store)
        summary, _ = measure.on(name, prompts, texts)
        found[name] = {
            "examples": summary["examples"],
            "tokens": summary["tokens"],
            **{ours: summary["micro"][theirs] for theirs, ours in TERMS.items()},
        }
    return found


def benchmark_costs(
    pair: Pair, data: Path, options: Options, store: ItemStore
) -> tuple[dict, list[dict]]:
    """Each benchmark's accuracy in both precisions, their difference and the answers that changed."""
    once = replace(options, option_shuffles=0)
    items = benchmarks.evaluate(pair, data, once, store)["items"]
    by_name: dict[str, dict[str, list[dict]]] = {}
    for item in items:
        of = by_name.setdefault(item["benchmark"], {"student": [], "teacher": []})
        of[item["subject"]].append(item)
    scores = {
        name: compare(rows["teacher"], rows["student"], options.seed)
        for name, rows in by_name.items()
    }
    copy = {"teacher": "full", "student": "quantised"}
    return scores, [{**item, "subject": copy[item["subject"]]} for item in items]


def compare(full: Sequence[dict], quantised: Sequence[dict], seed: int) -> dict:
    """Two precisions on the same items.

    Args:
        full: Records with `right` and `choice`.
        quantised: Those of the same items, in the same order.
    """
    right = {
        name: [row["right"] for row in rows]
        for name, rows in {"full": full, "quantised": quantised}.items()
    }
    changed = sum(a["choice"] != b["choice"] for a, b in zip(full, quantised, strict=True))
    test = mcnemar(right["full"], right["quantised"])
    difference = bootstrap_difference(right["quantised"], right["full"], seed)
    return {
        "accuracy_full": wilson(sum(right["full"]), len(full)).to_dict(),
        "accuracy_quantised": wilson(sum(right["quantised"]), len(full)).to_dict(),
        "accuracy_quantised_minus_full": difference.to_dict(),
        "only_full_right": test["only_first"],
        "only_quantised_right": test["only_second"],
        "mcnemar_p": test["p_value"],
        "choices_changed": wilson(changed, len(full)).to_dict(),
    }
