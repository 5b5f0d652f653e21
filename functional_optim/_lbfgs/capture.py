"""A refusal of steps within a CUDA graph, whose course the host decides by values of the objective."""

from collections.abc import Iterable

import torch

from .._runtime.cuda.capture import refuse_work_of_the_host


def refuse_capture(work: str, tensors: Iterable[torch.Tensor]) -> None:
    """Refuses a step while a stream of one of its devices is capturing.

    Args:
      work: the part of the step that the host decides.
      tensors: tensors of the step.

    Raises:
      CaptureError: a stream is capturing.
    """
    refuse_work_of_the_host(work, [x.device for x in tensors])
