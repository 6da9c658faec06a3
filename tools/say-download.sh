#!/bin/sh
# Usage: [TORCH_INDEX=url] sh tools/say-download.sh
# Says what the installation of torch is about to download, before it does.
set -u

if command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ]; then
    driver=yes
    echo "gpu: an NVIDIA driver was found."
else
    driver=no
    echo "gpu: no NVIDIA driver was found; everything will run on the CPU."
fi

if [ -n "${TORCH_INDEX:-}" ]; then
    echo "torch: will be downloaded from $TORCH_INDEX"
elif [ "$(uname -s)" != Linux ]; then
    echo "torch: the default build for $(uname -s) will be downloaded."
elif [ "$driver" = yes ]; then
    echo "torch: the default build will be downloaded, with CUDA libraries of several GB, once."
else
    echo "torch: unless pip is set up otherwise, the default Linux build will be downloaded, with"
    echo "       CUDA libraries of several GB that this machine cannot use. For the CPU build alone,"
    echo "       stop here (Ctrl-C) and add TORCH_INDEX=URL to the same command, with the URL of"
    echo "       the CPU index that PyTorch's install page names."
fi
