"""The files beside a model's weights that belong to it: config, tokenizer, chat templates."""

from pathlib import Path

from checkpoints import files

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Where transformers keeps templates that have names, such as the one for tools.
TEMPLATES = "additional_chat_templates"


def present(folder: Path) -> tuple[str, ...]:
    """Those that a folder has, by their paths in it."""
    names = [name for name in NAMES if (folder / name).is_file()]
    templates = sorted(path.name for path in (folder / TEMPLATES).glob("*.jinja"))
    return (*names, *(f"{TEMPLATES}/{name}" for name in templates))


def check_name(name: str, *, file: Path) -> None:
    """Refuses what is neither the name of a file in a model's folder nor of a template there.

    Args:
        name: What a file gave as a name.
        file: The file it was found in, for the message.

    Raises:
        CheckpointError: it has another path.
    """
    files.check_plain_name(name.removeprefix(f"{TEMPLATES}/"), file=file, what="a copied file")
