"""Sets what must be set before NumPy and PyTorch are imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors are slower on two threads
