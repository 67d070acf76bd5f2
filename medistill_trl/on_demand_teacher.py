"""A teacher that is in memory only while it is asked: for training that needs none of it."""

import gc
import logging
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Teacher

logger = logging.getLogger(__name__)


class OnDemandTeacher(Teacher):
    """A teacher whose model is loaded when it is first asked for, and let go of by `release`.

    Where the stores hold all that is asked, it is never loaded.

    Args:
        load: The model.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        form: PromptFormat,
        identity: str,
    ):
        self._load = load
        super().__init__(None, tokenizer, form, identity)

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    @model.setter
    def model(self, model: PreTrainedModel | None) -> None:
        self._model = model

    @property
    def writes_with_others(self) -> bool:
        """Never, and not worth loading it: recipes that let go of the teacher do not share out its weights."""
        return False

    def release(self) -> None:
        """Let go of the model, which is loaded again if something asks."""
        if self._model is None:
            logger.info("the teacher was not needed: the stores hold what is asked of it")
            return
        self._model = None
        gc.collect()  # a model's modules refer to each other
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        logger.info("the teacher is let go of: training needs only what is stored")
