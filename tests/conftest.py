"""One thread per process: most operations here are so short that two threads would spend their time
at barriers, and `make test` runs a process per core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
