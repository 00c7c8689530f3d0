"""Zero the device code of other GPU architectures inside shared libraries; they then compress to a tenth.

    python tools/acceptance/one_architecture.py 90 libtransformer_engine.so ...

Offsets stay, so the driver finds the code that it wants where it was. PTX goes too: on another architecture than the
one that was kept nothing runs. (``nvprune`` takes object files and static libraries alone.)
"""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path

_MAGIC = b"\x50\xed\x55\xba"  #: of a fat binary: then version, header bytes, payload bytes
_PTX, _ELF = 1, 2


def keep_one_architecture(path: Path, architecture: int) -> tuple[int, int]:
    """Edit a library in place.

    Args:
        architecture: 90 for Hopper.

    Returns:
        bytes of device code that were kept and that were zeroed.
    """
    kept = zeroed = 0
    with path.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            version, header, size = struct.unpack_from("<HHQ", data, at + 4)
            end = at + header + size
            if (version, header) != (1, 16) or end > len(data):
                at = data.find(_MAGIC, at + 4)
                continue
            entry = at + header
            while entry + 64 <= end:
                kind, _, head, payload = struct.unpack_from("<HHIQ", data, entry)
                (found,) = struct.unpack_from("<I", data, entry + 28)
                if kind not in (_PTX, _ELF) or not 32 <= head <= 4096:
                    break
                if kind == _ELF and found == architecture:
                    kept += payload
                else:
                    zeroed += payload
                    data[entry + head : entry + head + payload] = bytes(payload)
                entry += head + payload
            at = data.find(_MAGIC, end)
    return kept, zeroed


if __name__ == "__main__":
    for name in sys.argv[2:]:
        sizes = keep_one_architecture(Path(name), int(sys.argv[1]))
        print(f"{name}: {sizes[0] / 2**20:.1f} MiB kept, {sizes[1] / 2**20:.1f} MiB zeroed")
