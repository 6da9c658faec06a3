"""Kernels that `kaggle kernels push` takes: staging the model, a rehearsal without GPU, the run."""
