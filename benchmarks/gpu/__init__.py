"""`make gpu`: what this project promises of NVIDIA GPUs, proved and measured on the one at hand."""
