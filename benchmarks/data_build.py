"""How long the data build takes and how much memory, on synthetic rows of realistic length:

python benchmarks/data_build.py [--rows 100000 400000] [--jobs 2] [--work FOLDER]

Makes release-like files (shares, lengths and repetition of the real datasets, no real text), runs
`python -m data_prep.build` on them, and prints seconds, rows per second and the largest memory of all its
processes together (PSS: what they share is counted once), without and with the pages of files they have
mapped, which the system takes back when it needs them.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

SHARES = {"medmcqa": 0.455, "pubmedqa": 0.5, "medqa": 0.0225, "pubhealth": 0.0225}
BENCHMARK_ROWS = {"medmcqa": 4183, "pubmedqa": 500, "medqa": 1273, "pubhealth": 1233}
UNLABELLED_SHARE = 0.15  # PubMedQA's 61,249 abstracts beside 414,000 rows
WORDS = 30_000
REPEATED = 0.01  # of the rows: word for word like an earlier one
OPENINGS = (
    "Which of the following is true about",
    "Which of the following is the most likely cause of",
    "The drug of choice for",
    "Is the use of",
    "A patient comes to the emergency department because of",
)


class Writer:
    """Texts of words drawn as natural language draws them (Zipf), behind a few common openings."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        letters = np.array(list("aeioulnrstmcpdh"))
        lengths = self.random.integers(3, 11, WORDS)
        self.words = np.array(["".join(self.random.choice(letters, n)) for n in lengths])
        weights = 1 / np.arange(3, WORDS + 3)
        self.cumulated = np.cumsum(weights / weights.sum())

    def text(self, mean: int) -> str:
        count = max(2, int(self.random.gamma(4, mean / 4)))
        drawn = np.searchsorted(self.cumulated, self.random.random(count))
        return " ".join(self.words[np.minimum(drawn, WORDS - 1)]).capitalize() + "."

    def question(self, mean: int) -> str:
        opening = OPENINGS[self.random.integers(len(OPENINGS))]
        return f"{opening} {self.text(mean)[:-1].lower()}?"

    def choices(self) -> list[str]:
        return [f"{self.text(3)[:-1]} {n}" for n in self.random.permutation(90)[:4]]


def medqa(writer: Writer, number: int) -> dict:
    options = dict(zip("ABCD", writer.choices(), strict=True))
    question = f"{writer.text(100)} {writer.question(6)}"
    return {"question": question, "options": options, "answer_idx": "ABCD"[number % 4]}


def medmcqa(writer: Writer, number: int) -> dict:
    options = dict(zip(("opa", "opb", "opc", "opd"), writer.choices(), strict=True))
    row = {"id": f"m{number}", "question": writer.question(7), **options, "cop": number % 4 + 1}
    return row | {"exp": f"Ans. {'abcd'[number % 4]}. {writer.text(60)}", "subject_name": "Anatomy"}


def pubmedqa(writer: Writer, number: int) -> dict:
    row = {"pubid": 90_000_000 + number, "QUESTION": writer.question(10)}
    row["CONTEXTS"] = [writer.text(70) for _ in range(3)]
    return row | {"LONG_ANSWER": writer.text(40), "final_decision": ("yes", "no")[number % 2]}


def pubhealth(writer: Writer, number: int) -> dict:
    row = {"claim_id": str(number), "claim": writer.text(14), "explanation": writer.text(60)}
    return row | {"main_text": writer.text(600), "label": ("true", "false", "mixture")[number % 3]}


def make(folder: Path, rows: int) -> int:
    """Write the files; returns how many rows they hold."""
    writer, total = Writer(0), 0
    makers = {"medqa": medqa, "medmcqa": medmcqa, "pubmedqa": pubmedqa, "pubhealth": pubhealth}
    names = {"pubmedqa": ("ori_pqaa", "ori_pqal"), "medmcqa": ("train", "dev")}
    for source, maker in makers.items():
        train, test = names.get(source, ("train", "test"))
        files = {train: int(rows * SHARES[source]), test: BENCHMARK_ROWS[source]}
        if source == "pubmedqa":
            files["ori_pqau"] = int(rows * UNLABELLED_SHARE)
        (folder / source).mkdir(parents=True)
        number = 0
        for name, count in files.items():
            with (folder / source / f"{name}.jsonl").open("w") as file:
                line = ""
                for _ in range(count):
                    number += 1
                    if not line or source == "pubmedqa" or writer.random.random() > REPEATED:
                        line = json.dumps(maker(writer, number)) + "\n"
                    else:
                        line = line.replace(f'"m{number - 1}"', f'"m{number}"')
                    file.write(line)
            if name == "ori_pqal":
                ids = {str(90_000_000 + n): "yes" for n in range(number - count + 1, number + 1)}
                (folder / source / "test_ground_truth.json").write_text(json.dumps(ids))
            total += count
    return total


def measure(raw_dir: Path, out: Path, jobs: int) -> tuple[float, float, float]:
    """Seconds of a build, and the largest GiB without and with mapped files."""
    command = [
        sys.executable,
        "-m",
        "data_prep.build",
        "--raw_dir",
        str(raw_dir),
        "--out",
        str(out),
    ]
    start, own, mapped = time.monotonic(), 0, 0
    with subprocess.Popen([*command, "--jobs", str(jobs)], stdout=subprocess.DEVNULL) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = [_memory(p.pid) for p in (tree, *tree.children(recursive=True))]
            own = max(own, sum(size["Pss_Anon"] for size in sizes))
            mapped = max(mapped, sum(size["Pss"] for size in sizes))
            time.sleep(1)  # reading the sizes costs the system some milliseconds a gigabyte
    if process.returncode:
        raise SystemExit(f"the build failed with {process.returncode}")
    return time.monotonic() - start, own / 2**20, mapped / 2**20


def _memory(pid: int) -> dict[str, int]:
    """Proportional sizes of a process in KiB, by the names of the kernel."""
    sizes = {"Pss": 0, "Pss_Anon": 0}
    with contextlib.suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, size = line.partition(":")
            if name in sizes:
                sizes[name] = int(size.split()[0])
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, help="where to put the files (default: a temporary folder)"
    )
    options = parser.parse_args()
    columns = ("rows of the pool", "rows read", "seconds", "rows/s", "memory, GiB", "with maps")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            total = make(Path(folder) / "raw", rows)
            seconds, own, mapped = measure(
                Path(folder) / "raw", Path(folder) / "data", options.jobs
            )
        rate = total / seconds
        cells = (
            f"{rows:,}",
            f"{total:,}",
            f"{seconds:.0f}",
            f"{rate:,.0f}",
            f"{own:.2f}",
            f"{mapped:.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
