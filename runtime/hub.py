"""A model file from the Hugging Face hub. The only part of the runtime that uses the network, and only when asked to.

huggingface_hub (the extra `hub`) keeps what it downloads in its cache, goes on with an interrupted download, and takes
the cached file when the hub cannot be reached.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path


def download(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> Path:
    """The local path of a GGUF file of `repo_id`, "user/model". filename: None when it has only one.

    Raises ImportError without huggingface_hub, ValueError for a bad or unknown name or several files to choose from,
    OSError when the hub cannot be reached and the cache holds no such file.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError("downloading needs huggingface_hub; run: pip install 'mobiquant[hub]'") from error
    try:
        if filename is None:
            filename = _only_file(repo_id, revision, cache_dir)
        return Path(huggingface_hub.hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id}: expected a repository as USER/MODEL: {error}") from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo_id}: accept its terms on the hub, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id}: no such repository on the hub, or it is private; then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo_id}: no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:  # before EntryNotFoundError, of which it is a kind
        raise OSError(
            f"{repo_id}: the hub cannot be reached, and the cache does not hold {filename or 'it'}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{repo_id}: no file {filename} in it") from error


def _only_file(repo_id: str, revision: str | None, cache_dir: str | PathLike[str] | None) -> str:
    """The name of the one GGUF file in the repository, or in what the cache has of it when offline."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # Not list_repo_files: without a network it goes on trying, with warnings, for half a minute.
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=10)
        names = [file.rfilename for file in info.siblings or []]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception:  # whatever the network library in use raises
        folder = Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
        names = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
    names = sorted(name for name in names if name.endswith(".gguf"))
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(f"{repo_id}: expected one GGUF file, or its name after a colon, found {found}")
    return names[0]
