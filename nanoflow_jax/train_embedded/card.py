"""The model card that goes with the exported folder."""

import dataclasses
import math
import os
import platform

import jax

from nanoflow_jax.models import architecture
from nanoflow_jax.train_embedded import chat_rows, settings, tokenizer_training


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What the text was.

    Attributes:
        num_bytes: Of all files, held out or not.
        num_tokens: For training, conversations included.
        num_chat_tokens: In training conversations.
        digest: One hash over all files' hashes and names.
    """

    num_files: int
    num_bytes: int
    num_held_out: int
    num_conversations: int
    num_tokens: int
    num_chat_tokens: int
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What the run cost: steps of `step_tokens` tokens, and the time that they took.

    Attributes:
        schedules: Pairs (first step, num_steps): a run resumed with another --train_num_steps
            has several.
    """

    num_steps: int
    step_tokens: int
    busy_s: float
    schedules: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """Losses on held-out files, in nats per token, over rows of the whole context."""

    code_nats: float
    chat_nats: float
    bytes_per_token: float

    @property
    def code_bits_per_byte(self) -> float:
        return self.code_nats / math.log(2) / self.bytes_per_token


def hardware() -> str:
    """What this process computes on, in general words."""
    if jax.default_backend() == "cpu":
        return f"{os.cpu_count()} CPU cores, float32"
    return f"{jax.device_count()} {jax.devices()[0].device_kind}, float32"


def render(
    chosen: settings.Settings,
    facts: CorpusFacts,
    training: Training,
    validation: Validation,
) -> str:
    """The card's Markdown."""
    config = chosen.model_config()
    return "\n\n".join(
        (
            _about(config),
            _data(facts),
            _training(chosen, training),
            _quality(validation, chosen.shape.context_len),
        )
    )


def _about(c: architecture.ModelConfig) -> str:
    return f"""# nanoflow_jax embedded model

A very small language model, for trying the engine out and for its tests: it writes text that
looks like Python's standard library, and answers short questions in that library's words. It is
no assistant, and nothing it says is reliable.

Llama architecture, {c.num_parameters / 1e6:.2f} M parameters in bfloat16: {c.num_layers} layers, \
width {c.hidden_size}, {c.num_heads} query heads and {c.num_kv_heads} key-value heads of
{c.head_dim}, feed-forward {c.intermediate_size}, tied embeddings, context {c.max_context_len} \
tokens. Byte-level BPE tokenizer of {c.vocab_size} tokens, learnt
from the same text; special tokens are `{"` `".join(tokenizer_training.SPECIAL_TOKENS)}`.
Text begins with `{tokenizer_training.BOS}`; a turn of a chat ends with \
`{tokenizer_training.END_OF_TURN}`, as the chat template in
tokenizer_config.json lays it out. The system prompt seen in training is
"{chat_rows.SYSTEM_PROMPT}\""""


def _data(f: CorpusFacts) -> str:
    return f"""## Data

The standard library of CPython {platform.python_version()} as installed: {f.num_files} files, \
{f.num_bytes / 1e6:.2f} MB, without tests, character
tables, idlelib, lib2to3 and distutils. Its text is
under the PSF License Agreement (https://docs.python.org/3/license.html), copyright Python
Software Foundation; generated text may repeat passages of it. sha256 over the sorted list of
`sha256  name` lines: `{f.digest}`.

{f.num_held_out} files are held out for validation, chosen by a hash of their name. The rest \
gives {f.num_tokens / 1e6:.2f} M tokens,
{f.num_chat_tokens / 1e6:.2f} M of them in {f.num_conversations} conversations made from \
docstrings ("What does textwrap.dedent do?")
and from short functions ("Complete this code: ..."); all tokens count in the loss."""


def _training(chosen: settings.Settings, t: Training) -> str:
    s = chosen.train
    return f"""## Training

    {_command(chosen)}

{t.num_steps} steps of {t.step_tokens} tokens, {t.num_steps * t.step_tokens / 1e6:.2f} M tokens \
in all, {t.busy_s / 60:.0f} minutes on {hardware()}.
AdamW, peak rate {s.peak_rate:g}, {s.warmup_steps} steps of warm-up, then a cosine; weight decay \
{s.weight_decay:g}; gradients clipped to
{s.max_gradient_norm:g}. The first {s.short_fraction:.0%} of the steps see windows of \
{s.short_len} tokens, the rest of {chosen.shape.context_len}.{_resumed(t)}"""


def _resumed(t: Training) -> str:
    if len(t.schedules) == 1:
        return ""
    parts = ", ".join(f"--train_num_steps={total} from step {at}" for at, total in t.schedules)
    return f"\nThe run was stopped and resumed with another length: {parts}."


def _quality(v: Validation, context_len: int) -> str:
    return f"""## Validation loss

| held-out text, rows of {context_len} tokens | nats per token | bits per byte |
| --- | --- | --- |
| source files | {v.code_nats:.4f} | {v.code_bits_per_byte:.4f} |
| conversations | {v.chat_nats:.4f} | |

## Limits

Trained on one library in one style for minutes: completions have the form of Python, but rarely
run, and answers about functions are often invented. English prose, other languages and other
programming languages are outside what it has seen, and so are prompts beyond its context.
"""


def _command(chosen: settings.Settings) -> str:
    words = ["python -m nanoflow_jax.train_embedded --work_dir=WORK --output=checkpoints/embedded"]
    for name, value, default in settings.knob_values(chosen):
        if value != default and name != "corpus_root":
            words.append(f"--{name}={value}")
    return " ".join(words)
