"""Makes the golden cases: tiny seeded models and what transformers answers for them.

    python tests/golden/make.py --output=tests/golden            # write every case
    python tests/golden/make.py --output=DIR --family=llama3     # write one
    python tests/golden/make.py --check=tests/golden             # make again and compare

Needs the [parity] extra. Each case is a Hugging Face folder (config, generation config, weights,
tokenizer, chat template) with `golden.npz`, `chat.json` and `texts.json` beside them;
`cases.py` reads them back without torch. Weights and prompts come from numpy generators seeded
by the case, answers from float32 on the CPU with eager attention, one prompt at a time.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import sys
import tempfile
import unittest.mock
import zlib
from collections.abc import Iterator
from typing import Any

import jinja2
import numpy as np
import safetensors.numpy
import tiny_tokenizers
import torch
import transformers
from case_spec import Case
from families import CASES
from transformers.utils import chat_template_utils

PROMPT_LENS = (1, 2, 5, 9, 13, 17, 23, 31, 37, 47, 59, 70)
LOGIT_PROMPTS = (0, 4, 10)
NUM_TOKENS = 48
TEXTS = (
    "Hello there!",
    " two  spaces, then\ttab\nnewline ",
    "Caf\u00e9 \u2615 \u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "def take(self, count: int) -> list[int]:\n    return []\n",
    "",
)

_HERE = pathlib.Path(__file__).resolve().parent
_MAX_CASE_BYTES = 300_000
# Greedy tokens must not hang on rounding: every reference margin is wider than this.
_MIN_MARGIN = 1e-3
# A row that repeats a few tokens would hide a wrong context.
_MIN_DISTINCT = 8
# Nor may the choice of experts hang on rounding, nor float32 itself stray far from float64. How far
# it strays is up to the order in which a processor's kernels sum (torch 2.13, llama3: below 3e-5
# with ATen's portable kernels, 3.2e-5 with AVX2, 3.8e-5 with MKL_CBWR=COMPATIBLE). Two that stray
# by this much differ by the 1e-4 that tests allow, and no more.
_MIN_ROUTER_MARGIN = 1e-5
_MAX_ROUNDING = 5e-5
# The same processor gives every file again byte for byte.
_MAX_DIFFERENCE = 2 * _MAX_ROUNDING


def main(arguments: list[str]) -> int:
    """Write or check the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="Folder to write the cases to.")
    parser.add_argument("--check", type=pathlib.Path, help="Folder of committed cases to compare.")
    parser.add_argument("--family", choices=list(CASES), help="Only this case.")
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.check is None):
        parser.error("give either --output or --check")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    # One thread: sums in one order on every machine, and faster at these sizes.
    torch.set_num_threads(1)
    names = [options.family] if options.family else list(CASES)
    if options.output is not None:
        for name in names:
            make_case(CASES[name], options.output / name)
            _show(report(name, options.output / name))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        differences = []
        for name in names:
            folder = pathlib.Path(scratch) / name
            make_case(CASES[name], folder)
            differences += [f"{name}: {line}" for line in compare(folder, options.check / name)]
    for line in differences:
        _show(line)
    return 1 if differences else 0


