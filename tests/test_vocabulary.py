"""When are two tokenizers the same?"""

from conftest import make_tokenizer

from medistill_trl.vocabulary import shared_vocabulary


def test_equal_tokenizers_share_everything():
    assert shared_vocabulary(make_tokenizer(), make_tokenizer()) == len(make_tokenizer())


def test_rows_added_at_the_end_are_not_shared():
    """As Meditron's vocabulary extends TinyLlama's."""
    larger = make_tokenizer()
    larger.add_tokens(["<extra_1>", "<extra_2>"])
    assert shared_vocabulary(make_tokenizer(), larger) == len(make_tokenizer())
    assert shared_vocabulary(larger, make_tokenizer()) == len(make_tokenizer())


def test_ids_that_differ_where_no_probe_looks_are_another_tokenizer():
    swapped = make_tokenizer(special=("<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    assert shared_vocabulary(make_tokenizer(), swapped) is None


def test_other_merges_are_another_tokenizer():
    assert shared_vocabulary(make_tokenizer(600), make_tokenizer(450)) is None
