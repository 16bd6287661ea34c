"""What is embedded for a chunk: its text under its headings, as long as the embedding model reads all of it. No torch."""

from collections.abc import Sequence

from server.domain.retrieval import Chunk
from server.rag.chunking import PassageTokenizer


def write_passages(chunks: Sequence[Chunk], tokenizer: PassageTokenizer) -> list[str]:
    """Give one passage per chunk. Where the model would not read the end, outer headings are left out, and at last all of them."""
    headings = [chunk.headings for chunk in chunks]
    passages = [chunk.searched_text for chunk in chunks]
    pending = [place for place, path in enumerate(headings) if path]
    while pending:
        counts = tokenizer.count_tokens([passages[place] for place in pending])
        pending = [place for place, count in zip(pending, counts, strict=True) if count > tokenizer.max_tokens]
        for place in pending:
            headings[place] = headings[place][1:]
            passages[place] = "\n".join((*headings[place], chunks[place].text))
        pending = [place for place in pending if headings[place]]
    return passages
