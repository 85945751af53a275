"""A folder of three profiles: of a client, of a server and of the link between them."""

import pathlib

from nanoflow_jax import config as config_lib
from nanoflow_jax.split.planning import profile_file
from nanoflow_jax.split.planning.choosing import Ends
from nanoflow_jax.split.planning.costs import Model

CLIENT, SERVER, LINK = "client.json", "server.json", "link.json"


def model_name(section: config_lib.ModelSection) -> str:
    """What profiles call a model: the last part of its path."""
    return pathlib.PurePath(section.model).name or "embedded"


def read(folder: pathlib.Path, model: Model) -> Ends:
    """The ends that a folder describes.

    Args:
        folder: With the three files.
        model: Whose layers are shared.

    Raises:
        ValueError: A file is missing or none of its kind.
    """
    for name in (CLIENT, SERVER, LINK):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is missing; python -m nanoflow_jax.split profile --out={folder} "
                "measures it"
            )
    return Ends(
        model=model,
        client=profile_file.read_device(folder / CLIENT),
        server=profile_file.read_device(folder / SERVER),
        link=profile_file.read_link(folder / LINK),
    )


def write(folder: pathlib.Path, ends: Ends) -> None:
    """Writes the three files, and the folder if it is not there.

    Raises:
        ValueError: They cannot be written.
    """
    texts = {
        CLIENT: profile_file.device_json(ends.client),
        SERVER: profile_file.device_json(ends.server),
        LINK: profile_file.link_json(ends.link),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out={folder} cannot be written: {error.strerror}") from error
