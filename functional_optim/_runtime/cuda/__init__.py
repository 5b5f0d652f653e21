"""Launches of Triton kernels: tables that stay on the device, kernels that are loaded once, capture in graphs.

launch.py    a step: tables are brought up to date, kernels launched
tables.py    the tables of a step, on the host and on the device
capture.py   steps within a CUDA graph: refusals, and memory that graphs read
loaded.py    kernels that are compiled and loaded, or that Triton's interpreter runs
libcuda.py   the calls to the CUDA driver: kernels are loaded and launched
streams.py   streams of devices: the calls to torch.cuda, all in one place
"""
