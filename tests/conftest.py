"""Set up before anything imports Triton or JAX."""

import os


os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU, run by Triton's interpreter

import jax
import torch




jax.config.update("jax_enable_x64", True)
torch.set_num_threads(2)