def make_case(case: Case, folder: pathlib.Path) -> None:
    """Write one case into a folder, replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    tokenizer = _write_tokenizer(case, folder)
    _write_model(case, folder, tokenizer)
    model = _load(folder)
    prompts = _prompts(case)
    golden = _answers(model, prompts)
    _check_spread(case, model, folder, prompts, golden)
    np.savez_compressed(folder / "golden.npz", **golden)
    _write_rows(folder / "chat.json", _render_all(case, tokenizer))
    _write_rows(folder / "texts.json", [_text_row(tokenizer, text) for text in TEXTS])
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > _MAX_CASE_BYTES:
        raise ValueError(f"{folder.name} takes {size} bytes, more than {_MAX_CASE_BYTES}")


def _write_tokenizer(case: Case, folder: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    template = (_HERE / "templates" / f"{case.template}.jinja").read_text(encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.build(case.tokenizer),
        bos_token=case.bos,
        eos_token=case.eos,
        pad_token=case.pad,
        unk_token="<unk>" if "<unk>" in case.tokenizer.special else None,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=case.config["max_position_embeddings"],
    )
    tokenizer.save_pretrained(folder, save_jinja_files=not case.template_in_config)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {**config, **case.tokenizer_config})
    return transformers.AutoTokenizer.from_pretrained(folder)


def _write_model(
    case: Case, folder: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    config = getattr(transformers, f"{case.architecture}Config")(
        **case.config,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = getattr(transformers, f"{case.architecture}ForCausalLM")(config).eval()
    _fill(model, case)
    if case.generation_eos:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
            list(case.generation_eos)
        )
    shard = {} if case.shard_size is None else {"max_shard_size": case.shard_size}
    model.save_pretrained(folder, **shard)
    if case.legacy_config:
        path = folder / "config.json"
        _write_json(path, _as_written_by_transformers_4(json.loads(path.read_text())))


def _as_written_by_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    dtype = config.pop("dtype")
    legacy = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": dtype}
    return dict(sorted({**config, **legacy, "transformers_version": "4.46.0"}.items()))


@torch.no_grad()
def _fill(model: torch.nn.Module, case: Case) -> None:
    """Seeded weights with spread logits; norms and biases away from their neutral values."""
    neutral = 0.0 if case.architecture == "Gemma2" else 1.0
    for name, parameter in model.named_parameters():
        generator = np.random.default_rng([case.seed, zlib.crc32(name.encode())])
        gain = next((g for key, g in case.gains.items() if key in name), None)
        if "norm" in name:
            scale = (gain or 1.0) * generator.uniform(0.7, 1.3, parameter.shape)
            values = scale - 1.0 + neutral
        elif name.endswith("bias"):
            values = (gain or 0.3) * generator.standard_normal(parameter.shape)
        elif "embed_tokens" in name:
            values = (gain or 0.5) * generator.standard_normal(parameter.shape)
        else:
            gain = gain or next((g for key, g in _GAINS.items() if key in name), 1.0)
            spread = gain / np.sqrt(parameter.shape[-1])
            values = spread * generator.standard_normal(parameter.shape)
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


# Attention scores spread by about 2 and the layers' outputs outweigh the embedding of the last
# token, so that greedy continuations neither ignore their context nor repeat one token.
_GAINS = {
    "q_proj": 1.0,
    "k_proj": 1.0,
    "o_proj": 3.5,
    "gate": 1.2,
    "up_proj": 1.2,
    "down_proj": 3.5,
    "lm_head": 3.0,
}


def _load(folder: pathlib.Path, **changes: Any) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    more = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", **more
    )
    return model.eval()


def _prompts(case: Case) -> list[list[int]]:
    generator = np.random.default_rng([case.seed, zlib.crc32(b"prompts")])
    vocab_size = case.config["vocab_size"]
    return [generator.integers(0, vocab_size, length).tolist() for length in PROMPT_LENS]


@torch.no_grad()
def _answers(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> dict[str, Any]:
    tokens = np.zeros((len(prompts), NUM_TOKENS), np.int32)
    margins = np.zeros((len(prompts), NUM_TOKENS), np.float32)
    golden: dict[str, Any] = {}
    for row, prompt in enumerate(prompts):
        cache = transformers.DynamicCache(config=model.config)
        step = torch.tensor([prompt])
        for column in range(NUM_TOKENS):
            logits = model(step, past_key_values=cache, use_cache=True).logits[0]
            if column == 0 and row in LOGIT_PROMPTS:
                golden[f"logits_{row}"] = logits.numpy().copy()
            top = torch.topk(logits[-1], 2)
            tokens[row, column] = top.indices[0]
            margins[row, column] = top.values[0] - top.values[1]
            step = top.indices[None, :1]
    lengths = [len(prompt) for prompt in prompts]
    return {
        "prompt_tokens": np.concatenate(prompts).astype(np.int32),
        "prompt_offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "tokens": tokens,
        "margins": margins,
        **golden,
    }


@torch.no_grad()
def _check_spread(
    case: Case,
    model: transformers.PreTrainedModel,
    folder: pathlib.Path,
    prompts: list[list[int]],
    golden: dict[str, Any],
) -> None:
    """Refuse a case whose greedy tokens hang on rounding or whose features do not show."""
    if golden["margins"].min() < _MIN_MARGIN:
        raise ValueError(f"{folder.name}: margin {golden['margins'].min()}, try another seed")
    fewest = min(len(set(row)) for row in golden["tokens"].tolist())
    if fewest < _MIN_DISTINCT:
        raise ValueError(f"{folder.name}: a row of {fewest} distinct tokens, try another seed")
    routers = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _, __, output: routers.append(output[0]))
    exact = _load(folder).double()
    rounding = 0.0
    for row, prompt in enumerate(prompts):
        sequence = torch.tensor([prompt + golden["tokens"][row].tolist()])
        logits = model(sequence, use_cache=False).logits[0]
        rounding = max(rounding, (exact(sequence).logits[0] - logits).abs().max().item())
        greedy = logits[len(prompt) - 1 : -1].argmax(-1).numpy()
        if not np.array_equal(greedy, golden["tokens"][row]):
            raise ValueError(f"{folder.name}: tokens with and without a cache differ")
    if rounding > _MAX_ROUNDING:
        raise ValueError(f"{folder.name}: float32 is {rounding} away from float64")
    if routers:
        chosen = model.config.num_experts_per_tok
        ranked = torch.cat(routers).sort(-1, descending=True).values
        gap = (ranked[:, chosen - 1] - ranked[:, chosen]).min().item()
        if gap < _MIN_ROUTER_MARGIN:
            raise ValueError(f"{folder.name}: router margin {gap}, try another seed")
    for changes in case.bites:
        changed = _load(folder, **changes)
        sequence = torch.tensor([prompts[LOGIT_PROMPTS[-1]]])
        logits = changed(sequence).logits[0].numpy()
        if np.abs(logits - golden[f"logits_{LOGIT_PROMPTS[-1]}"]).max() < 0.1:
            raise ValueError(f"{folder.name}: {changes} changes nothing")


def _render_all(
    case: Case, tokenizer: transformers.PreTrainedTokenizerFast
) -> list[dict[str, Any]]:
    return [{**entry, **_render(tokenizer, entry)} for entry in case.chat]


def _render(
    tokenizer: transformers.PreTrainedTokenizerFast, entry: dict[str, Any]
) -> dict[str, Any]:
    options = {
        "tools": entry.get("tools"),
        "add_generation_prompt": entry["add_generation_prompt"],
        **entry.get("kwargs", {}),
    }
    try:
        with _clock(entry.get("now")):
            rendered = tokenizer.apply_chat_template(entry["messages"], tokenize=False, **options)
            token_ids = tokenizer.apply_chat_template(
                entry["messages"], tokenize=True, return_dict=False, **options
            )
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}
    return {"rendered": rendered, "token_ids": token_ids}


@contextlib.contextmanager
def _clock(now: str | None) -> Iterator[None]:
    """Let `strftime_now` see an ISO time."""
    with contextlib.ExitStack() as stack:
        if now is not None:
            clock = stack.enter_context(
                unittest.mock.patch.object(chat_template_utils, "datetime", autospec=True)
            )
            clock.now.return_value = datetime.datetime.fromisoformat(now)
        yield


def _text_row(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
    token_ids = tokenizer.encode(text)
    return {
        "text": text,
        "token_ids": token_ids,
        "decoded": tokenizer.decode(token_ids, skip_special_tokens=True),
        "decoded_with_special": tokenizer.decode(token_ids, skip_special_tokens=False),
    }


def compare(made: pathlib.Path, committed: pathlib.Path) -> list[str]:
    """What differs between a case made now and the committed one, one line each."""
    ours = {path.name for path in made.iterdir()}
    theirs = {path.name for path in committed.iterdir()} if committed.is_dir() else set()
    differences = [f"{name} is missing" for name in sorted(ours - theirs)]
    differences += [f"{name} is not made any more" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        for key, (new, old) in _paired(made / name, committed / name).items():
            if isinstance(new, np.ndarray) and isinstance(old, np.ndarray):
                same = new.dtype == old.dtype and new.shape == old.shape
                same = same and np.allclose(new, old, rtol=0.0, atol=_MAX_DIFFERENCE)
            else:
                same = new == old
            if not same:
                differences.append(f"{name}: {key or 'content'} differs")
    return differences


def _paired(made: pathlib.Path, committed: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    new, old = _contents(made), _contents(committed)
    return {key: (new.get(key), old.get(key)) for key in sorted(new.keys() | old.keys())}


def _contents(path: pathlib.Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content.pop("transformers_version", None)
        return {"": content}
    return {"": path.read_text(encoding="utf-8")}


def report(name: str, folder: pathlib.Path) -> str:
    """One line about the spread of a case's logits and its size."""
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        tokens, margins = golden["tokens"], golden["margins"]
    per_row = [len(set(row.tolist())) for row in tokens]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return (
        f"{name}: margin min {margins.min():.4f} median {np.median(margins):.3f}, distinct tokens "
        f"{len(np.unique(tokens))} in all, {min(per_row)} to {max(per_row)} of {NUM_TOKENS} a row, "
        f"{size} bytes"
    )


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _show(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
