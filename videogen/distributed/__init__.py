"""Many devices for one clip, put into a pipeline from outside: `parallel.parallel`. This file imports no torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from videogen.errors import VideogenError

PATIENCE = 5  # seconds


def launched() -> tuple[int, int]:
    """(rank, number of processes) by torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def one_voice() -> Iterator[None]:
    """For a command: of what all processes meet only the first speaks; what one alone meets, it says itself.

    torchrun ends all processes as soon as one has failed. So the others wait: who is not ended by then was alone.
    """
    rank, processes = launched()
    if processes == 1:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        if rank:
            sys.exit(130)
        raise
    except VideogenError:
        time.sleep(PATIENCE if rank else 0)
        raise
    except RuntimeError as error:
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        time.sleep(PATIENCE)
        raise VideogenError(
            f"process {rank} lost another one.",
            why="that one stopped, or does not answer.",
            hint="its own message, near this one.",
        ) from error
    else:
        from torch.distributed import destroy_process_group

        destroy_process_group()
