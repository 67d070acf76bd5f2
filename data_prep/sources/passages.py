"""Any passages of text for MedPPL-10k: JSON lines with `text` (`id`, `pmid`), or a .txt file each."""

from data_prep.schema import Record
from data_prep.sources import PASSAGES, Hub, Source
from data_prep.sources.rows import BadRow, content_id, identity, optional_text, pubmed_id


def normalise(row: dict, split: str, facts: None) -> Record:
    passage = optional_text(row, "text")
    if not passage:
        raise BadRow("text is empty" if "text" in row else "has no text")
    return Record(
        source="passages",
        split=split,
        # Ids of collections put together clash (MedQuAD's do), so the text is part of them.
        native_id="-".join(filter(None, (identity(row, "id"), content_id(passage)))),
        question="",
        options=(),
        answer=-1,
        context=(passage,),
        pmid=pubmed_id(row),
    )


SOURCE = Source(
    name="passages",
    hub=Hub("", "", ()),
    splits=((".", "passages"),),
    roles={"passages": PASSAGES},
    normalise=normalise,
)
