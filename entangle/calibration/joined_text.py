"""The documents of a source as one text, of which only a part is held at a time."""

from collections.abc import Iterable, Iterator

from entangle.calibration.files import Document, well_formed


class JoinedText:
    """The documents of a source joined into one text that is read only as far as asked.

    Lone surrogates, which no tokenizer takes, become U+FFFD.
    """

    def __init__(self, documents: Iterable[Document], join: str) -> None:
        self.n_documents = 0
        """Documents begun so far."""
        self.holds_text = False
        """Whether any document so far had a character."""
        self._blocks = self._joined(documents, join)
        self._held = ""
        self._begin = 0  # where in the text `_held` begins

    def _joined(self, documents: Iterable[Document], join: str) -> Iterator[str]:
        for document in documents:
            if self.n_documents:
                yield well_formed(join)
            self.n_documents += 1
            for block in document:
                self.holds_text |= bool(block)
                yield well_formed(block)

    def span(self, begin: int, end: int) -> str:
        """Return the characters in [begin, end), fewer only where the text ends."""
        if begin < self._begin:
            raise ValueError(f"the text before {self._begin} is forgotten; got `begin` {begin}.")
        self._read_to(end)
        return self._held[begin - self._begin : end - self._begin]

    def ends_by(self, end: int) -> bool:
        """Return whether the text has no more than ``end`` characters."""
        self._read_to(end + 1)
        return self._begin + len(self._held) <= end

    def forget(self, begin: int) -> None:
        """Drop the text before ``begin``; later spans must not begin earlier."""
        self._held = self._held[max(begin - self._begin, 0) :]
        self._begin = max(begin, self._begin)

    def _read_to(self, end: int) -> None:
        read, length = [self._held], self._begin + len(self._held)
        while length < end and (block := next(self._blocks, None)) is not None:
            read.append(block)
            length += len(block)
        self._held = "".join(read)
