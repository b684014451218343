"""One rank of a torchrun job: train GPT-2 partitioned over the job, write the errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cutset.runtime.launcher import spmd_session
from tests.exactness.harness import Subject, adamw64
from tests.models.exact import EXACT_MODELS


def main(folder: Path) -> None:
    subject = Subject(EXACT_MODELS["gpt2"], adamw64)
    errors = subject.errors(2, "1f1b", spmd_session(timeout_seconds=60.0))
    found = {kind: error.value for kind, error in errors.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
