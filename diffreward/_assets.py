"""Where the embedded models and data are."""

from importlib import resources
from pathlib import Path


def asset_path(name: str) -> Path:
    """The file or folder of an embedded asset.

    The wheel carries the repository's top-level ``assets/`` as ``diffreward/assets``; a checkout
    installed in editable mode has it beside the package.

    Args:
        name: path below ``assets/``, such as ``"clip_guide"``.

    Raises:
        FileNotFoundError: there is no such asset; the message lists those there are.
    """
    package = Path(str(resources.files("diffreward")))
    roots = [package / "assets"]
    # Beside an installed package lie other people's folders: only a checkout has this file there.
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / "assets")
    for root in roots:
        if name and (root / name).exists():
            return root / name
    found = sorted({entry.name for root in roots if root.is_dir() for entry in root.iterdir()})
    raise FileNotFoundError(
        f"there is no embedded asset {name!r}; this installation has {', '.join(found) or 'none'}"
    )
