"""Several runs in one launch, since starting processes and importing libraries takes longer than a tiny run:

    accelerate launch --config_file … tests/engine_runs.py RUNS.json

RUNS.json is a list of runs, each the words that follow recipes/run.py.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState

from medistill_trl import console, pipeline, recipe


def main(path: str) -> None:
    console.set_up(main_process=True)
    PartialState.destroy_process_group = lambda self: None  # the next run uses it too
    for words in json.loads(Path(path).read_text()):
        print("RUN", *words, flush=True)
        pipeline.run(recipe.load(words))
        AcceleratorState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1])
