"""What the text metrics take: pairs of texts."""

import datasets
import evaluate

INPUTS = """
Args:
    predictions (list of str): The student's texts.
    references (list of str): The teacher's texts, one each.
    per_example (bool): Also return the values of the examples.
"""


def text_metric(description: str, citation: str) -> evaluate.MetricInfo:
    """The information `evaluate` wants of a metric on pairs of texts."""
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=INPUTS,
        features=datasets.Features({"predictions": text, "references": text}),
    )


def means(values: dict[str, list[float]], per_example: bool) -> dict[str, float | list[float]]:
    """The mean of each list; with `per_example` the list itself too, as `NAME_per_example`.

    Raises:
        ValueError: there is no example.
    """
    if not all(values.values()):
        raise ValueError("there is no example: a mean over none is not defined")
    result = {name: sum(column) / len(column) for name, column in values.items()}
    if per_example:
        result |= {f"{name}_per_example": column for name, column in values.items()}
    return result
