"""CUDA C kernels of our own, compiled for the GPU at hand at run time by NVRTC.

Every kernel has a plain-torch oracle elsewhere in the package, and equals it as docs say: nothing
depends on this folder, everything runs without it. Importing it brings torch and no CUDA.
"""

from layersweep.kernels.kernels import Kernels, load_kernels
from layersweep.kernels.runtime import KernelError

__all__ = ["KernelError", "Kernels", "load_kernels"]
