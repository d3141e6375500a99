"""Where the model that comes with this package lies."""

from importlib import resources

READER = "sparsemm-reader"


def bundled_model(name: str = READER) -> str | None:
    """Folder of a bundled model; none if no model of that name is bundled."""
    if name != READER:
        return None
    return str(resources.files("sparsemm_vllm").joinpath("reader"))
