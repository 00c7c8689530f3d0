"""What a checkpoint may make Python do when it is read: nothing but build tensors, numbers and the reader's own
records.

Our own files are JSON and safetensors. Megatron's ``torch_dist`` format has pickles inside: ``weights/.metadata``
(torch reads it with ``pickle.load``), ``common.pt``, and, in the ``.distcp`` files, objects beside the tensors (read
with ``weights_only=False``). A pickle can name any function to be called. So before any of them is read, the names in
it are listed without running it, and a name that isn't known stops the resume. The checksums of the manifest alone
wouldn't: whoever can change a pickle can change the manifest beside it.

What remains: with FP8 on a GPU, Transformer Engine keeps its scales as a byte tensor that it unpickles itself; its
content is not looked into.
"""

from __future__ import annotations

import enum
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from pact_nemo.errors import CheckpointError
from pact_nemo.runtime.files import stays_inside

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
#: what the index of a torch_dist checkpoint is made of
_INDEX_NAMES = frozenset(
    {
        f"{_DCP}.filesystem._StorageInfo",
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.device",
        "collections.OrderedDict",
    }
    | {
        f"{_DCP}.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        f"{_DCP}.planner.{name}"
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType", "BytesIOWriteData")
    }
    | {"pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath"}
)
#: what plain values and tensors are made of
_VALUE_NAMES = frozenset(
    {
        "_codecs.encode",
        "_io.BytesIO",
        "builtins.bytearray",
        "builtins.set",
        "builtins.frozenset",
        "builtins.complex",
        "collections.OrderedDict",
    }
    | {
        "argparse.Namespace",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    }
)
_TORCH_TYPE = re.compile(r"torch\.(?:u?int\d+|b?float\d+\w*|bool|complex\d+|\w+Storage|storage\.UntypedStorage)")
_GETATTR = "builtins.getattr"
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")


def names_in(pickled: bytes) -> set[str]:
    """``module.name`` of everything that reading a pickle would import, listed without running it.

    Raises:
        ValueError: it is no pickle, or takes a name from somewhere that can't be told from its text.
    """
    names: set[str] = set()
    strings: list[str | None] = []  # what the last operations pushed: a text, or None for anything else
    memo: dict[int, str | None] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(pickled):
        kind = operation.name
        if kind in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
        elif kind == "STACK_GLOBAL":
            module, name = strings[-2:] if len(strings) > 1 else (None, None)
            if module is None or name is None:
                raise ValueError("a name is not given as text")
            names.add(f"{module}.{name}")
        elif kind.startswith("EXT"):
            raise ValueError("it uses the extension registry")
        if kind == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else None
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = strings[-1] if strings else None
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument)))
        elif kind in _STRINGS:
            strings.append(str(argument))
        elif kind not in ("PROTO", "FRAME"):
            strings.append(None)
    return names


class _EnumMembers(pickle.Unpickler):
    """Reads a pickle whose names are known, and lets ``getattr`` take members of enumerations only."""

    def __init__(self, pickled: bytes, allowed: frozenset[str]):
        super().__init__(io.BytesIO(pickled))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        found = f"{module}.{name}"
        if found == _GETATTR:
            return _member
        if found not in self._allowed and not _TORCH_TYPE.fullmatch(found):
            raise pickle.UnpicklingError(f"{found} is not among the known names")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"getattr of {kind!r}, which is no enumeration")
    return kind[name]


def _only_enum_members(pickled: bytes, allowed: frozenset[str]) -> bool:
    """Whether ``getattr`` does nothing but fetch members of known enumerations: early Python 3.11 (3.11.2 is Debian
    12's) pickles them so.
    """
    try:
        _EnumMembers(pickled, allowed).load()
    except Exception:  # a pickle that is put together in a way that makes no sense raises anything
        return False
    return True


def check_pickle(pickled: bytes, allowed: frozenset[str], what: str) -> None:
    """Raises CheckpointError where a pickle names anything but ``allowed`` and torch's own types of tensors."""
    try:
        names = names_in(pickled)
    except (ValueError, IndexError, KeyError, EOFError, UnicodeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{what} is no readable pickle ({error}); resume from another checkpoint") from error
    strange = sorted(name for name in names if name not in allowed and not _TORCH_TYPE.fullmatch(name))
    if strange == [_GETATTR] and _only_enum_members(pickled, allowed):
        return
    if strange:
        raise CheckpointError(
            f"{what} would run {', '.join(strange[:3])} when it is read: no checkpoint needs that; delete it and take"
            " another one"
        )


def check_archive(data: Any, what: str) -> None:
    """:func:`check_pickle` of what ``torch.save`` wrote: a file or its bytes."""
    try:
        with zipfile.ZipFile(data) as archive:
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            parts = [archive.read(name) for name in pickles]
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{what} is not in torch's zip format ({error}); resume from another checkpoint"
        ) from error
    if not parts:
        raise CheckpointError(f"{what} holds no data.pkl; resume from another checkpoint")
    for part in parts:
        check_pickle(part, _VALUE_NAMES, what)


def read_index(folder: Path) -> Any:
    """The index of a ``torch_dist`` folder (torch's ``Metadata``), read after the names in it were looked through.

    Raises:
        CheckpointError: it names something that no checkpoint needs, or a file outside the folder, or can't be read.
    """
    index = folder / METADATA
    try:
        pickled = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index} can't be read ({error}); resume from another checkpoint") from error
    check_pickle(pickled, _INDEX_NAMES, str(index))
    from torch.distributed.checkpoint import FileSystemReader

    try:
        metadata = FileSystemReader(folder).read_metadata()  # its names are known now
        places = [(key.fqn, place.relative_path, place.offset + place.length) for key, place in _places(metadata)]
    except Exception as error:  # known names, put together in a way that makes no sense
        raise CheckpointError(f"{index} can't be read ({error!r}); resume from another checkpoint") from error
    for _, file, _ in places:
        if not isinstance(file, str) or not stays_inside(folder, file):
            raise CheckpointError(
                f"{index} names {file!r}, which is not in that folder; resume from another checkpoint"
            )
    return metadata


def _places(metadata: Any) -> list[tuple[Any, Any]]:
    return list(metadata.storage_data.items())


def check_weights(folder: Path) -> None:
    """Look through every pickle of a ``torch_dist`` folder before megatron reads it.

    Raises:
        CheckpointError: one names something that no checkpoint needs, or a file outside the folder; the message names
            the file.
    """
    metadata = read_index(folder)
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    objects = {name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    for key, place in _places(metadata):
        if key.fqn in objects:
            with open(folder / place.relative_path, "rb") as handle:
                handle.seek(place.offset)
                check_archive(io.BytesIO(handle.read(place.length)), f"{key.fqn} in {folder / place.relative_path}")
    for path in sorted(folder.rglob("*.pt")):
        check_archive(path, str(path))
