"""`python -m eval.compare`, called from a test."""

from eval import compare as command
from eval.comparison.result import build
from eval.comparison.runs import find

KL = "fidelity.teacher.kl_teacher_student_nats"


def compare(*arguments) -> int:
    return command.main([str(word) for word in arguments])


def refused(capsys, *arguments) -> str:
    """The message of a command that is refused."""
    assert compare(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def content_of(*paths, allow_partial=False, resamples=499, **settings) -> dict:
    found = find(paths, allow_partial)
    return build(found, allow_partial=allow_partial, resamples=resamples, **settings)
