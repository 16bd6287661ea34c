"""Previews: the records that a person asks for, prepared by the code that prepares them for training."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import load_tokenizer, read_context_tokens
from server.basemodels.rendering import hash_template
from server.datafiles.preparation import Preparation, PreparedSequence, Rules
from server.datafiles.reading import NumberedRecord, read_records, recognise_form
from server.datafiles.unpacking import FileInvalid
from server.domain.errors import FailedPrecondition
from server.domain.orders import DatasetFile
from server.domain.previews import Preview, PreviewedRecord, PreviewedSequence, PreviewedToken, PreviewOrder

MAX_KEPT_TOKENIZERS = 4  # tens of MB each
SENTENCEPIECE_SPACE = "\u2581"


class Previewer:
    """Prepares records for show. `resolve` gives a base model's directory, `locate` a stored file's place. Blocking, for any thread."""

    def __init__(self, resolve: Callable[[str], Path], locate: Callable[[str], Path]) -> None:
        self._resolve = resolve
        self._locate = locate
        self._tokenizers: OrderedDict[Path, PreTrainedTokenizerBase] = OrderedDict()
        self._lock = threading.Lock()

    def preview(self, order: PreviewOrder) -> Preview:
        """Show records. Raises what loading the model's tokenizer raises, and FailedPrecondition for a file that is gone."""
        directory = self._resolve(order.base_model)
        with self._lock:  # tokenizers are shared and may not be used by two threads while one sets their options
            tokenizer = self._load(directory)
            longest = min(order.max_sequence_tokens, read_context_tokens(directory))
            rules = Rules(longest, order.overlong_policy, order.loss_on, order.needs_pairs)
            try:
                wanted = list(_pick(self._locate(order.dataset.path), order.dataset, order.records))
            except (OSError, FileInvalid) as error:
                raise FailedPrecondition("The dataset's file cannot be read.", reason="DATASET_UNREADABLE") from error
            prepared = Preparation(tokenizer, rules).prepare(wanted)
            shown = [
                PreviewedRecord(
                    each.number,
                    each.line,
                    tuple(_show(tokenizer, sequence, order.max_tokens_shown) for sequence in each.sequences),
                    each.findings,
                )
                for each in prepared
            ]
            return Preview(tuple(shown), hash_template(tokenizer))

    def _load(self, directory: Path) -> PreTrainedTokenizerBase:
        tokenizer = self._tokenizers.pop(directory, None) or load_tokenizer(directory)
        self._tokenizers[directory] = tokenizer
        while len(self._tokenizers) > MAX_KEPT_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return tokenizer


def _pick(path: Path, file: DatasetFile, numbers: Sequence[int]) -> Iterator[NumberedRecord]:
    wanted = set(numbers)
    for numbered in read_records(path, recognise_form(path, file.format), file.record_kind):
        if numbered.number in wanted:
            yield numbered
        if numbered.number >= max(wanted, default=0):
            return


def _show(tokenizer: PreTrainedTokenizerBase, sequence: PreparedSequence, most: int) -> PreviewedSequence:
    pieces = zip(sequence.token_ids[:most], sequence.weights[:most], strict=True)
    return PreviewedSequence(
        sequence.name,
        tuple(PreviewedToken(token_id, _decode(tokenizer, token_id), weight) for token_id, weight in pieces),
        len(sequence.token_ids),
        sum(weight > 0 for weight in sequence.weights),
    )


def _decode(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    # A decoder takes the first space of a text away; here every token is the first.
    piece = str(tokenizer.convert_ids_to_tokens(token_id))
    return f" {text}" if piece.startswith(SENTENCEPIECE_SPACE) and not text.startswith(" ") else text
