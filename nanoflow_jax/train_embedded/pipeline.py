"""From text to model folder: prepare the rows, train, validate, export."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from checkpoints import files
from nanoflow_jax.train_embedded import (
    card,
    chat_rows,
    corpus,
    export,
    model_training,
    rows,
    settings,
    tokenizer_training,
)

_REPORT_EVERY_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training is.

    Attributes:
        loss: Mean over the steps since the last report, in nats per token.
        tokens_per_s: Since the last report.
        eta_s: Seconds left at that speed.
    """

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float
    eta_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The text as the model sees it.

    Attributes:
        code_rows: Held-out files, packed.
        chat_rows: Held-out conversations, packed.
        bytes_per_token: Of the held-out files.
        fingerprint: What a checkpoint must agree with to be resumed.
    """

    tokenizer: tokenizers.Tokenizer
    train_rows: Int32[np.ndarray, "B C1"]
    code_rows: Int32[np.ndarray, "B C1"]
    chat_rows: Int32[np.ndarray, "B C1"]
    bytes_per_token: float
    facts: card.CorpusFacts
    fingerprint: dict[str, Any]


def prepare(chosen: settings.Settings, work_dir: pathlib.Path) -> Prepared:
    """Reads the text, learns or reads the tokenizer, packs the rows."""
    root = chosen.corpus.root
    found = corpus.read_corpus(pathlib.Path(root) if root else corpus.standard_library())
    kept, held_out = corpus.split(found, one_in=chosen.corpus.held_out_one_in)
    digest = corpus.digest(found)
    tokenizer = _tokenizer(kept, chosen, work_dir / f"tokenizer-{digest[:16]}.json")
    chats = chat_rows.conversations(kept)
    documents = tokenizer_training.encode_documents(tokenizer, [f.text for f in kept])
    talks = tokenizer_training.encode_conversations(tokenizer, chats)
    held_code = tokenizer_training.encode_documents(tokenizer, [f.text for f in held_out])
    held_talks = tokenizer_training.encode_conversations(
        tokenizer, chat_rows.conversations(held_out)
    )
    context_len = chosen.shape.context_len
    mixed = rows.mixed(documents, talks, seed=chosen.train.seed)
    facts = card.CorpusFacts(
        num_files=len(found),
        num_bytes=sum(len(f.text.encode()) for f in found),
        num_held_out=len(held_out),
        num_conversations=len(chats),
        num_tokens=sum(map(len, mixed)),
        num_chat_tokens=sum(map(len, talks)),
        digest=digest,
    )
    return Prepared(
        tokenizer=tokenizer,
        train_rows=rows.pack(mixed, context_len=context_len),
        code_rows=rows.pack(held_code, context_len=context_len),
        chat_rows=rows.pack(held_talks, context_len=context_len),
        bytes_per_token=sum(len(f.text.encode()) for f in held_out) / sum(map(len, held_code)),
        facts=facts,
        fingerprint={**chosen.resumable_part(), "corpus": digest},
    )


def _tokenizer(
    kept: Sequence[corpus.SourceFile], chosen: settings.Settings, path: pathlib.Path
) -> tokenizers.Tokenizer:
    """The tokenizer of an earlier start of the same run, else a new one."""
    if not path.exists():
        learnt = tokenizer_training.train_tokenizer(
            [f.text for f in kept], vocab_size=chosen.corpus.vocab_size
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, learnt.to_str().encode())
    return tokenizers.Tokenizer.from_file(str(path))


def train(
    chosen: settings.Settings,
    prepared: Prepared,
    work_dir: pathlib.Path,
    *,
    report: Callable[[Progress], None],
    on_step: Callable[[int, float], None] | None = None,
) -> model_training.Trainer:
    """Trains to `num_steps`, from the last checkpoint if there is one.

    Args:
        chosen: All knobs.
        prepared: The text.
        work_dir: Holds the checkpoints.
        report: Called every few seconds.
        on_step: Called after each step with its number and loss; waiting for the loss is slower.

    Returns:
        The trainer with the final weights, which are saved too.
    """
    t = chosen.train
    trainer = model_training.Trainer(chosen)
    data = rows.batches(rows.RowSource(prepared.train_rows), batch_rows=t.batch_rows, seed=t.seed)
    saved = model_training.Checkpoints(work_dir / "checkpoints")
    try:
        saved.restore(trainer, data, fingerprint=prepared.fingerprint)
        meter = _Meter(chosen, trainer.num_done, report)
        while trainer.num_done < t.num_steps:
            loss = trainer.step(next(data))
            meter.add(trainer.num_done, loss)
            if on_step is not None:
                on_step(trainer.num_done, loss)
            if trainer.num_done % t.save_every == 0 or trainer.num_done == t.num_steps:
                saved.save(trainer, data, fingerprint=prepared.fingerprint)
    finally:
        saved.close()
    return trainer


class _Meter:
    """Turns single steps into a report every few seconds."""

    def __init__(
        self, chosen: settings.Settings, step: int, report: Callable[[Progress], None]
    ) -> None:
        self._num_steps = chosen.train.num_steps
        self._step_tokens = chosen.train.batch_rows * chosen.shape.context_len
        self._report = report
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._since, self._first, self._losses = time.monotonic(), step, list[float]()

    def add(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        elapsed = time.monotonic() - self._since
        if elapsed < _REPORT_EVERY_S and step < self._num_steps:
            return
        steps_per_s = (step - self._first) / elapsed
        progress = Progress(
            step=step,
            num_steps=self._num_steps,
            loss=sum(self._losses) / len(self._losses),
            tokens_per_s=steps_per_s * self._step_tokens,
            eta_s=(self._num_steps - step) / steps_per_s,
        )
        self._restart(step)
        self._report(progress)


def finish(
    chosen: settings.Settings,
    prepared: Prepared,
    trainer: model_training.Trainer,
    folder: pathlib.Path,
) -> card.Validation:
    """Validates and writes the model folder."""
    validation = card.Validation(
        code_nats=trainer.validate(prepared.code_rows),
        chat_nats=trainer.validate(prepared.chat_rows),
        bytes_per_token=prepared.bytes_per_token,
    )
    training = card.Training(
        num_steps=trainer.num_done,
        step_tokens=chosen.train.batch_rows * chosen.shape.context_len,
        busy_s=trainer.busy_s,
        schedules=tuple(trainer.schedules),
    )
    export.write_model(
        folder,
        weights={name: np.asarray(w) for name, w in trainer.weights.items()},
        config=trainer.config,
        tokenizer=prepared.tokenizer,
        card=card.render(chosen, prepared.facts, training, validation),
    )
    return validation
