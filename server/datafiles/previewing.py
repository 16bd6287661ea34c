"""Previews and samples: the records that a person asks for, or an estimate, prepared by the code that prepares them for training."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import load_tokenizer, read_context_tokens
from server.basemodels.rendering import hash_template
from server.datafiles.preparation import Preparation, PreparedSequence, Rules
from server.datafiles.reading import NumberedRecord, pick_records, recognise_form
from server.datafiles.unpacking import FileInvalid
from server.domain.errors import FailedPrecondition
from server.domain.orders import DatasetFile
from server.domain.previews import MeasureOrder, Preview, PreviewedRecord, PreviewedSequence, PreviewedToken, PreviewOrder
from server.domain.record_forms import parse_record
from server.domain.records import Record, RecordInvalid
from server.domain.specs import LossOn, OverlongPolicy

MAX_KEPT_TOKENIZERS = 4  # tens of MB each
# A record is measured as it is; whether it is too long for a job is the job's to say.
UNBOUNDED_TOKENS = 1 << 30
MEASURED_PARTS = 8
MAX_MEASURED_CHARACTERS = 2_000_000  # two seconds of one core
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
            wanted = self._pick(order.dataset, order.records)
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

    def measure(self, order: MeasureOrder) -> list[list[int]]:
        """Count the tokens of records, of each of their sequences; of as many as fit the time that an estimate may take.

        Those that cannot be used are left out. Raises as `preview` does.
        """
        directory = self._resolve(order.base_model)
        with self._lock:
            preparation = Preparation(
                self._load(directory), Rules(UNBOUNDED_TOKENS, OverlongPolicy.REJECT, LossOn.ASSISTANT, order.needs_pairs)
            )
            wanted = self._pick(order.dataset, order.records) if order.dataset else _parse_lines(order.lines)
            counts: list[list[int]] = []
            characters = 0
            for part in range(MEASURED_PARTS):  # each part is taken from all over the file
                records = wanted[part::MEASURED_PARTS]
                counts.extend(list(each.lengths) for each in preparation.prepare(records) if each.lengths)
                characters += sum(sum(map(len, each.record.texts)) for each in records if isinstance(each.record, Record))
                if characters > MAX_MEASURED_CHARACTERS:
                    break
            return counts

    def _pick(self, file: DatasetFile, numbers: Sequence[int]) -> list[NumberedRecord]:
        path = self._locate(file.path)
        try:
            return list(pick_records(path, recognise_form(path, file.format), file.record_kind, numbers))
        except (OSError, FileInvalid) as error:
            raise FailedPrecondition("The dataset's file cannot be read.", reason="DATASET_UNREADABLE") from error

    def _load(self, directory: Path) -> PreTrainedTokenizerBase:
        tokenizer = self._tokenizers.pop(directory, None) or load_tokenizer(directory)
        self._tokenizers[directory] = tokenizer
        while len(self._tokenizers) > MAX_KEPT_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return tokenizer


def _parse_lines(lines: Sequence[str]) -> list[NumberedRecord]:
    records: list[NumberedRecord] = []
    for number, line in enumerate(lines, start=1):
        with suppress(RecordInvalid):
            records.append(NumberedRecord(number, number, parse_record(line.encode())))
    return records


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
