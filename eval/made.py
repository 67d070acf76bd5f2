"""Which evaluations need not be made, since they lie there already:

    python -m eval.made < {"NAME": ["outputs/RUN", "--limit", "64"], ...}

The words are those of `python -m eval.run`; what is written is the list of names, as JSON. A study asks this of runs
that somebody else has evaluated.
"""

import json
import sys
from collections.abc import Sequence

from eval import earlier
from eval.run import describe, parse, with_verifier
from eval.subjects import load_run
from medistill_trl import console
from medistill_trl.errors import UserError
from medistill_trl.run_directory import EVALUATION, RunDirectory


def is_made(words: Sequence[str]) -> bool:
    """Whether a command of `eval.run` would measure what its result already says: all parts it asks for, with the
    same options, models, recipe and data.

    What would stop the command is for the command to say.
    """
    try:
        request = parse(list(words))
        found = RunDirectory(request.out).read_result(EVALUATION)
        pair = load_run(request.run)
        request = with_verifier(request, pair.recipe)
        now = json.loads(json.dumps(describe(request, pair)))  # as it is read back
    except UserError:
        return False
    same = found["options"] == now["options"] and not earlier.changes(found, now)
    return same and request.parts.keys() <= found["cost"].keys()  # others were not measured


def main() -> None:
    output, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the answer
    console.quiet_loading_bars()
    asked = json.load(sys.stdin)
    json.dump([name for name, words in asked.items() if is_made(words)], output)


if __name__ == "__main__":
    main()
